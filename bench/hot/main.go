// Command hot measures what refreshing entries does to the cache's table: the
// share of updates that are HOT, and how the table and its TOAST table grow.
//
//	go run ./hot -duration 60s
//
// It runs on a throwaway PostgreSQL (FASTPGCACHE_TEST_BINDIR picks another one)
// and prints a Markdown table.
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	mrand "math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/bench/internal/program"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

var (
	duration = flag.Duration("duration", time.Minute, "how long entries are refreshed for each row of the table")
	keys     = flag.Int("keys", 100_000, "how many entries there are")
	writers  = flag.Int("writers", 4, "how many goroutines refresh them")
	sizes    = flag.String("sizes", "100,1500,10000", "bytes of the values")
	fills    = flag.String("fillfactors", "100,90,80,70,60", "fillfactors to try")
	vacuum   = flag.String("settings", "", "further storage parameters to try, as ALTER TABLE … SET takes them; defaults to those of migrations.sql")
	resize   = flag.Float64("resize", 0, "by which share of its size a value varies")
	naptime  = flag.Duration("naptime", time.Minute, "autovacuum_naptime, PostgreSQL's own by default")
)

func main() {
	flag.Parse()
	program.Main(run)
}

func run(ctx context.Context) error {
	return program.WithServer(ctx, pgtest.Config{Settings: map[string]string{
		"autovacuum_naptime": strconv.FormatInt(max(1, int64(naptime.Seconds())), 10) + "s",
	}}, measureAll)
}

func measureAll(ctx context.Context, server *pgtest.Server, db *sql.DB) error {
	db.SetMaxIdleConns(*writers)

	fmt.Printf("PostgreSQL %d.%d, %d keys, %v each, %d writers, autovacuum_naptime %v %s\n\n", server.Version()/10000, server.Version()%10000,
		*keys, *duration, *writers, *naptime, *vacuum)
	fmt.Println("| value | fillfactor | refreshes/s | HOT | loaded | after | × | bytes a row with index, loaded | after | TOAST loaded | after | × | indexes × | autovacuums |")
	fmt.Println("|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
	for size := range strings.SplitSeq(*sizes, ",") {
		for fill := range strings.SplitSeq(*fills, ",") {
			bytes, err := strconv.Atoi(size)
			if err != nil {
				return err
			}
			if err := measure(ctx, db, bytes, fill); err != nil {
				return err
			}
		}
	}
	return nil
}

// measure fills a cache, refreshes it for a while, and prints a row of the table.
func measure(ctx context.Context, db *sql.DB, size int, fill string) error {
	if err := fastpgcache.Setup(ctx, db, fastpgcache.SetupConfig{Force: true}); err != nil {
		return err
	}
	settings := "fillfactor = " + fill
	if *vacuum != "" {
		settings += ", " + *vacuum
	}
	if _, err := db.ExecContext(ctx, `ALTER TABLE cache SET (`+settings+`)`); err != nil {
		return err
	}
	cache, err := fastpgcache.New(db, fastpgcache.Config{})
	if err != nil {
		return err
	}
	defer cache.Close()

	n := min(*keys, 1_000_000_000/size) // at most 1 GB
	var next, refreshed atomic.Int64
	each := func(ctx context.Context, work func(ctx context.Context, value []byte) (more bool, err error)) error {
		errs := make([]error, *writers)
		var wg sync.WaitGroup
		for w := range *writers {
			wg.Go(func() {
				raw := make([]byte, 2*size)
				rand.Read(raw)
				random := []byte(base64.StdEncoding.EncodeToString(raw)) // text that compresses little
				for more := true; more && errs[w] == nil; {
					vary := 1 + *resize*(2*mrand.Float64()-1)
					from := mrand.IntN(size/2 + 1)
					value := bytes.Clone(random[from : from+int(float64(size)*vary)])
					more, errs[w] = work(ctx, value)
				}
			})
		}
		wg.Wait()
		return errors.Join(errs...)
	}
	set := func(ctx context.Context, i int64, value []byte) error {
		ttl := time.Duration(1+mrand.IntN(3600)) * time.Second
		return cache.Set(ctx, "key:"+strconv.FormatInt(i, 10), value, time.Hour+ttl)
	}
	if err := each(ctx, func(ctx context.Context, value []byte) (bool, error) {
		i := next.Add(1)
		return i < int64(n), set(ctx, i, value)
	}); err != nil {
		return err
	}
	loaded, err := statistics(ctx, db)
	if err != nil {
		return err
	}
	until := time.Now().Add(*duration)
	if err := each(ctx, func(ctx context.Context, value []byte) (bool, error) {
		refreshed.Add(1)
		return time.Now().Before(until), set(ctx, 1+mrand.Int64N(int64(n)), value)
	}); err != nil {
		return err
	}
	time.Sleep(2 * time.Second) // the last statistics arrive with some delay
	after, err := statistics(ctx, db)
	if err != nil {
		return err
	}
	fmt.Printf("| %d B | %s | %.0f | %.1f %% | %s | %s | %.2f | %d | %d | %s | %s | %s | %.2f | %d |\n", size, fill, float64(refreshed.Load())/duration.Seconds(),
		100*float64(after.hot-loaded.hot)/float64(after.updates-loaded.updates), mb(loaded.heap), mb(after.heap), ratio(after.heap, loaded.heap),
		(loaded.heap+loaded.indexes)/int64(n), (after.heap+after.indexes)/int64(n), mb(loaded.toast), mb(after.toast), toastRatio(after.toast, loaded.toast), ratio(after.indexes, loaded.indexes), after.vacuums)
	return nil
}

type stats struct{ updates, hot, heap, toast, indexes, vacuums int64 }

func statistics(ctx context.Context, db *sql.DB) (s stats, err error) {
	err = db.QueryRowContext(ctx, `
		SELECT n_tup_upd, n_tup_hot_upd, pg_relation_size(c.oid), pg_total_relation_size(c.reltoastrelid), pg_indexes_size(c.oid), autovacuum_count
		FROM pg_stat_user_tables s JOIN pg_class c ON c.oid = s.relid WHERE s.relname = 'cache'`).
		Scan(&s.updates, &s.hot, &s.heap, &s.toast, &s.indexes, &s.vacuums)
	return s, err
}

func mb(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }

func ratio(a, b int64) float64 { return float64(a) / float64(b) }

func toastRatio(after, loaded int64) string {
	if loaded < 1e6 {
		return "–"
	}
	return fmt.Sprintf("%.2f", ratio(after, loaded))
}
