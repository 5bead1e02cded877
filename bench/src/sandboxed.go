// Stands between the load generator and a forward proxy: each connection goes through CONNECT, and
// through TLS unless the last argument is "plain".  It is no part of what is measured.
// Usage: sandboxed PORT PROXY_PORT HOST:PORT [plain]
package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
)

// forward copies, and names the host in the heads of requests as a program would.
func forward(far io.Writer, client net.Conn, name string) {
	own := []byte("Host: " + client.LocalAddr().String())
	piece := make([]byte, 1<<20)
	for {
		size, err := client.Read(piece)
		if _, failed := far.Write(bytes.Replace(piece[:size], own, []byte("Host: "+name), 1)); failed != nil || err != nil {
			return
		}
	}
}

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
	name := strings.Split(host, ":")[0]
	config := &tls.Config{InsecureSkipVerify: true, ServerName: name}
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
			go func() { forward(far, client, name); done <- true }()
			go func() { io.Copy(client, far); done <- true }()
			<-done
		}()
	}
}
