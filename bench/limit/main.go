// Command limit measures what a limit on size costs: GETs and SETs of 64 callers without
// one, with one that all entries are well below, and with one that they fill; and how a
// load of SetMany keeps one.
//
//	cd bench && go run ./limit
//
// It runs on a throwaway PostgreSQL (FASTPGCACHE_TEST_BINDIR picks another one) and prints
// Markdown tables. The three take turns: medians count.
package main

import (
	"context"
	"database/sql"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
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
	duration = flag.Duration("duration", 2*time.Second, "of each turn")
	rounds   = flag.Int("rounds", 5, "turns of each")
	load     = flag.Duration("load", 20*time.Second, "how long SetMany runs; 0: not at all")
	most     = flag.Int64("most", 64<<20, "the limit for it")
)

const (
	keys    = 50_000
	callers = 64
)

var value = strings.Repeat("v", 100)

func main() {
	flag.Parse()
	program.Main(run)
}

func run(ctx context.Context) error { return program.WithServer(ctx, pgtest.Config{}, measure) }

func measure(ctx context.Context, server *pgtest.Server, db *sql.DB) error {
	dsn := server.DSN("postgres")
	if err := cost(ctx, dsn, db); err != nil || *load == 0 {
		return err
	}
	return holds(ctx, dsn, db)
}

// cost compares operations by users that differ in their limit only.
func cost(ctx context.Context, dsn string, db *sql.DB) error {
	const taken = keys * (100 + 8 + 128)
	users := []string{"none", "roomy", "full"}
	caches := map[string]*fastpgcache.Cache{}
	for user, limit := range map[string]int64{"none": 0, "roomy": 10 * taken, "full": taken * 101 / 100} {
		if limit > 0 {
			if _, err := db.ExecContext(ctx, `INSERT INTO cache_limit VALUES ($1, $2)`, user, limit); err != nil {
				return err
			}
		}
		c, err := fastpgcache.Open(dsn, fastpgcache.Config{User: user})
		if err != nil {
			return err
		}
		defer c.Close()
		caches[user] = c
		if err := turn(ctx, c, "SET", keys); err.err != nil {
			return err.err
		}
	}
	fmt.Printf("| operation, %d callers | without | far from it | ratio | at it | ratio |\n|---|--:|--:|--:|--:|--:|\n", callers)
	for _, op := range []string{"GET", "SET"} {
		rates := map[string][]float64{}
		for range *rounds {
			for _, user := range users {
				r := turn(ctx, caches[user], op, 0)
				if r.err != nil {
					return r.err
				}
				rates[user] = append(rates[user], r.rate)
			}
		}
		median := func(user string) float64 {
			slices.Sort(rates[user])
			return rates[user][len(rates[user])/2]
		}
		none := median("none")
		fmt.Printf("| %s | %.0f | %.0f | %.2f | %.0f | %.2f |\n", op, none, median("roomy"), median("roomy")/none, median("full"), median("full")/none)
	}
	return nil
}

type result struct {
	rate float64
	err  error
}

// turn runs op for duration on random keys, or once on each of the first n.
func turn(ctx context.Context, c *fastpgcache.Cache, op string, n int64) result {
	var done, next atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, callers)
	begin := time.Now()
	for w := range callers {
		wg.Go(func() {
			for errs[w] == nil && (n > 0 || time.Since(begin) < *duration) {
				i := rand.Int64N(keys)
				if n > 0 {
					if i = next.Add(1) - 1; i >= n {
						return
					}
				}
				key := "key" + strconv.FormatInt(10_000+i, 10)
				if op == "GET" {
					var v string
					_, errs[w] = c.Get(ctx, key, &v)
				} else {
					errs[w] = c.Set(ctx, key, value, 0)
				}
				done.Add(1)
			}
		})
	}
	wg.Wait()
	return result{float64(done.Load()) / time.Since(begin).Seconds(), errors.Join(errs...)}
}

// holds writes new entries by SetMany, and watches what they take.
func holds(ctx context.Context, dsn string, db *sql.DB) error {
	if _, err := db.ExecContext(ctx, `INSERT INTO cache_limit VALUES ('load', $1)`, *most); err != nil {
		return err
	}
	c, err := fastpgcache.Open(dsn, fastpgcache.Config{User: "load"})
	if err != nil {
		return err
	}
	defer c.Close()
	var wg sync.WaitGroup
	errs := make([]error, 4)
	until := time.Now().Add(*load)
	for w := range errs {
		wg.Go(func() {
			for n := 0; errs[w] == nil && time.Now().Before(until); n++ {
				items := make(map[string]any, 500)
				for i := range 500 {
					items[fmt.Sprintf("%d:%d:%d", w, n, i)] = value
				}
				errs[w] = c.SetMany(ctx, items, time.Hour)
			}
		})
	}
	takes := func() (bytes int64, err error) {
		return bytes, db.QueryRowContext(ctx, `SELECT coalesce(sum(octet_length(key) + pg_column_size(value) + 128), 0) FROM cache WHERE user_id = 'load'`).Scan(&bytes)
	}
	var peak int64
	var over, worst time.Duration
	for last := time.Now(); last.Before(until); time.Sleep(100 * time.Millisecond) {
		bytes, err := takes()
		if err != nil {
			return err
		}
		now := time.Now()
		if peak = max(peak, bytes); bytes > *most*3/2 {
			over += now.Sub(last)
			worst = max(worst, over)
		} else {
			over = 0
		}
		last = now
	}
	wg.Wait()
	s := c.Stats()
	time.Sleep(10 * time.Second)
	rest, err := takes()
	fmt.Printf("\nSetMany, 4 callers, %v, a limit of %d MiB: %.0f entries a second, at most %.2f × the limit, over 1.5 × for %v at a time, 10 s later %.2f ×\n",
		*load, *most>>20, float64(s.Sets)/load.Seconds(), float64(peak)/float64(*most), worst.Round(time.Millisecond), float64(rest)/float64(*most))
	return errors.Join(append(errs, err)...)
}
