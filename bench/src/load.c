/* The clients: one thread, one workload, one line of JSON.
 *
 * --mode stream   each connection asks for a stream, and compares every byte of it
 *        short    each asks for JSON in a closed loop, on a kept connection
 *        big      the same, --requests times, with bodies of --request-bytes and --answer-bytes
 *        leave    all leave in mid-stream after --seconds; the line tells when
 *        stuck    all ask for a stream without end and read nothing, for --seconds
 *
 * With --requests a connection asks for one stream after another.  With --close 1 the provider ends its
 * connection behind each.  With --beside N the first N streams have --beside-events, and all others are opened
 * beside them after --wait seconds: the line has the delays of the N meanwhile.  With --ca FILE (built with
 * -DWITH_TLS) connections are by TLS.  --field adds a line to the heads of requests.
 */
#include "response.h"
#include "request.h"
#include "samples.h"
#include "tls.h"
#include <getopt.h>

enum mode { STREAM, SHORT, BIG, LEAVE, STUCK };
static const char *const MODES[] = {"stream", "short", "big", "leave", "stuck"};

struct conn {
    int fd, number, connecting, over, wrong, tail;
    session *tls;
    struct response response;
    char *request, *part; /* what is sent; an event that has come in part */
    size_t request_size, request_at, part_size, part_room, body_at;
    long events, seen, asked;
    double last_delay; /* of the event before, in microseconds */
    uint64_t asked_at, first_at, left_at, request_sum;
};

static enum mode mode;
static int port, count = 1, requests = 1, closing, beside;
static long events = 200, interval_us = 20000, beside_events;
static size_t request_bytes, response_bytes = 1500;
static double ramp = 0.2, wait = 1, seconds, timeout = 60;
static const char *path = "/v1/chat/completions", *key = "none", *authority;
static char fields[1024];

static int poller, over_count, opened;
static struct conn *conns;
static struct samples delays, gaps, beside_delays, firsts, round_trips;
static uint64_t opening_from, opening_until; /* when the streams beside the first are opened */
static uint64_t began, got_events, whole, failed, wrong, got_bytes, first_event, last_event;
static char error[128], expected[EVENT_SIZE], *json;

static double elapsed(void) { return (now_ns() - began) / 1e9; }
static int in_loop(void) { return mode == SHORT || mode == BIG; }

/* -- figures ---------------------------------------------------------------------------------------- */

static void print_all(void)
{
    struct rusage own;
    getrusage(RUSAGE_SELF, &own);
    double cpu = (own.ru_utime.tv_sec + own.ru_stime.tv_sec) * 1e6 + own.ru_utime.tv_usec + own.ru_stime.tv_usec;
    double span = (last_event - first_event) / 1e9, took = elapsed();
    printf("{\"mode\":\"%s\",\"elapsed\":%.3f,\"cpu_us\":%.0f,\"events\":%lu,\"events_s\":%.0f,\"whole\":%lu,"
           "\"failed\":%lu,\"unfinished\":%d,\"wrong\":%lu,\"requests_s\":%.1f,\"mb_s\":%.1f",
           MODES[mode], took, cpu, got_events, span > 0 ? got_events / span : 0, whole, failed,
           mode == LEAVE || mode == STUCK ? 0 : count - over_count, wrong, whole / took, got_bytes / took / 1e6);
    print_samples("delay_us", &delays);
    print_samples("gap_us", &gaps);
    print_samples("beside_us", &beside_delays);
    print_samples("first_us", &firsts);
    print_samples("round_us", &round_trips);
    printf(",\"left\":[");
    for (int i = 0, first = 1; i < count; i++)
        if (conns[i].left_at) {
            printf("%s[%d,%lu]", first ? "" : ",", i, conns[i].left_at);
            first = 0;
        }
    printf("],\"error\":\"%s\"}\n", error);
}

/* -- requests --------------------------------------------------------------------------------------- */

static void build(struct conn *c)
{
    char wish[256];
    long interval = c->number < beside ? 20000 : interval_us;
    c->events = c->number < beside ? beside_events : events;
    if (in_loop()) sprintf(wish, "answer=%zu,sum=%d", response_bytes, mode == BIG);
    else
        sprintf(wish, "events=%ld,interval_us=%ld,id=%d,stuck=%d,close=%d", c->events, interval, c->number,
                mode == STUCK, closing);
    char *body = make_body(request_bytes, !in_loop(), wish);
    c->request = make_request(path, port, key, fields, body, &c->request_size);
    c->request_sum = checksum(body, strlen(body));
    free(body);
}

static void hang_up(struct conn *c)
{
    end_session(c->tls);
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
    c->tls = NULL;
}

static void finish(struct conn *c)
{
    hang_up(c);
    over_count += !c->over;
    c->over = 1;
}

static void dial(struct conn *c);

static void fail(struct conn *c, const char *why)
{
    failed++;
    if (!*error) snprintf(error, sizeof error, "%s", why);
    hang_up(c);
    if (mode == SHORT && elapsed() < seconds && failed < 1000) dial(c);
    else finish(c);
}

