/* What mock.c has counted, and how it tells whoever measures. */
#include "schedule.h"

enum { MAX_CLOSES = 65536 };

static struct { uint64_t events, timed, late, stuck_bytes, requests, active, body_bytes; } stats;
static struct { long id; uint64_t at; } closes[MAX_CLOSES];
static int close_count;

/* Answer whoever measures, one at a time. */
static void tell(struct conn *c, const char *text)
{
    static char *kept;
    free(kept);
    kept = strdup(text);
    c->more = kept;
    c->more_size = strlen(kept);
    c->out_size = sprintf(c->out, "HTTP/1.1 200 OK\r\nContent-Length: %zu\r\n\r\n", c->more_size);
}

static void tell_stats(struct conn *c)
{
    char text[512];
    sprintf(text,
            "{\"events\":%lu,\"timed\":%lu,\"late\":%lu,\"stuck_bytes\":%lu,\"requests\":%lu,"
            "\"active\":%lu,\"body_bytes\":%lu}\n",
            stats.events, stats.timed, stats.late, stats.stuck_bytes, stats.requests, stats.active - 1,
            stats.body_bytes);
    tell(c, text);
}

static void tell_closes(struct conn *c)
{
    char *text = malloc(48 * (close_count + 1)), *at = text;
    *at = 0;
    for (int i = 0; i < close_count; i++) at += sprintf(at, "%ld %lu\n", closes[i].id, closes[i].at);
    tell(c, text);
    free(text);
}

static void reset(struct conn *c)
{
    uint64_t active = stats.active;
    memset(&stats, 0, sizeof stats);
    stats.active = active;
    close_count = 0;
    tell(c, "");
}
