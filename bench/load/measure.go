package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// setting is one thing measured.
type setting struct {
	op      string
	callers int
	size    int
}

// sample is one measurement of a system in a setting.
type sample struct {
	perSecond      float64
	mean, p50, p99 time.Duration
	client, server float64 // CPUs kept busy
	allocs         float64 // per operation
}

// samples of each system, by round.
type samples map[setting]map[string][]sample

func measureAll(ctx context.Context, p plan) (samples, error) {
	s, err := startServers(ctx)
	if err != nil {
		return nil, err
	}
	defer s.stop()
	results := samples{}
	for _, size := range p.sizes {
		value := strings.Repeat("x", size)
		if err := s.fill(ctx, p, value); err != nil {
			return nil, err
		}
		for _, op := range p.ops {
			for _, callers := range p.callers {
				set := setting{op, callers, size}
				results[set] = map[string][]sample{}
				for round := range p.rounds {
					for i := range p.systems {
						name := p.systems[(i+round)%len(p.systems)]
						one, err := measure(ctx, s, p, set, name, value)
						if err != nil {
							return nil, fmt.Errorf("%s, %+v: %w", name, set, err)
						}
						results[set][name] = append(results[set][name], one)
					}
				}
				fmt.Fprintf(os.Stderr, "measured %+v\n", set)
			}
		}
	}
	return results, nil
}

func measure(ctx context.Context, s *servers, p plan, set setting, name, value string) (sample, error) {
	sys, err := s.open(ctx, name)
	if err != nil {
		return sample{}, err
	}
	defer sys.close()
	if _, _, err := load(ctx, sys, p, set, value, p.length/4); err != nil { // connects and warms up
		return sample{}, err
	}
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	client, server, start := ownCPU(), sys.server(), time.Now()
	took, n, err := load(ctx, sys, p, set, value, p.length)
	if err != nil {
		return sample{}, err
	}
	wall := time.Since(start)
	out := sample{
		perSecond: float64(n) / wall.Seconds(),
		client:    float64(ownCPU()-client) / float64(wall),
		server:    float64(sys.server()-server) / float64(wall),
	}
	runtime.ReadMemStats(&after)
	out.allocs = float64(after.Mallocs-before.Mallocs) / float64(n)
	var sum time.Duration
	for _, d := range took {
		sum += d
	}
	slices.Sort(took)
	out.mean = sum / time.Duration(len(took))
	out.p50, out.p99 = took[len(took)/2], took[len(took)*99/100]
	return out, nil
}

// load has callers work for a while; took is how long each operation took.
func load(ctx context.Context, sys *system, p plan, set setting, value string, length time.Duration) (took []time.Duration, n int, err error) {
	var stop atomic.Bool
	defer time.AfterFunc(length, func() { stop.Store(true) }).Stop()
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range set.callers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
			mine := make([]time.Duration, 0, 1<<14)
			var failed error
			for !stop.Load() && failed == nil {
				key := keyName(r.IntN(p.keys))
				begin := time.Now()
				if set.op == "get" || set.op == "mix" && r.IntN(10) > 0 {
					failed = sys.get(ctx, key)
				} else {
					failed = sys.set(ctx, key, value)
				}
				mine = append(mine, time.Since(begin))
			}
			mu.Lock()
			defer mu.Unlock()
			took = append(took, mine...)
			if failed != nil {
				err = failed
			}
		})
	}
	wg.Wait()
	return took, len(took), err
}

func ownCPU() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func median[T float64 | time.Duration](all []sample, of func(sample) T) T {
	xs := make([]T, len(all))
	for i, s := range all {
		xs[i] = of(s)
	}
	slices.Sort(xs)
	return xs[len(xs)/2]
}

func rate(s sample) float64 { return s.perSecond }

// ratio is the median, over the rounds, of one system's rate to another's.
func ratio(of, to []sample) float64 {
	xs := make([]float64, len(of))
	for i := range of {
		xs[i] = of[i].perSecond / to[i].perSecond
	}
	slices.Sort(xs)
	return xs[len(xs)/2]
}

func printTable(w io.Writer, p plan, results samples) {
	fmt.Fprintf(w, "%d rounds of %v, medians; %s, %d CPUs, %s/%s.\n\n", p.rounds, p.length, runtime.Version(), runtime.NumCPU(), runtime.GOOS, runtime.GOARCH)
	fmt.Fprintln(w, "| op | bytes | callers | system | ops/s | (min–max) | × go-redis | × rueidis | mean | p50 | p99 | client CPU | server CPU | allocs/op |")
	fmt.Fprintln(w, "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
	for _, size := range p.sizes {
		for _, op := range p.ops {
			for _, callers := range p.callers {
				set := setting{op, callers, size}
				for _, name := range p.systems {
					all := results[set][name]
					rates := make([]float64, len(all))
					for i := range all {
						rates[i] = all[i].perSecond
					}
					peer := func(peer string) string {
						if other := results[set][peer]; other != nil && peer != name {
							return fmt.Sprintf("%.2f", ratio(all, other))
						}
						return ""
					}
					us := func(of func(sample) time.Duration) string {
						return median(all, of).Round(time.Microsecond).String()
					}
					fmt.Fprintf(w, "| %s | %d | %d | %s | %.0f | %.0f–%.0f | %s | %s | %s | %s | %s | %.2f | %.2f | %.1f |\n",
						op, size, callers, name, median(all, rate), slices.Min(rates), slices.Max(rates), peer("go-redis"), peer("rueidis"),
						us(func(s sample) time.Duration { return s.mean }), us(func(s sample) time.Duration { return s.p50 }),
						us(func(s sample) time.Duration { return s.p99 }),
						median(all, func(s sample) float64 { return s.client }), median(all, func(s sample) float64 { return s.server }),
						median(all, func(s sample) float64 { return s.allocs }))
				}
			}
		}
	}
}
