/* What load.c reads from and writes to: a socket, or TLS on one where it was built with -DWITH_TLS and --ca
 * names an authority.  Each connection makes a whole handshake and verifies the certificate, as a client does
 * that has just been started. */
#ifdef WITH_TLS
#include <openssl/err.h>
#include <openssl/ssl.h>
typedef SSL session;
static SSL_CTX *context;

/* Returns whether the authority can be read. */
static int use_tls(const char *authority)
{
    static const unsigned char only[] = "\x08http/1.1";
    context = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_verify(context, SSL_VERIFY_PEER, NULL);
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_alpn_protos(context, only, sizeof only - 1);
    return SSL_CTX_load_verify_locations(context, authority, NULL);
}

static session *begin_session(int fd)
{
    if (!context) return NULL;
    SSL *made = SSL_new(context);
    SSL_set1_host(made, "localhost");
    SSL_set_tlsext_host_name(made, "localhost");
    SSL_set_fd(made, fd);
    SSL_set_connect_state(made);
    return made;
}

static void end_session(session *s)
{
    if (!s) return;
    if (SSL_is_init_finished(s)) SSL_shutdown(s);
    ERR_clear_error();
    SSL_free(s);
}

/* As send and recv tell it: 0 is an end, -1 with EAGAIN is "later", and each other -1 is a failure. */
static ssize_t told(session *s, int result)
{
    if (result > 0) return result;
    int why = SSL_get_error(s, result);
    ERR_clear_error();
    if (why == SSL_ERROR_ZERO_RETURN) return 0;
    errno = why == SSL_ERROR_WANT_READ || why == SSL_ERROR_WANT_WRITE ? EAGAIN : EPROTO;
    return -1;
}

static ssize_t put(int fd, session *s, const char *data, size_t size)
{
    return s ? told(s, SSL_write(s, data, size)) : send(fd, data, size, MSG_NOSIGNAL);
}

static ssize_t get(int fd, session *s, char *data, size_t size)
{
    return s ? told(s, SSL_read(s, data, size)) : recv(fd, data, size, 0);
}
#else
typedef void session;
static int use_tls(const char *authority) { return 0; }
static session *begin_session(int fd) { return NULL; }
static void end_session(session *s) {}
static ssize_t put(int fd, session *s, const char *data, size_t size) { return send(fd, data, size, MSG_NOSIGNAL); }
static ssize_t get(int fd, session *s, char *data, size_t size) { return recv(fd, data, size, 0); }
#endif
