/* The provider: answers chat completions by a clock, in one thread.  Usage: mock PORT
 *
 * The "user" of a request's JSON says what comes: events=N,interval_us=US,id=K for a stream (with "stream":true),
 * where an interval of 0 means without a pause, stuck=1 for a stream without an end, close=1 for a connection that
 * ends with its stream, and answer=BYTES,sum=1 for JSON.  GET /mock/stats, /mock/closes and /mock/reset are for
 * whoever measures.
 */
#include "control.h"

enum { LATE_NS = 10000000, BURST = 4 };

static int poller;
static char chunk[EVENT_SIZE + 16];
static int chunk_head, chunk_size;
static char *endless;
static size_t endless_size;

/* -- one connection -------------------------------------------------------------------------------- */

static void end(struct conn *c)
{
    if (c->dead) return;
    c->dead = 1;
    if (c->busy) {
        stats.active--;
        if (close_count < MAX_CLOSES) {
            closes[close_count].id = c->id;
            closes[close_count++].at = now_ns();
        }
    }
    unschedule(c);
    close(c->fd);
    enqueue(c); /* freed from there */
}

/* Send as much as the kernel takes; returns whether that was all. */
static int put(struct conn *c, const char *data, size_t size, size_t *at)
{
    while (*at < size) {
        ssize_t sent = send(c->fd, data + *at, size - *at, MSG_NOSIGNAL);
        if (sent < 0) {
            c->writable = 0;
            if (errno != EAGAIN) end(c);
            return 0;
        }
        *at += sent;
        if (c->stuck) stats.stuck_bytes += sent;
    }
    return 1;
}

static void take_requests(struct conn *c);

static void finish(struct conn *c)
{
    c->busy = 0;
    stats.active--;
    unschedule(c);
    if (c->closes) end(c);
    else take_requests(c);
}

/* Send what is due; `budget` says how many events without a pause one turn may have. */
static void answer(struct conn *c, int budget)
{
    while (!c->dead && c->busy && c->writable) {
        if (!put(c, c->out, c->out_size, &c->out_at) || !put(c, c->more, c->more_size, &c->more_at)) return;
        if (c->stuck) {
            if (!budget--) { enqueue(c); return; }
            c->more = endless;
            c->more_at = 0;
            c->more_size = endless_size;
            continue;
        }
        if (c->events < 0 || c->tail == TAIL_EVENTS) { finish(c); return; }
        c->out_at = 0;
        if (c->sent == c->events) {
            char event[512];
            int size = put_tail(event, c->tail++, c->events);
            const char *last = c->tail == TAIL_EVENTS ? "0\r\n\r\n" : "";
            c->out_size = sprintf(c->out, "%x\r\n%s\r\n%s", size, event, last);
            continue;
        }
        uint64_t now = now_ns();
        if (c->interval && c->next > now) { c->out_size = 0; schedule(c); return; }
        if (!c->interval && !budget--) { c->out_size = 0; enqueue(c); return; }
        memcpy(c->out, chunk, chunk_size);
        put_digits(c->out + chunk_head + NUMBER_AT, NUMBER_SIZE, c->sent++);
        put_digits(c->out + chunk_head + TIME_AT, TIME_SIZE, now);
        c->out_size = chunk_size;
        c->next += c->interval;
        stats.events++;
    }
}

/* -- requests --------------------------------------------------------------------------------------- */

/* What the "user" of a body says, up to its end; a proxy may have written the JSON anew, with or without spaces. */
static void read_wish(char *wish, size_t room, const char *body, size_t size)
{
    const char *at = memmem(body, size, "\"user\":", 7), *end = body + size;
    *wish = 0;
    if (!at) return;
    for (at += 7; at < end && (*at == ' ' || *at == '"');) at++;
    const char *stop = memchr(at, '"', end - at);
    if (!stop || (size_t)(stop - at) >= room) return;
    memcpy(wish, at, stop - at);
    wish[stop - at] = 0;
}

static long parameter(const char *wish, const char *name, long otherwise)
{
    size_t size = strlen(name);
    for (const char *at = wish; (at = strstr(at, name)); at += size)
        if (at[size] == '=' && (at == wish || at[-1] == ',')) return atol(at + size + 1);
    return otherwise;
}

static const char *json_of(size_t size)
{
    static struct { size_t size; char *text; } made[8];
    static int count;
    for (int i = 0; i < count; i++)
        if (made[i].size == size) return made[i].text;
    if (count == 8) exit(2); /* no workload has so many */
    made[count].size = size;
    return made[count++].text = make_json(size);
}

static void begin(struct conn *c, const char *body, size_t size)
{
    char wish[256];
    read_wish(wish, sizeof wish, body, size);
    stats.requests++;
    stats.body_bytes += size;
    c->id = parameter(wish, "id", -1);
    if (memmem(body, size, "\"stream\":true", 13)) {
        c->events = parameter(wish, "events", 200);
        c->interval = parameter(wish, "interval_us", 20000) * 1000ull;
        c->stuck = parameter(wish, "stuck", 0);
        c->closes = parameter(wish, "close", 0);
        c->next = now_ns();
        c->out_size = sprintf(c->out,
                              "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
                              "Cache-Control: no-cache\r\nOpenAI-Processing-Ms: 12\r\n"
                              "X-Request-Id: req_0123456789abcdef\r\n%sTransfer-Encoding: chunked\r\n\r\n",
                              c->closes ? "Connection: close\r\n" : "");
        return;
    }
    size_t length = parameter(wish, "answer", 1500);
    uint64_t sum = parameter(wish, "sum", 0) ? checksum(body, size) : 0;
    c->out_size = sprintf(c->out,
                          "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nOpenAI-Processing-Ms: 12\r\n"
                          "X-Request-Id: req_0123456789abcdef\r\nX-Body-Sum: %lu\r\nContent-Length: %zu\r\n\r\n",
                          sum, length);
    c->more = json_of(length);
    if (c->out_size + length <= sizeof c->out) { /* one write for a short response */
        memcpy(c->out + c->out_size, c->more, length);
        c->out_size += length;
    } else {
        c->more_size = length;
    }
}

