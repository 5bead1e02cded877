/* What mock.c does next: streams by the time of their next event, and those that have work at once. */
#include "common.h"

struct conn {
    int fd, heap_at, busy, writable, queued, stuck, closes, dead, tail;
    char *in;
    size_t in_size, in_room;
    uint64_t next, interval; /* when the next event is due, and the time between two */
    long events, sent, id;
    char out[2048]; /* what must go out before anything else ... */
    size_t out_at, out_size;
    const char *more; /* ... and what follows it and is too long to be copied */
    size_t more_at, more_size;
};

/* -- the clock: a heap of streams by the time of their next event --------------------------------- */

static struct conn **heap;
static int heap_size, heap_room;

static void swap(int a, int b)
{
    struct conn *kept = heap[a];
    heap[a] = heap[b];
    heap[b] = kept;
    heap[a]->heap_at = a;
    heap[b]->heap_at = b;
}

static void sift_up(int at)
{
    for (; at && heap[at]->next < heap[(at - 1) / 2]->next; at = (at - 1) / 2) swap(at, (at - 1) / 2);
}

static void sift_down(int at)
{
    for (;;) {
        int least = at;
        for (int child = 2 * at + 1; child <= 2 * at + 2 && child < heap_size; child++)
            if (heap[child]->next < heap[least]->next) least = child;
        if (least == at) return;
        swap(at, least);
        at = least;
    }
}

static void schedule(struct conn *c)
{
    if (c->heap_at >= 0) return;
    if (heap_size == heap_room) {
        heap_room = heap_room ? heap_room * 2 : 1024;
        heap = realloc(heap, heap_room * sizeof *heap);
    }
    heap[heap_size] = c;
    c->heap_at = heap_size++;
    sift_up(c->heap_at);
}

static void unschedule(struct conn *c)
{
    int at = c->heap_at;
    if (at < 0) return;
    swap(at, --heap_size);
    c->heap_at = -1;
    if (at < heap_size) {
        sift_up(at);
        sift_down(at);
    }
}

/* -- those that have something to do in the next turn ---------------------------------------------- */

static struct conn **ready;
static int ready_size, ready_room;

static void enqueue(struct conn *c)
{
    if (c->queued) return;
    if (ready_size == ready_room) {
        ready_room = ready_room ? ready_room * 2 : 1024;
        ready = realloc(ready, ready_room * sizeof *ready);
    }
    ready[ready_size++] = c;
    c->queued = 1;
}
