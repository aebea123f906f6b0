package sessions

import (
	"fmt"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"testing"

	"github.com/fastpgcache/fastpgcache/cachetest"
)

func TestASessionLastsFromLoginToLogout(t *testing.T) {
	cache := cachetest.New(t)
	store := Store{cache}
	check := func(w http.ResponseWriter, err error) {
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/login", func(w http.ResponseWriter, r *http.Request) {
		check(w, store.Start(r.Context(), w, Session{User: "ada", Cart: []string{"tea"}}))
	})
	mux.HandleFunc("/logout", func(w http.ResponseWriter, r *http.Request) { check(w, store.End(w, r)) })
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		session, found, err := store.Session(r)
		check(w, err)
		fmt.Fprintf(w, "%t %s %v", found, session.User, session.Cart)
	})
	server := httptest.NewTLSServer(mux)
	defer server.Close()
	client := server.Client()
	client.Jar, _ = cookiejar.New(nil)
	for _, step := range []struct{ path, want string }{
		{"/", "false  []"}, {"/login", ""}, {"/", "true ada [tea]"}, {"/logout", ""}, {"/", "false  []"},
	} {
		response, err := client.Get(server.URL + step.path)
		if err != nil {
			t.Fatal(err)
		}
		var body [100]byte
		n, _ := response.Body.Read(body[:])
		response.Body.Close()
		if got := string(body[:n]); response.StatusCode != http.StatusOK || got != step.want {
			t.Errorf("%s: got %d %q, want %q", step.path, response.StatusCode, got, step.want)
		}
	}
}