/* Answer the requests that are whole, as long as none is being answered. */
static void take_requests(struct conn *c)
{
    while (!c->dead && !c->busy && c->in_size) {
        char *head_end = memmem(c->in, c->in_size, "\r\n\r\n", 4);
        if (!head_end) return;
        *head_end = 0;
        const char *length = strcasestr(c->in, "\r\ncontent-length:");
        int chunked = strcasestr(c->in, "\r\ntransfer-encoding:") != NULL;
        size_t head = head_end + 4 - c->in, body = length ? strtoul(length + 17, NULL, 10) : 0;
        *head_end = '\r';
        if (chunked) { end(c); return; } /* no proxy here has a reason to chunk these bodies */
        if (c->in_size < head + body) return;
        *head_end = 0;
        c->busy = 1;
        c->events = -1;
        c->interval = c->sent = c->tail = c->stuck = c->closes = 0;
        c->out_at = c->out_size = c->more_at = c->more_size = 0;
        stats.active++;
        if (!strncmp(c->in, "GET /mock/stats ", 16)) tell_stats(c);
        else if (!strncmp(c->in, "GET /mock/closes ", 17)) tell_closes(c);
        else if (!strncmp(c->in, "GET /mock/reset ", 16)) reset(c);
        else begin(c, c->in + head, body);
        c->in_size -= head + body;
        memmove(c->in, c->in + head + body, c->in_size);
        c->writable = 1;
        answer(c, BURST);
    }
}

static void receive(struct conn *c)
{
    for (;;) {
        if (c->in_size == c->in_room) c->in = realloc(c->in, c->in_room *= 2);
        ssize_t got = recv(c->fd, c->in + c->in_size, c->in_room - c->in_size, 0);
        if (got > 0) {
            c->in_size += got;
        } else if (got == 0 || errno != EAGAIN) {
            end(c);
            return;
        } else {
            take_requests(c);
            return;
        }
    }
}

/* -- the loop --------------------------------------------------------------------------------------- */

static void accept_all(int listener)
{
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        struct conn *c = calloc(1, sizeof *c);
        no_delay(fd);
        c->fd = fd;
        c->heap_at = -1;
        c->writable = 1;
        c->in = malloc(c->in_room = 4096);
        struct epoll_event all = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = c};
        epoll_ctl(poller, EPOLL_CTL_ADD, fd, &all);
    }
}

static void run_due(void)
{
    uint64_t now = now_ns();
    while (heap_size && heap[0]->next <= now) {
        struct conn *c = heap[0];
        stats.timed++;
        stats.late += now - c->next > LATE_NS;
        unschedule(c);
        answer(c, 0);
    }
}

static void run_ready(void)
{
    int count = ready_size;
    for (int i = 0; i < count; i++) {
        struct conn *c = ready[i];
        c->queued = 0;
        if (c->dead) {
            free(c->in);
            free(c);
        } else {
            answer(c, BURST);
        }
    }
    ready_size -= count;
    memmove(ready, ready + count, ready_size * sizeof *ready);
}

int main(int argc, char **argv)
{
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (argc != 2) return 2;
    all_descriptors();
    address.sin_port = htons(atoi(argv[1]));
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)) {
        perror("mock");
        return 1;
    }
    char event[EVENT_SIZE];
    put_event(event);
    chunk_head = sprintf(chunk, "%x\r\n", EVENT_SIZE);
    memcpy(chunk + chunk_head, event, EVENT_SIZE);
    memcpy(chunk + chunk_head + EVENT_SIZE, "\r\n", 2);
    chunk_size = chunk_head + EVENT_SIZE + 2;
    endless = malloc(16384);
    for (; endless_size + chunk_size < 16384; endless_size += chunk_size)
        memcpy(endless + endless_size, chunk, chunk_size);

    poller = epoll_create1(0);
    struct epoll_event events[512], incoming = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &incoming);
    for (;;) {
        run_due();
        run_ready();
        int64_t pause = ready_size ? 0 : -1;
        if (pause && heap_size) {
            pause = (int64_t)heap[0]->next - (int64_t)now_ns();
            if (pause < 0) pause = 0;
        }
        int count = wait_ns(poller, events, 512, pause);
        for (int i = 0; i < count; i++) {
            struct conn *c = events[i].data.ptr;
            if (!c) {
                accept_all(listener);
                continue;
            }
            if (!c->dead && events[i].events & ~EPOLLOUT) receive(c);
            if (!c->dead && events[i].events & EPOLLOUT) {
                c->writable = 1;
                answer(c, BURST);
            }
        }
    }
}
