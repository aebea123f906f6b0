// Command unlogged measures what UNLOGGED is worth: SET and GET by 8 callers on the
// cache's table and on a logged copy of the same shape, in turn, on a PostgreSQL
// whose durability is as installed.
package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	_ "github.com/lib/pq"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/bench/internal/program"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

const (
	keys    = 20_000
	callers = 8
)

func main() {
	rounds := flag.Int("rounds", 5, "rounds")
	length := flag.Duration("length", time.Second, "length of one measurement")
	flag.Parse()
	program.Main(func(ctx context.Context) error { return run(ctx, *rounds, *length) })
}

func run(ctx context.Context, rounds int, length time.Duration) error {
	pg, err := pgtest.Start(ctx, pgtest.Config{Durable: true})
	if err != nil {
		return err
	}
	defer pg.Stop()
	caches := map[string]*fastpgcache.Cache{}
	for _, table := range []string{"unlogged", "logged"} {
		cache, err := fastpgcache.Open(pg.DSN("postgres"), fastpgcache.Config{Schema: table, DisableCoalescing: true})
		if err != nil {
			return err
		}
		defer cache.Close()
		if err := fastpgcache.Setup(ctx, cache.DB(), fastpgcache.SetupConfig{Schema: table}); err != nil {
			return err
		}
		caches[table] = cache
	}
	if _, err := caches["logged"].DB().Exec(`ALTER TABLE logged.cache SET LOGGED`); err != nil {
		return err
	}
	value := strings.Repeat("x", 100)
	items := map[string]any{}
	for i := range keys {
		items[strconv.Itoa(i)] = value
	}
	for _, cache := range caches {
		if err := cache.SetMany(ctx, items, time.Hour); err != nil {
			return err
		}
	}
	type measured struct {
		perSecond      float64
		mean, p95, p99 time.Duration
	}
	all := map[string][]measured{}
	for range rounds {
		for _, op := range []string{"SET", "GET"} {
			for table, cache := range caches {
				var mu sync.Mutex
				var took []time.Duration
				var failed error
				begin := time.Now()
				var wg sync.WaitGroup
				for range callers {
					wg.Go(func() {
						var mine []time.Duration
						for time.Since(begin) < length {
							key := strconv.Itoa(rand.IntN(keys))
							start := time.Now()
							var err error
							if op == "SET" {
								err = cache.Set(ctx, key, value, time.Hour)
							} else {
								_, err = cache.Get(ctx, key, new(string))
							}
							mine = append(mine, time.Since(start))
							if err != nil {
								mu.Lock()
								failed = err
								mu.Unlock()
								return
							}
						}
						mu.Lock()
						took = append(took, mine...)
						mu.Unlock()
					})
				}
				wg.Wait()
				if failed != nil {
					return failed
				}
				var sum time.Duration
				for _, d := range took {
					sum += d
				}
				slices.Sort(took)
				all[op+" "+table] = append(all[op+" "+table], measured{float64(len(took)) / time.Since(begin).Seconds(),
					sum / time.Duration(len(took)), took[len(took)*95/100], took[len(took)*99/100]})
			}
		}
	}
	fmt.Printf("%d rounds, medians; %d callers, 100-byte values.\n\n| | table | ops/s | × logged | mean | p95 | p99 |\n|---|---|---|---|---|---|---|\n", rounds, callers)
	for _, op := range []string{"SET", "GET"} {
		for _, table := range []string{"unlogged", "logged"} {
			ratios := make([]float64, rounds)
			for i := range ratios {
				ratios[i] = all[op+" "+table][i].perSecond / all[op+" logged"][i].perSecond
			}
			slices.Sort(ratios)
			m := slices.Clone(all[op+" "+table])
			slices.SortFunc(m, func(a, b measured) int { return int(a.perSecond - b.perSecond) })
			mid := m[rounds/2]
			fmt.Printf("| %s | %s | %.0f | %.2f | %v | %v | %v |\n", op, table, mid.perSecond, ratios[rounds/2],
				mid.mean.Round(time.Microsecond), mid.p95.Round(time.Microsecond), mid.p99.Round(time.Microsecond))
		}
	}
	return nil
}
