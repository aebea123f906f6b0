package main

import (
	"context"
	"database/sql"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/bench/internal/program"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// entryBytes is what an entry takes, as the cache counts it.
const (
	keyBytes   = 16
	valueBytes = 100
	entryBytes = keyBytes + valueBytes + 128
	batch      = 20 // keys looked up at once, and those missing stored at once
)

// compareReal replays on a cache with a limit, and then, as fast as that went, in memory.
func compareReal(ctx context.Context, trace []uint64, d int) error {
	return program.WithServer(ctx, pgtest.Config{}, func(ctx context.Context, _ *pgtest.Server, db *sql.DB) error {
		return replayAll(ctx, db, trace, d)
	})
}

func replayAll(ctx context.Context, db *sql.DB, trace []uint64, d int) error {
	fmt.Println("| entries | FIFO | LRU | in memory | PostgreSQL | difference | accesses/s | keys told per 100 accesses | statements for them, of all |")
	fmt.Println("|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
	for _, percent := range []int{5, 20} {
		capacity := d * percent / 100
		hits, rate, told, share, err := replayReal(ctx, db, capacity, trace)
		if err != nil {
			return err
		}
		simulated := replay(newRule(limitFor(capacity), 2, int(rate/4)+1), trace)
		fmt.Printf("| %d %% | %.2f %% | %.2f %% | %.2f %% | %.2f %% | %+.2f | %.0f | %.1f | %.2f %% |\n", percent, replay(newList("FIFO", capacity), trace),
			replay(newList("LRU", capacity), trace), simulated, hits, hits-simulated, rate, told, share)
	}
	return nil
}

func replayReal(ctx context.Context, db *sql.DB, capacity int, trace []uint64) (hits, rate, told, share float64, err error) {
	if err := fastpgcache.Setup(ctx, db, fastpgcache.SetupConfig{Force: true, MaxBytes: int64(limitFor(capacity) * entryBytes)}); err != nil {
		return 0, 0, 0, 0, err
	}
	var failure error
	cache, err := fastpgcache.New(db, fastpgcache.Config{OnError: func(err error) { failure = err }})
	if err != nil {
		return 0, 0, 0, 0, err
	}
	defer cache.Close()
	for known := time.Now().Add(4 * time.Second); time.Now().Before(known); { // until it has heard of the limit
		if _, err := cache.Get(ctx, "none", nil); err != nil {
			return 0, 0, 0, 0, err
		}
		time.Sleep(10 * time.Millisecond)
	}
	value := strings.Repeat("v", valueBytes)
	found, before, begin := 0, cache.Stats(), time.Now()
	operations := 0
	for rest := trace; len(rest) > 0; {
		part := rest[:min(batch, len(rest))]
		rest = rest[len(part):]
		keys := make([]string, len(part))
		for i, key := range part {
			keys[i] = fmt.Sprintf("%0*s", keyBytes, strconv.FormatUint(key, 36))
		}
		there, err := cache.GetMany(ctx, keys)
		if err != nil {
			return 0, 0, 0, 0, err
		}
		operations++
		missing := map[string]any{}
		for _, key := range keys {
			if _, ok := there[key]; ok || missing[key] != nil { // the second of a batch is a hit
				found++
			} else {
				missing[key] = value
			}
		}
		if len(missing) > 0 {
			operations++
			if err := cache.SetMany(ctx, missing, 0); err != nil {
				return 0, 0, 0, 0, err
			}
		}
	}
	took, after := time.Since(begin), cache.Stats()
	statements := after.Statements - before.Statements
	ours := int64(after.Hits+after.Misses+after.Sets) - (before.Hits + before.Misses + before.Sets)
	return 100 * float64(found) / float64(len(trace)), float64(len(trace)) / took.Seconds(),
		100 * float64(after.Keys-before.Keys-ours) / float64(len(trace)), 100 * float64(statements-int64(operations)) / float64(statements), failure
}
