package main

import (
	"context"
	"database/sql"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
	"github.com/fastpgcache/fastpgcache/metrics/prommetrics"
)

// work begins to work two caches, as two processes of a shop would, on a throwaway PostgreSQL:
// 20 callers, five times as many for 30 s of each minute, and a few mistakes.
func work(ctx context.Context, registry *prometheus.Registry) (stop func(), err error) {
	server, err := pgtest.Start(ctx, pgtest.Config{})
	if err != nil {
		return nil, err
	}
	db, err := sql.Open("postgres", server.DSN("postgres"))
	if err != nil {
		return nil, err
	}
	defer db.Close()
	if err := fastpgcache.Setup(ctx, db, fastpgcache.SetupConfig{MaxBytes: 4 << 20}); err != nil {
		return nil, err
	}
	if _, err := db.ExecContext(ctx, `CREATE ROLE shop LOGIN`); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	stop = func() {
		cancel()
		wg.Wait()
		server.Stop()
	}
	for process := range 2 {
		cache, err := fastpgcache.Open(server.DSN("postgres", "user=shop"), fastpgcache.Config{
			MaxStaleness: 100 * time.Millisecond, LocalBytes: 2 << 20, CleanupInterval: 10 * time.Second})
		if err != nil {
			stop()
			return nil, err
		}
		registry.MustRegister(prommetrics.NewCollector(cache, prometheus.Labels{"process": fmt.Sprint(process)}))
		for caller := range 50 {
			wg.Go(func() { calls(ctx, cache, caller) })
		}
	}
	return stop, nil
}

// calls is what one caller does until ctx ends.
func calls(ctx context.Context, cache *fastpgcache.Cache, caller int) {
	start := time.Now()
	products := rand.NewZipf(rand.New(rand.NewPCG(uint64(caller), 1)), 1.1, 10, 50_000)
	load := func(context.Context) (any, error) { return strings.Repeat("x", 200), nil }
	for ctx.Err() == nil {
		if crowd := int(time.Since(start)/(30*time.Second))%2 == 1; !crowd && caller >= 10 {
			time.Sleep(100 * time.Millisecond)
			continue
		}
		key := fmt.Sprint("product:", products.Uint64())
		switch n := rand.IntN(1000); {
		case n < 800:
			cache.GetOrSet(ctx, key, nil, 40*time.Second, load)
		case n < 930:
			cache.Get(ctx, "gone:"+key, nil)
		case n < 970:
			cache.Set(ctx, key, n, 40*time.Second)
		case n < 999:
			cache.Delete(ctx, key)
		case rand.IntN(20) == 0:
			cache.Get(ctx, "", nil) // a mistake
		}
		time.Sleep(time.Duration(rand.IntN(10)) * time.Millisecond)
	}
}
