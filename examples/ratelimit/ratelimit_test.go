package ratelimit

import (
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache/cachetest"
)

func TestLimitLetsSoManyThroughAndNoMore(t *testing.T) {
	cache := cachetest.New(t)
	handler := Limit(cache, 10, time.Minute, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {}))
	var passed atomic.Int64
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
			switch w.Code {
			case http.StatusOK:
				passed.Add(1)
			case http.StatusTooManyRequests:
				if w.Header().Get("Retry-After") == "" {
					t.Error("no Retry-After")
				}
			}
		})
	}
	wg.Wait()
	if got := passed.Load(); got != 10 {
		t.Errorf("%d requests passed, want 10", got)
	}
	other := httptest.NewRequest("GET", "/", nil)
	other.RemoteAddr = "198.51.100.7:1234"
	w := httptest.NewRecorder()
	if handler.ServeHTTP(w, other); w.Code != http.StatusOK {
		t.Errorf("another address got %d", w.Code)
	}
}
