// A provider that says which models Go's own readers see in a request: net/http, encoding/json,
// mime/multipart, and the decoders of codings that its standard library has.
package main

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"path"
	"strings"
)

func segments(name string) []string {
	seen := []string{}
	parts := strings.Split(name, "/")
	for at, part := range parts[:len(parts)-1] {
		if strings.EqualFold(part, "deployments") && parts[at+1] != "" {
			seen = append(seen, parts[at+1])
		}
		if strings.EqualFold(part, "models") {
			if model, _, called := strings.Cut(parts[at+1], ":"); called && model != "" {
				seen = append(seen, model)
			}
		}
	}
	return seen
}

func read(response http.ResponseWriter, request *http.Request) {
	seen := []string{}
	body, _ := io.ReadAll(request.Body)
	switch strings.ToLower(request.Header.Get("Content-Encoding")) {
	case "gzip":
		if reader, err := gzip.NewReader(bytes.NewReader(body)); err == nil {
			body, _ = io.ReadAll(reader)
		}
	case "deflate":
		if reader, err := zlib.NewReader(bytes.NewReader(body)); err == nil {
			body, _ = io.ReadAll(reader)
		}
	}
	// As Ollama does: a decoder that takes the first value, whatever the type says.
	var asked struct{ Model *string }
	if json.NewDecoder(bytes.NewReader(body)).Decode(&asked) == nil && asked.Model != nil {
		seen = append(seen, *asked.Model)
	}
	request.Body = io.NopCloser(bytes.NewReader(body))
	if request.ParseMultipartForm(1<<20); request.Form != nil {
		seen = append(seen, request.Form["model"]...)
	}
	seen = append(seen, segments(request.URL.Path)...)
	seen = append(seen, segments(path.Clean(request.URL.Path))...)
	response.Header().Set("Content-Type", "application/json")
	json.NewEncoder(response).Encode(map[string]any{"seen": seen})
}

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	panic(http.Serve(listener, http.HandlerFunc(read)))
}
