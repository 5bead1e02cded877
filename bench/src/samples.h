/* Measured times, and how their spread is told in JSON. */

struct samples {
    float *all;
    size_t count, room;
};

static void note(struct samples *s, double value)
{
    if (s->count == s->room) s->all = realloc(s->all, (s->room = s->room ? s->room * 2 : 65536) * sizeof(float));
    s->all[s->count++] = value;
}

static int compare(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void print_samples(const char *name, struct samples *s)
{
    qsort(s->all, s->count, sizeof(float), compare);
    printf(",\"%s\":", name);
    if (!s->count) printf("null");
    else
        printf("{\"p50\":%.1f,\"p99\":%.1f,\"p999\":%.1f,\"max\":%.1f}", s->all[s->count / 2],
               s->all[s->count * 99 / 100], s->all[s->count * 999 / 1000], s->all[s->count - 1]);
}
