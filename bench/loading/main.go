// Loading measures what loading costs beside the plain operations: GetOrRefresh of
// fresh and of stale entries against Get under a crowd, GetOrSetMany against as many
// GetOrSets, and how often any form gives what was deleted before it was called. What is
// compared runs in turn, in short blocks on the same server, so that what else the
// machine does falls on all of it; the medians of the blocks are compared.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/bench/internal/program"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

var (
	callers = flag.Int("callers", 64, "how many at once")
	keys    = flag.Int("keys", 1000, "how many keys they ask for")
	blocks  = flag.Int("blocks", 15, "how many blocks of each")
	block   = flag.Duration("block", time.Second, "how long a block is: in a short one, p99 is how long the first calls take")
	deletes = flag.Int("deletes", 10_000, "how many deletes each form sees")
)

func main() {
	flag.Parse()
	program.Main(run)
}

func run(ctx context.Context) error {
	server, err := pgtest.Start(ctx, pgtest.Config{})
	if err != nil {
		return err
	}
	defer server.Stop()
	c, err := fastpgcache.Open(server.DSN("postgres"), fastpgcache.Config{OnError: func(err error) { log.Print(err) }})
	if err != nil {
		return err
	}
	defer c.Close()
	if err := fastpgcache.Setup(ctx, c.DB(), fastpgcache.SetupConfig{}); err != nil {
		return err
	}
	out := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	defer out.Flush()
	for _, part := range []func(context.Context, *tabwriter.Writer, *fastpgcache.Cache) error{refresh, many, stale} {
		if err := part(ctx, out, c); err != nil {
			return err
		}
		fmt.Fprintln(out)
		out.Flush()
	}
	return ctx.Err()
}

func median[T int | float64 | time.Duration](all []T) T {
	slices.Sort(all)
	return all[len(all)/2]
}

// refresh compares Get with GetOrRefresh of entries that are fresh, and of entries that
// are always stale, so that loads of 200 ms go on all the time; the latter also with Get
// while others' calls have the same loads go on.
func refresh(ctx context.Context, out *tabwriter.Writer, c *fastpgcache.Cache) error {
	items := map[string]any{}
	for i := range *keys {
		items[fmt.Sprint("key:", i)] = "a value of some size, a value of some size, a value of some size, a value of some size, a value"
	}
	if err := c.SetMany(ctx, items, time.Hour); err != nil {
		return err
	}
	load := func(ctx context.Context) (any, error) {
		time.Sleep(200 * time.Millisecond)
		return items["key:0"], nil
	}
	const hot = 8 // keys that are stale
	get := func(i, of int) error {
		var v string
		_, err := c.Get(ctx, fmt.Sprint("key:", i%of), &v)
		return err
	}
	stale := func(i int) error {
		var v string
		return c.GetOrRefresh(ctx, fmt.Sprint("key:", i%hot), &v, time.Microsecond, time.Hour, load)
	}
	forms := []struct {
		name   string
		base   int // the form that it is compared with
		beside bool
		get    func(i int) error
	}{
		{"Get", 0, false, func(i int) error { return get(i, *keys) }},
		{"GetOrRefresh, fresh", 0, false, func(i int) error {
			var v string
			return c.GetOrRefresh(ctx, fmt.Sprint("key:", i%*keys), &v, 30*time.Minute, time.Hour, load)
		}},
		{"Get, of the hot ones", 2, false, func(i int) error { return get(i, hot) }},
		{"the same beside loads", 2, true, func(i int) error { return get(i, hot) }},
		{"GetOrRefresh, stale", 3, false, stale},
	}
	rates, p50, p99 := make([][]float64, len(forms)), make([][]time.Duration, len(forms)), make([][]time.Duration, len(forms))
	loads := make([]int64, len(forms))
	for range *blocks {
		for f, form := range forms {
			before := c.Stats().Loads
			others, cancel := context.WithCancel(ctx)
			var loading sync.WaitGroup
			for i := range hot {
				loading.Go(func() {
					for form.beside && others.Err() == nil {
						stale(i) // and again when that load has ended
						time.Sleep(201 * time.Millisecond)
					}
				})
			}
			took, err := crowd(form.get)
			cancel()
			loading.Wait()
			if err != nil {
				return err
			}
			slices.Sort(took)
			rates[f] = append(rates[f], float64(len(took))/block.Seconds())
			p50[f] = append(p50[f], took[len(took)/2])
			p99[f] = append(p99[f], took[len(took)*99/100])
			loads[f] += c.Stats().Loads - before
			time.Sleep(250 * time.Millisecond) // until the loads of the block have ended
		}
	}
	fmt.Fprintf(out, "%d callers\tops/s\tcost\tp50\tp99\tp99 ratio\tloads\t\n", *callers)
	for f, form := range forms {
		base := form.base
		fmt.Fprintf(out, "%s\t%.0f\t%.3f\t%v\t%v\t%.2f\t%d\t\n", form.name, median(rates[f]), median(rates[base])/median(rates[f]),
			median(p50[f]).Round(time.Microsecond), median(p99[f]).Round(time.Microsecond),
			float64(median(p99[f]))/float64(median(p99[base])), loads[f])
	}
	return nil
}

// crowd has all callers call get for a block, and returns how long each call took.
func crowd(get func(i int) error) ([]time.Duration, error) {
	var mu sync.Mutex
	var all []time.Duration
	var failure error
	var wg sync.WaitGroup
	end := time.Now().Add(*block)
	for caller := range *callers {
		wg.Go(func() {
			var took []time.Duration
			var err error
			for i := caller * 7; err == nil; i += 13 {
				start := time.Now()
				if start.After(end) {
					break
				}
				err = get(i)
				took = append(took, time.Since(start))
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, took...)
			if err != nil {
				failure = err
			}
		})
	}
	wg.Wait()
	return all, failure
}

