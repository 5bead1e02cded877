// Streams a POST with net/http, and writes each piece as it comes.
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
)

func main() {
	body := strings.NewReader(`{"model":"m","stream":true}`)
	response, err := http.Post(os.Args[1], "application/json", body)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if response.StatusCode != 200 {
		said, _ := io.ReadAll(response.Body)
		fmt.Fprintln(os.Stderr, response.Status, string(said))
		os.Exit(1)
	}
	piece := make([]byte, 65536)
	for {
		size, err := response.Body.Read(piece)
		os.Stdout.Write(piece[:size])
		if err != nil {
			break
		}
	}
}