static void send_rest(struct conn *c)
{
    while (c->request_at < c->request_size) {
        ssize_t sent = put(c->fd, c->tls, c->request + c->request_at, c->request_size - c->request_at);
        if (sent <= 0) return; /* full, or broken: then the next read tells */
        c->request_at += sent;
    }
}

static void ask(struct conn *c)
{
    c->request_at = c->part_size = c->body_at = c->first_at = c->seen = c->tail = c->wrong = 0;
    c->response.state = HEAD;
    c->response.head_size = 0;
    c->asked++;
    send_rest(c);
}

static void dial(struct conn *c)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct epoll_event all = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = c};
    address.sin_port = htons(port);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    c->connecting = 1;
    c->asked_at = now_ns();
    if (c->fd < 0) { fail(c, "no descriptor"); return; }
    no_delay(c->fd);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) fail(c, "connect");
    else {
        c->tls = begin_session(c->fd);
        epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &all);
    }
}

/* -- responses -------------------------------------------------------------------------------------- */

static int is_beside(struct conn *c, uint64_t sent)
{
    return c->number < beside && opening_from && sent >= opening_from && (!opening_until || sent < opening_until);
}

/* What an event was late by is its delay; by how much the gap before it was changed is the difference of two. */
static void note_delay(struct conn *c, uint64_t sent, uint64_t now)
{
    double delay = ((double)now - (double)sent) / 1e3, change = delay - c->last_delay;
    note(&delays, delay);
    if (c->seen && interval_us) note(&gaps, change < 0 ? -change : change);
    if (is_beside(c, sent)) note(&beside_delays, delay);
    c->last_delay = delay;
}

static void take_event(struct conn *c, const char *event, size_t size, uint64_t now)
{
    char tail[512];
    if (c->seen < c->events) {
        uint64_t sent = size == EVENT_SIZE ? strtoull(event + TIME_AT, NULL, 10) : now;
        note_delay(c, sent, now);
        put_digits(expected + NUMBER_AT, NUMBER_SIZE, c->seen++);
        c->wrong |= size != EVENT_SIZE || memcmp(event, expected, TIME_AT) ||
                    memcmp(event + TIME_AT + TIME_SIZE, expected + TIME_AT + TIME_SIZE, END_SIZE);
        got_events++;
        if (!first_event) first_event = now;
        last_event = now;
        return;
    }
    int wanted = put_tail(tail, c->tail++, c->events);
    c->wrong |= size != (size_t)wanted || memcmp(event, tail, size);
}

static void take_first(struct conn *c, uint64_t now)
{
    c->first_at = now;
    note(&firsts, (now - c->asked_at) / 1e3);
    opened += c->number >= beside && c->asked == 1;
    if (beside && !opening_until && opened == count - beside) opening_until = now;
}

static void take_body(struct conn *c, const char *data, size_t size)
{
    uint64_t now = now_ns();
    got_bytes += size;
    if (!c->first_at) take_first(c, now);
    if (in_loop()) {
        c->wrong |= c->body_at + size > response_bytes || memcmp(json + c->body_at, data, size);
        c->body_at += size;
        return;
    }
    if (c->part_size + size > c->part_room) c->part = realloc(c->part, c->part_room = (c->part_size + size) * 2);
    memcpy(c->part + c->part_size, data, size);
    c->part_size += size;
    size_t at = 0;
    for (char *end; (end = memmem(c->part + at, c->part_size - at, "\n\n", 2)); at = end + 2 - c->part)
        take_event(c, c->part + at, end + 2 - c->part - at, now);
    c->part_size -= at;
    if (at) memmove(c->part, c->part + at, c->part_size);
}

static void complete(struct conn *c)
{
    if (c->response.status != 200) {
        char why[32];
        sprintf(why, "status %d", c->response.status);
        fail(c, why);
        return;
    }
    if (in_loop()) {
        note(&round_trips, (now_ns() - c->asked_at) / 1e3);
        c->wrong |= c->body_at != response_bytes;
    } else {
        c->wrong |= c->seen != c->events || c->tail != TAIL_EVENTS || c->part_size;
    }
    if (mode == BIG) {
        const char *sum = strcasestr(c->response.head, "\r\nx-body-sum:");
        c->wrong |= !sum || strtoull(sum + 13, NULL, 10) != c->request_sum;
    }
    wrong += c->wrong;
    whole++;
    if (mode == SHORT ? elapsed() >= seconds : c->asked >= requests) {
        finish(c);
    } else if (c->response.closes) {
        hang_up(c);
        dial(c);
    } else {
        c->asked_at = now_ns();
        ask(c);
    }
}

static void receive(struct conn *c)
{
    static char data[262144];
    int fd = c->fd;
    while (c->fd == fd && !c->over) {
        ssize_t got = get(fd, c->tls, data, sizeof data);
        if (got < 0) {
            if (errno != EAGAIN) fail(c, "reset");
            return;
        }
        if (got == 0) {
            if (c->response.state == UNTIL_CLOSE) complete(c);
            else fail(c, c->response.state == HEAD ? "closed before the head" : "closed within the body");
            return;
        }
        size_t taken = feed(&c->response, c, data, got);
        if (c->response.state == BROKEN || taken < (size_t)got) fail(c, "bytes that are no response");
        else if (c->response.state == WHOLE) complete(c);
    }
}

