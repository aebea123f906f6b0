// Package ratelimit limits how often a client may call in a window of time, counted
// together by every process of a service.
package ratelimit

import (
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

// Limit passes at most n requests of an address in each window to next. The first
// request opens the window: Increment sets a TTL only when it creates.
func Limit(cache *fastpgcache.Cache, n int64, window time.Duration, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, err := net.SplitHostPort(r.RemoteAddr)
		if err != nil {
			host = r.RemoteAddr
		}
		key := "rate/" + host
		calls, err := cache.Increment(r.Context(), key, 1, window)
		if err == nil && calls > n {
			if left, found, err := cache.TTL(r.Context(), key); err == nil && found {
				w.Header().Set("Retry-After", strconv.Itoa(int(left/time.Second)+1))
			}
			http.Error(w, "too many requests", http.StatusTooManyRequests)
			return
		}
		// Where the cache fails, the service goes on without a limit.
		next.ServeHTTP(w, r)
	})
}
