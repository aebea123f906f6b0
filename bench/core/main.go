// Core measures what one caller pays for Get over the same SELECT on a *sql.Stmt
// prepared by hand. The two run in turn, in small blocks on the same server, so
// that what else the machine does falls on both; the medians of the blocks are
// compared.
package main

import (
	"bytes"
	"context"
	"database/sql"
	"flag"
	"fmt"
	"os"
	"runtime"
	"slices"
	"text/tabwriter"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib"
	_ "github.com/lib/pq"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/bench/internal/program"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

const selectSQL = `
SELECT value, value_bytes FROM public.cache
WHERE user_id = current_user AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp())
LIMIT 1`

func main() {
	blocks := flag.Int("blocks", 200, "how many blocks of each")
	size := flag.Int("size", 100, "calls in a block")
	flag.Parse()
	program.Main(func(ctx context.Context) error { return run(ctx, *blocks, *size) })
}

func run(ctx context.Context, blocks, size int) error {
	server, err := pgtest.Start(ctx, pgtest.Config{})
	if err != nil {
		return err
	}
	defer server.Stop()

	out := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(out, "driver\tvalue\tby hand\tGet\tratio\tallocs by hand\tGet\tmore\t")
	for _, driver := range []struct{ name, options string }{
		{"postgres", "binary_parameters=yes"}, // as Open sets it
		{"pgx", ""},
	} {
		db, err := sql.Open(driver.name, server.DSN("postgres", driver.options))
		if err != nil {
			return err
		}
		defer db.Close()
		db.SetMaxIdleConns(10)
		for _, bytes := range []int{100, 10_000} {
			if err := compare(ctx, out, db, driver.name, bytes, blocks, size); err != nil {
				return fmt.Errorf("%s: %w", driver.name, err)
			}
		}
	}
	return out.Flush()
}

// compare prints one line.
func compare(ctx context.Context, out *tabwriter.Writer, db *sql.DB, driver string, bytesPerValue, blocks, size int) error {
	if err := fastpgcache.Setup(ctx, db, fastpgcache.SetupConfig{Force: true}); err != nil {
		return err
	}
	cache, err := fastpgcache.New(db, fastpgcache.Config{})
	if err != nil {
		return err
	}
	defer cache.Close()
	stmt, err := db.PrepareContext(ctx, selectSQL)
	if err != nil {
		return err
	}
	defer stmt.Close()
	keys := make([]string, 1000)
	for i := range keys {
		keys[i] = fmt.Sprintf("key:%d", i)
		if err := cache.Set(ctx, keys[i], bytes.Repeat([]byte("v"), bytesPerValue), time.Hour); err != nil {
			return err
		}
	}
	if _, err := db.ExecContext(ctx, "VACUUM ANALYZE cache"); err != nil {
		return err
	}

	byHand := func(key string) error {
		var value, valueBytes []byte
		if err := stmt.QueryRowContext(ctx, key).Scan(&value, &valueBytes); err != nil {
			return err
		}
		if len(value) != bytesPerValue {
			return fmt.Errorf("%s: got %d bytes", key, len(value))
		}
		return nil
	}
	get := func(key string) error {
		var value []byte
		found, err := cache.Get(ctx, key, &value)
		if err != nil {
			return err
		}
		if !found || len(value) != bytesPerValue {
			return fmt.Errorf("%s: got %d bytes", key, len(value))
		}
		return nil
	}

	var next int
	var handTimes, getTimes []time.Duration
	var handAllocs, getAllocs []uint64
	block := func(call func(string) error, times *[]time.Duration, allocs *[]uint64) error {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		start := time.Now()
		for range size {
			next++
			if err := call(keys[next*7919%len(keys)]); err != nil {
				return err
			}
		}
		*times = append(*times, time.Since(start)/time.Duration(size))
		runtime.ReadMemStats(&after)
		*allocs = append(*allocs, (after.Mallocs-before.Mallocs)/uint64(size))
		return nil
	}
	for i := range blocks {
		first, second := func() error { return block(byHand, &handTimes, &handAllocs) }, func() error { return block(get, &getTimes, &getAllocs) }
		if i%2 == 1 {
			first, second = second, first
		}
		if err := first(); err != nil {
			return err
		}
		if err := second(); err != nil {
			return err
		}
	}
	hand, got := median(handTimes), median(getTimes)
	fmt.Fprintf(out, "%s\t%d B\t%.1f µs\t%.1f µs\t%.3f\t%d\t%d\t%+d\t\n", driver, bytesPerValue,
		float64(hand.Nanoseconds())/1e3, float64(got.Nanoseconds())/1e3, float64(got)/float64(hand),
		median(handAllocs), median(getAllocs), int64(median(getAllocs))-int64(median(handAllocs)))
	return nil
}

// median leaves the order of v changed.
func median[T time.Duration | uint64](v []T) T {
	slices.Sort(v)
	return v[len(v)/2]
}