/* -- the loop --------------------------------------------------------------------------------------- */

/* Starts are even, with a golden-ratio offset within each, so that streams do not beat in phase. */
static double start_of(int number)
{
    double offset = number * 0.6180339887;
    offset -= (long)offset;
    if (number < beside) return wait / 2 * (number + offset) / beside;
    return (beside ? wait : 0) + ramp * (number - beside + offset) / (count - beside);
}

static void leave_all(void)
{
    for (int i = 0; i < count; i++)
        if (conns[i].fd >= 0) {
            conns[i].left_at = now_ns();
            finish(&conns[i]);
        }
}

static void run(void)
{
    struct epoll_event ready[512];
    for (int started = 0;;) {
        double now = elapsed(), pause = 1;
        for (; started < count && now >= start_of(started); started++) {
            if (beside && started == beside) opening_from = now_ns();
            dial(&conns[started]);
        }
        if (over_count == count || now > timeout) return;
        if ((mode == LEAVE || mode == STUCK) && now >= seconds) return;
        if (started < count) pause = start_of(started) - now;
        if ((mode == LEAVE || mode == STUCK) && seconds - now < pause) pause = seconds - now;
        int found = wait_ns(poller, ready, 512, pause > 0 ? pause * 1e9 : 0);
        for (int i = 0; i < found; i++) {
            struct conn *c = ready[i].data.ptr;
            uint32_t what = ready[i].events;
            if (c->fd < 0) continue;
            if (c->connecting) {
                if (what & (EPOLLERR | EPOLLHUP)) { fail(c, "refused"); continue; }
                if (!(what & EPOLLOUT)) continue;
                c->connecting = 0;
                ask(c);
                continue;
            }
            if (c->tls || what & EPOLLOUT) send_rest(c); /* which goes on with a handshake, too */
            if (mode != STUCK && what & ~EPOLLOUT) receive(c);
        }
    }
}

static void add_field(const char *line)
{
    size_t used = strlen(fields);
    if (used + strlen(line) + 3 > sizeof fields) exit(2);
    sprintf(fields + used, "%s\r\n", line);
}

static void read_options(int argc, char **argv)
{
    static const struct option names[] = {
        {"mode", 1, 0, 'm'}, {"port", 1, 0, 'p'}, {"conns", 1, 0, 'c'}, {"events", 1, 0, 'e'},
        {"interval-us", 1, 0, 'i'}, {"ramp", 1, 0, 'r'}, {"seconds", 1, 0, 's'}, {"timeout", 1, 0, 't'},
        {"requests", 1, 0, 'n'}, {"request-bytes", 1, 0, 'q'}, {"answer-bytes", 1, 0, 'a'}, {"path", 1, 0, 'P'},
        {"key", 1, 0, 'k'}, {"close", 1, 0, 'x'}, {"beside", 1, 0, 'b'}, {"beside-events", 1, 0, 'B'},
        {"wait", 1, 0, 'w'}, {"ca", 1, 0, 'A'}, {"field", 1, 0, 'f'}, {0}};
    for (int option; (option = getopt_long(argc, argv, "", names, NULL)) != -1;) switch (option) {
        case 'm': while (mode < STUCK && strcmp(optarg, MODES[mode])) mode++; break;
        case 'p': port = atoi(optarg); break;
        case 'c': count = atoi(optarg); break;
        case 'e': events = atol(optarg); break;
        case 'i': interval_us = atol(optarg); break;
        case 'r': ramp = atof(optarg); break;
        case 's': seconds = atof(optarg); break;
        case 't': timeout = atof(optarg); break;
        case 'n': requests = atoi(optarg); break;
        case 'q': request_bytes = atol(optarg); break;
        case 'a': response_bytes = atol(optarg); break;
        case 'P': path = optarg; break;
        case 'k': key = optarg; break;
        case 'x': closing = atoi(optarg); break;
        case 'b': beside = atoi(optarg); break;
        case 'B': beside_events = atol(optarg); break;
        case 'w': wait = atof(optarg); break;
        case 'A': authority = optarg; break;
        case 'f': add_field(optarg); break;
        default: exit(2);
    }
}

int main(int argc, char **argv)
{
    read_options(argc, argv);
    all_descriptors();
    if (authority && !use_tls(authority)) {
        fprintf(stderr, "no TLS with %s\n", authority);
        return 2;
    }
    put_event(expected);
    json = make_json(response_bytes);
    poller = epoll_create1(0);
    conns = calloc(count, sizeof *conns);
    for (int i = 0; i < count; i++) {
        conns[i].fd = -1;
        conns[i].number = i;
        build(&conns[i]);
    }
    began = now_ns();
    run();
    if (mode == LEAVE) leave_all();
    print_all();
    return 0;
}
