/* Reads one HTTP/1.1 response, split at any point.  Content is handed to take_body(), which load.c has. */
#include "common.h"

enum { HEAD, SIZE, DATA, DATA_END, TRAILER, LENGTH, UNTIL_CLOSE, WHOLE, BROKEN };

struct response {
    int state, status, closes, in_extension;
    uint64_t left;  /* of the chunk, or of the body; in DATA_END of the line end */
    size_t in_line; /* bytes of a trailer's line, without its end */
    char head[8192];
    size_t head_size;
};

struct conn;
static void take_body(struct conn *c, const char *data, size_t size);

static inline void read_head(struct response *a)
{
    const char *length = strcasestr(a->head, "\r\ncontent-length:");
    const char *coding = strcasestr(a->head, "\r\ntransfer-encoding: chunked");
    a->status = atoi(a->head + 9);
    a->closes = strcasestr(a->head, "\r\nconnection: close") || !strncmp(a->head, "HTTP/1.0", 8);
    a->left = length ? strtoull(length + 17, NULL, 10) : 0;
    a->in_extension = 0;
    a->state = coding ? SIZE : !length ? UNTIL_CLOSE : a->left ? LENGTH : WHOLE;
    if (coding) a->left = 0;
}

/* Take bytes up to the end of the response, and return how many that were. */
static inline size_t feed(struct response *a, struct conn *c, const char *data, size_t size)
{
    size_t at = 0;
    while (at < size && a->state < WHOLE) {
        uint64_t rest = size - at, part = rest < a->left ? rest : a->left;
        char byte = data[at];
        switch (a->state) {
        case HEAD:
            if (a->head_size + 2 > sizeof a->head) {
                a->state = BROKEN;
                break;
            }
            a->head[a->head_size++] = byte;
            at++;
            if (byte == '\n' && a->head_size > 3 && !memcmp(a->head + a->head_size - 4, "\r\n\r\n", 4)) {
                a->head[a->head_size] = 0;
                read_head(a);
                if (a->status < 200) {
                    a->state = HEAD;
                    a->head_size = 0;
                }
            }
            break;
        case SIZE:
            at++;
            if (byte == '\n') {
                a->state = a->left ? DATA : TRAILER;
                a->in_line = a->in_extension = 0;
            } else if (byte == ';') {
                a->in_extension = 1;
            } else if (!a->in_extension && byte != '\r') {
                int low = byte | 32;
                int digit = byte >= '0' && byte <= '9' ? byte - '0' : low >= 'a' && low <= 'f' ? low - 'a' + 10 : -1;
                if (digit < 0) a->state = BROKEN;
                a->left = a->left * 16 + digit;
            }
            break;
        case TRAILER:
            at++;
            if (byte == '\n' && !a->in_line) a->state = WHOLE;
            a->in_line = byte == '\n' ? 0 : a->in_line + (byte != '\r');
            break;
        case UNTIL_CLOSE:
            take_body(c, data + at, rest);
            at = size;
            break;
        default: /* DATA, DATA_END, LENGTH */
            if (a->state != DATA_END) take_body(c, data + at, part);
            at += part;
            a->left -= part;
            if (a->left) break;
            if (a->state == DATA) a->left = 2;
            a->state = a->state == DATA ? DATA_END : a->state == DATA_END ? SIZE : WHOLE;
        }
    }
    return at;
}
