/* Makes the requests: a chat as SDKs send it, with a wish for mock.c as its "user", so that the head is the same for
 * each, as an SDK's is. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* JSON of about `bytes`, at least some 550. */
static char *make_body(size_t bytes, int stream, const char *wish)
{
    size_t pad = bytes > 650 ? bytes - 650 : 0;
    char *made = malloc(bytes + 2048 + strlen(wish)), *at = made;
    at += sprintf(at,
        "{\"model\":\"mock-gpt-4o\",\"user\":\"%s\",%s\"temperature\":0.7,\"max_tokens\":1024,\"messages\":["
        "{\"role\":\"system\",\"content\":\"You are a helpful assistant. Answer briefly, and in plain words.\"},"
        "{\"role\":\"user\",\"content\":\"Write a short story about a proxy that forwards tokens quickly. Keep the "
        "tone light, mention one fox, and do not use more than two hundred words.",
        wish, stream ? "\"stream\":true,\"stream_options\":{\"include_usage\":true}," : "");
    for (size_t i = 0; i < pad; i++) *at++ = "abcdefghij klmnopqrst uvwxyz "[i % 29];
    strcpy(at, "\"}]}");
    return made;
}

/* The whole request; `fields` are whole lines of its head, and its size goes to `size`. */
static char *make_request(const char *path, int port, const char *key, const char *fields, const char *body,
                          size_t *size)
{
    size_t length = strlen(body);
    char *made = malloc(length + 1024 + strlen(path) + strlen(key) + strlen(fields));
    *size = sprintf(made,
        "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUser-Agent: bench/1\r\nAccept: */*\r\n"
        "Content-Type: application/json\r\nAuthorization: Bearer %s\r\n%sContent-Length: %zu\r\n\r\n%s",
        path, port, key, fields, length, body);
    return made;
}
