package scsstore

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/alexedwards/scs/v2"

	"github.com/fastpgcache/fastpgcache/cachetest"
)

func TestSessionsOfScsLiveInTheCache(t *testing.T) {
	cache := cachetest.New(t)
	sessions := scs.New()
	sessions.Store = Store{cache}
	mux := http.NewServeMux()
	mux.HandleFunc("/count", func(w http.ResponseWriter, r *http.Request) {
		n := sessions.GetInt(r.Context(), "n") + 1
		sessions.Put(r.Context(), "n", n)
		fmt.Fprint(w, n)
	})
	mux.HandleFunc("/end", func(w http.ResponseWriter, r *http.Request) {
		if err := sessions.Destroy(r.Context()); err != nil {
			t.Error(err)
		}
	})
	server := httptest.NewServer(sessions.LoadAndSave(mux))
	defer server.Close()
	client := server.Client()
	client.Jar, _ = cookiejar.New(nil)
	want := func(path, want string) {
		t.Helper()
		response, err := client.Get(server.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		if got, err := io.ReadAll(response.Body); err != nil || string(got) != want {
			t.Errorf("%s: got %q, %v, want %q", path, got, err, want)
		}
	}
	live := func() int {
		n := 0
		if err := sessions.Iterate(t.Context(), func(context.Context) error { n++; return nil }); err != nil {
			t.Error(err)
		}
		return n
	}
	want("/count", "1")
	want("/count", "2")
	if got := live(); got != 1 {
		t.Errorf("got %d sessions, want 1", got)
	}
	want("/end", "")
	if got := live(); got != 0 {
		t.Errorf("got %d sessions, want none", got)
	}
	want("/count", "1")

	// A session that has expired is no session.
	store := Store{cache}
	if err := store.Commit("token", []byte("b"), time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if err := store.Commit("token", []byte("b"), time.Now()); err != nil {
		t.Fatal(err)
	}
	if b, found, err := store.Find("token"); err != nil || found {
		t.Errorf("got %q, %t, %v, want nothing", b, found, err)
	}
}
