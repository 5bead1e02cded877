// Go's ReverseProxy, as its documentation shows it, flushing at once.  Usage: reverseproxy PORT URL [CA]
// With CERTIFICATE, a file that has its key as well, it listens by TLS.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"log"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
)

func main() {
	provider, err := url.Parse(os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConns, transport.MaxIdleConnsPerHost = 1000, 1000
	transport.DisableCompression, transport.ForceAttemptHTTP2 = true, false
	if len(os.Args) > 3 {
		authority, err := os.ReadFile(os.Args[3])
		if err != nil {
			log.Fatal(err)
		}
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(authority)
		transport.TLSClientConfig = &tls.Config{RootCAs: pool}
	}
	proxy := httputil.NewSingleHostReverseProxy(provider)
	proxy.Transport, proxy.FlushInterval = transport, -1
	server := &http.Server{Addr: "127.0.0.1:" + os.Args[1], Handler: proxy}
	certificate := os.Getenv("CERTIFICATE")
	if certificate == "" {
		log.Fatal(server.ListenAndServe())
	}
	server.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){} // HTTP/1.1 only
	log.Fatal(server.ListenAndServeTLS(certificate, certificate))
}
