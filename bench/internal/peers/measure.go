package peers

import (
	"context"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Load is what callers do: each works through random keys, one call at a time.
type Load struct {
	Op      string // get, set (existing keys, with TTL) or mix (90 % get)
	Callers int
	Keys    int
	Value   string
	WarmUp  time.Duration // to open connections and prepare each statement on each, not measured
	Length  time.Duration
}

// Sample is one measurement.
type Sample struct {
	PerSecond      float64
	Mean, P50, P99 time.Duration
	Client, Server float64 // CPUs kept busy
	Allocs         float64 // per operation
}

// Measure puts load on a system.
func Measure(ctx context.Context, sys *System, l Load) (Sample, error) {
	// A connection prepares a statement once in its life, which may be an hour.
	for _, callers := range []int{max(l.Callers, 64), l.Callers} {
		warm := l
		warm.Callers = callers
		if _, err := run(ctx, sys, warm, l.WarmUp/2); err != nil {
			return Sample{}, err
		}
	}
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	client, server, start := ownCPU(), sys.server(), time.Now()
	took, err := run(ctx, sys, l, l.Length)
	if err != nil {
		return Sample{}, err
	}
	wall := time.Since(start)
	n := float64(len(took))
	out := Sample{
		PerSecond: n / wall.Seconds(),
		Client:    float64(ownCPU()-client) / float64(wall),
		Server:    float64(sys.server()-server) / float64(wall),
	}
	runtime.ReadMemStats(&after)
	out.Allocs = float64(after.Mallocs-before.Mallocs) / n
	var sum time.Duration
	for _, d := range took {
		sum += d
	}
	slices.Sort(took)
	out.Mean = sum / time.Duration(len(took))
	out.P50, out.P99 = took[len(took)/2], took[len(took)*99/100]
	return out, nil
}

// run has callers work for a while; took is how long each operation took.
func run(ctx context.Context, sys *System, l Load, length time.Duration) (took []time.Duration, err error) {
	var stop atomic.Bool
	defer time.AfterFunc(length, func() { stop.Store(true) }).Stop()
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range l.Callers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
			mine := make([]time.Duration, 0, 1<<14)
			var failed error
			for !stop.Load() && failed == nil {
				key := keyName(r.IntN(l.Keys))
				begin := time.Now()
				if l.Op == "get" || l.Op == "mix" && r.IntN(10) > 0 {
					failed = sys.get(ctx, key)
				} else {
					failed = sys.set(ctx, key, l.Value)
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
	return took, err
}

func ownCPU() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// Median is that of one figure of the samples.
func Median[T float64 | time.Duration](all []Sample, of func(Sample) T) T {
	xs := make([]T, len(all))
	for i, s := range all {
		xs[i] = of(s)
	}
	slices.Sort(xs)
	return xs[len(xs)/2]
}

// Ratio is the median, over the rounds, of one system's figure to another's.
func Ratio[T float64 | time.Duration](of, to []Sample, figure func(Sample) T) float64 {
	xs := make([]float64, len(of))
	for i := range of {
		xs[i] = float64(figure(of[i])) / float64(figure(to[i]))
	}
	slices.Sort(xs)
	return xs[len(xs)/2]
}

// Rate is a sample's operations per second.
func Rate(s Sample) float64 { return s.PerSecond }

// P50 is the time that half of its calls took at most.
func P50(s Sample) time.Duration { return s.P50 }

// P99 is the time that 99 of 100 calls took at most.
func P99(s Sample) time.Duration { return s.P99 }
