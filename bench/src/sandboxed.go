// Stands between the load generator and a forward proxy: each connection goes through CONNECT, and
// through TLS unless the last argument is "plain".  It is no part of what is measured.
// Usage: sandboxed PORT PROXY_PORT HOST:PORT [plain]
package main

import (
	"bufio"
	"crypto/tls"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
)

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	host := os.Args[3]
	head := "CONNECT " + host + " HTTP/1.1\r\nHost: " + host + "\r\n"
	if key := os.Getenv("PROXY_AUTHORIZATION"); key != "" {
		head += "Proxy-Authorization: " + key + "\r\n"
	}
	config := &tls.Config{InsecureSkipVerify: true, ServerName: strings.Split(host, ":")[0]}
	for {
		client, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go func() {
			defer client.Close()
			proxy, err := net.Dial("tcp", "127.0.0.1:"+os.Args[2])
			if err != nil {
				return
			}
			defer proxy.Close()
			io.WriteString(proxy, head+"\r\n")
			reader := bufio.NewReader(proxy)
			if answer, err := http.ReadResponse(reader, nil); err != nil || answer.StatusCode != 200 {
				return
			}
			far := proxy
			if len(os.Args) < 5 {
				far = tls.Client(proxy, config)
			}
			done := make(chan bool, 2)
			go func() { io.Copy(far, client); done <- true }()
			go func() { io.Copy(client, far); done <- true }()
			<-done
		}()
	}
}
