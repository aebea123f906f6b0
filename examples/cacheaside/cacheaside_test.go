package cacheaside

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/fastpgcache/fastpgcache/cachetest"
)

func TestProductsAreLoadedOnceAndFreshAfterAChange(t *testing.T) {
	cache := cachetest.New(t)
	db := cache.DB()
	if _, err := db.Exec(`CREATE TABLE products (id text PRIMARY KEY, name text NOT NULL, cents bigint NOT NULL);
		INSERT INTO products VALUES ('tea', 'Darjeeling', 350)`); err != nil {
		t.Fatal(err)
	}
	shop := Shop{db, cache}
	mux := http.NewServeMux()
	mux.Handle("GET /products/{id}", shop)
	want := func(path string, code int, body string) {
		t.Helper()
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		if got := strings.TrimSpace(w.Body.String()); w.Code != code || got != body {
			t.Errorf("%s: got %d %q, want %d %q", path, w.Code, got, code, body)
		}
	}
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() { want("/products/tea", http.StatusOK, `{"name":"Darjeeling","cents":350}`) })
	}
	wg.Wait()
	if got := cache.Stats().Loads; got != 1 {
		t.Errorf("got %d loads, want 1", got)
	}
	if err := shop.SetPrice(t.Context(), "tea", 400); err != nil {
		t.Fatal(err)
	}
	want("/products/tea", http.StatusOK, `{"name":"Darjeeling","cents":400}`)
	want("/products/coffee", http.StatusNotFound, "404 page not found")
}
