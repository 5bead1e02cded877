/* What the provider (mock.c) and the load generator (load.c) agree on: the bytes of events and responses.
 *
 * An event is EVENT_START, six digits (its number), EVENT_MIDDLE, twenty digits (when it was sent, in
 * nanoseconds of CLOCK_MONOTONIC) and EVENT_END: 223 bytes, the size of a usual one of OpenAI's.  Every
 * byte of every response is known in advance, so that every byte can be compared.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EVENT_COMMON \
    "data: {\"id\":\"chatcmpl-9f8e7d6c5b4a39281706\",\"object\":\"chat.completion.chunk\"," \
    "\"created\":1763650000,\"model\":\"mock-gpt-4o\",\"choices\":"
#define EVENT_START EVENT_COMMON "[{\"index\":0,\"delta\":{\"content\":\" tok"
#define EVENT_MIDDLE " ts="
#define EVENT_END "\"},\"finish_reason\":null}]}\n\n"
#define EVENT_STOP EVENT_COMMON "[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n"
#define EVENT_USAGE \
    EVENT_COMMON "[],\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":%ld,\"total_tokens\":%ld}}\n\n"
#define EVENT_DONE "data: [DONE]\n\n"
#define JSON_START \
    "{\"id\":\"chatcmpl-9f8e7d6c5b4a39281706\",\"object\":\"chat.completion\",\"created\":1763650000," \
    "\"model\":\"mock-gpt-4o\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\""
#define JSON_END \
    "\"},\"logprobs\":null,\"finish_reason\":\"stop\"}]," \
    "\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":300,\"total_tokens\":311}}"

enum {
    START_SIZE = sizeof(EVENT_START) - 1,
    MIDDLE_SIZE = sizeof(EVENT_MIDDLE) - 1,
    END_SIZE = sizeof(EVENT_END) - 1,
    NUMBER_AT = START_SIZE, NUMBER_SIZE = 6,
    TIME_AT = NUMBER_AT + NUMBER_SIZE + MIDDLE_SIZE, TIME_SIZE = 20,
    EVENT_SIZE = TIME_AT + TIME_SIZE + END_SIZE,
    TAIL_EVENTS = 3, /* stop, usage, done */
};

static inline uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + t.tv_nsec;
}

static inline void put_digits(char *at, int count, uint64_t value)
{
    while (count--) {
        at[count] = '0' + value % 10;
        value /= 10;
    }
}

/* An event with its number and its time at zero. */
static inline void put_event(char *at)
{
    memcpy(at, EVENT_START, START_SIZE);
    put_digits(at + NUMBER_AT, NUMBER_SIZE, 0);
    memcpy(at + NUMBER_AT + NUMBER_SIZE, EVENT_MIDDLE, MIDDLE_SIZE);
    put_digits(at + TIME_AT, TIME_SIZE, 0);
    memcpy(at + TIME_AT + TIME_SIZE, EVENT_END, END_SIZE);
}

/* One of the events that follow the last numbered one; returns its size. */
static inline int put_tail(char *at, int which, long events)
{
    if (which == 0) return sprintf(at, "%s", EVENT_STOP);
    if (which == 1) return sprintf(at, EVENT_USAGE, events, events + 11);
    return sprintf(at, "%s", EVENT_DONE);
}

/* A JSON response of exactly `size` bytes, 600 or more, that repeats itself nowhere in 4096. */
static inline char *make_json(size_t size)
{
    size_t start = sizeof(JSON_START) - 1, end = size - (sizeof(JSON_END) - 1);
    char *made = malloc(size + 1);
    memcpy(made, JSON_START, start);
    for (size_t i = start; i < end; i++)
        made[i] = "the quick brown fox jumps over it, "[(i - start + (i >> 12)) % 35];
    memcpy(made + end, JSON_END, sizeof(JSON_END));
    return made;
}

/* FNV-1a, so that a request's body can be compared at its far end. */
static inline uint64_t checksum(const char *data, size_t size)
{
    uint64_t hash = 1469598103934665603ull;
    for (size_t i = 0; i < size; i++) hash = (hash ^ (unsigned char)data[i]) * 1099511628211ull;
    return hash;
}

static inline void no_delay(int fd)
{
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

/* epoll_wait to the nanosecond; a negative `ns` waits without end. */
static inline int wait_ns(int poll, struct epoll_event *events, int count, int64_t ns)
{
    struct timespec t = {ns / 1000000000, ns % 1000000000};
    return syscall(SYS_epoll_pwait2, poll, events, count, ns < 0 ? NULL : &t, NULL, 0);
}

static inline void all_descriptors(void)
{
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    signal(SIGPIPE, SIG_IGN);
}
