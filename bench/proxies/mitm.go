// A forward proxy that ends TLS for every host, and forwards what is inside to one provider.
// Usage: mitm PORT CERTIFICATE KEY; UPSTREAM is the provider's URL.  Where that is not set, it moves
// bytes between the client and the host that is asked for, as tunnels do.
package main

import (
	"crypto/tls"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
)

// one is a listener that accepts one connection, and then none until the process ends.
type one struct {
	conns chan net.Conn
	addr  net.Addr
}

func (l one) Accept() (net.Conn, error) { return <-l.conns, nil }
func (l one) Close() error              { return nil }
func (l one) Addr() net.Addr            { return l.addr }

// tunnel moves bytes both ways until both sides have ended.
func tunnel(client, host net.Conn) {
	go pour(host, client)
	pour(client, host)
}

func pour(to, from net.Conn) {
	io.Copy(to, from)
	to.(*net.TCPConn).CloseWrite()
}

func main() {
	upstream, err := url.Parse(os.Getenv("UPSTREAM"))
	if err != nil {
		log.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(os.Args[2], os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConns, transport.MaxIdleConnsPerHost = 2000, 2000
	transport.DisableCompression, transport.ForceAttemptHTTP2 = true, false
	transport.TLSClientConfig = &tls.Config{InsecureSkipVerify: true}
	inside := httputil.NewSingleHostReverseProxy(upstream)
	inside.Transport, inside.FlushInterval = transport, -1
	config := &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"http/1.1"}}
	ended := one{make(chan net.Conn), listener.Addr()}
	go func() { log.Fatal(http.Serve(ended, inside)) }()
	log.Fatal(http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect {
			http.Error(w, "only CONNECT is served", http.StatusMethodNotAllowed)
			return
		}
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		if _, err := conn.Write([]byte("HTTP/1.1 200 OK\r\n\r\n")); err != nil {
			return
		}
		if upstream.Host == "" {
			defer conn.Close()
			if host, err := net.Dial("tcp", r.Host); err == nil {
				defer host.Close()
				tunnel(conn, host)
			}
			return
		}
		ended.conns <- tls.Server(conn, config)
	})))
}