// many compares GetOrSetMany of 100 missing keys with 100 GetOrSets, one after the other
// and all at once. The source behind them takes 1 ms a query, or no time.
func many(ctx context.Context, out *tabwriter.Writer, c *fastpgcache.Cache) error {
	const n = 100
	fmt.Fprintf(out, "%d missing keys\tGetOrSetMany\t%d GetOrSets\tratio\tat once\tratio\t\n", n, n)
	var run int
	for _, query := range []time.Duration{0, time.Millisecond} {
		one := func(key string) error {
			return c.GetOrSet(ctx, key, nil, time.Hour, func(context.Context) (any, error) {
				time.Sleep(query)
				return "value of " + key, nil
			})
		}
		ways := []func(keys []string) error{
			func(keys []string) error {
				_, err := c.GetOrSetMany(ctx, keys, time.Hour, func(_ context.Context, missing []string) (map[string]any, error) {
					time.Sleep(query)
					loaded := make(map[string]any, len(missing))
					for _, key := range missing {
						loaded[key] = "value of " + key
					}
					return loaded, nil
				})
				return err
			},
			func(keys []string) error {
				for _, key := range keys {
					if err := one(key); err != nil {
						return err
					}
				}
				return nil
			},
			func(keys []string) error {
				errs := make(chan error, len(keys))
				for _, key := range keys {
					go func() { errs <- one(key) }()
				}
				var err error
				for range keys {
					if e := <-errs; e != nil {
						err = e
					}
				}
				return err
			},
		}
		took := make([][]time.Duration, len(ways))
		for range *blocks {
			for w, way := range ways {
				run++
				keys := make([]string, n)
				for i := range keys {
					keys[i] = fmt.Sprint("missing:", run, ":", i)
				}
				start := time.Now()
				if err := way(keys); err != nil {
					return err
				}
				took[w] = append(took[w], time.Since(start))
			}
		}
		base := median(took[0])
		fmt.Fprintf(out, "a query takes %v\t%v\t%v\t%.1f\t%v\t%.1f\t\n", query, base.Round(time.Microsecond),
			median(took[1]).Round(time.Microsecond), float64(median(took[1]))/float64(base),
			median(took[2]).Round(time.Microsecond), float64(median(took[2]))/float64(base))
	}
	return nil
}

// stale counts the callers who get what was there before a delete that had returned.
func stale(ctx context.Context, out *tabwriter.Writer, c *fastpgcache.Cache) error {
	fmt.Fprintf(out, "%d callers on 8 keys\tdeletes\tcalls\tloads\tstale answers\t\n", *callers)
	typed := fastpgcache.NewTyped[int64](c, "typed:")
	for _, form := range []struct {
		name, prefix string
		get          func(key string, load func() int64) (int64, error)
	}{
		{"GetOrSet", "", func(key string, load func() int64) (got int64, err error) {
			err = c.GetOrSet(ctx, key, &got, time.Hour, func(context.Context) (any, error) { return load(), nil })
			return got, err
		}},
		{"GetOrRefresh", "", func(key string, load func() int64) (got int64, err error) {
			err = c.GetOrRefresh(ctx, key, &got, time.Microsecond, time.Hour, func(context.Context) (any, error) { return load(), nil })
			return got, err
		}},
		{"GetOrSetMany", "", func(key string, load func() int64) (got int64, err error) {
			values, err := c.GetOrSetMany(ctx, []string{key}, time.Hour, func(context.Context, []string) (map[string]any, error) {
				return map[string]any{key: load()}, nil
			})
			if err == nil {
				err = values[key].Decode(&got)
			}
			return got, err
		}},
		{"Typed.GetOrSet", "typed:", func(key string, load func() int64) (int64, error) {
			return typed.GetOrSet(ctx, key, time.Hour, func(context.Context) (int64, error) { return load(), nil })
		}},
	} {
		const hot = 8
		var source, deleted [hot]atomic.Int64
		var calls, wrong, failed atomic.Int64
		read := func(k int) {
			want := deleted[k].Load()
			got, err := form.get(fmt.Sprint(form.name, k), source[k].Load)
			calls.Add(1)
			if err != nil {
				failed.Add(1)
			} else if got < want {
				wrong.Add(1)
			}
		}
		before := c.Stats().Loads
		var writing, reading sync.WaitGroup
		var done atomic.Bool
		for i := range *callers - hot {
			reading.Go(func() {
				for n := i; !done.Load() && ctx.Err() == nil; n++ {
					read(n % hot)
				}
			})
		}
		for k := range hot {
			writing.Go(func() {
				for range *deletes / hot {
					version := source[k].Add(1)
					if _, err := c.Delete(ctx, form.prefix+fmt.Sprint(form.name, k)); err != nil {
						failed.Add(1)
						return
					}
					deleted[k].Store(version)
					read(k)
				}
			})
		}
		writing.Wait()
		done.Store(true)
		reading.Wait()
		if n := failed.Load(); n > 0 {
			return fmt.Errorf("%s: %d calls failed", form.name, n)
		}
		fmt.Fprintf(out, "%s\t%d\t%d\t%d\t%d\t\n", form.name, *deletes/hot*hot, calls.Load(), c.Stats().Loads-before, wrong.Load())
	}
	return nil
}
