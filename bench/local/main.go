// Command local measures answers from memory beside client-side caches of Redis.
//
//	cd bench && go run ./local                       # operations per second, and how long one takes
//	cd bench && go run ./local -feed 10m             # the feed under as many writes as the machine gives
//	cd bench && go run ./local -hitratio             # what is kept, beside LRU and SIEVE
//
// It runs on a throwaway PostgreSQL (FASTPGCACHE_TEST_BINDIR picks another one) and its
// own redis-server, and prints Markdown tables. 100,000 keys of 100 bytes are drawn by
// Zipf's law, beforehand.
package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/fastpgcache/fastpgcache/bench/internal/chart"
	"github.com/fastpgcache/fastpgcache/bench/internal/program"
)

var (
	duration  = flag.Duration("duration", 3*time.Second, "how long each system runs in each round")
	rounds    = flag.Int("rounds", 3, "how often; the median counts")
	names     = flag.String("systems", "local,go-redis,go-redis-cached,rueidis,rueidis-docache,otter", "systems to measure")
	callers   = flag.String("callers", "64,256", "numbers of goroutines")
	writes    = flag.String("writes", "0,2,10", "percentages of SETs")
	staleness = flag.Duration("staleness", 50*time.Millisecond, "MaxStaleness, of local")
	svg       = flag.String("svg", "", "file for a chart")
	feed      = flag.Duration("feed", 0, "write for that long instead, and watch the feed")
	ratios    = flag.Bool("hitratio", false, "compare hit ratios instead")
)

const (
	keys       = 100_000
	valueBytes = 100
)

func main() {
	flag.Parse()
	run := compare
	switch {
	case *feed > 0:
		run = watchFeed
	case *ratios:
		run = compareRatios
	}
	program.Main(run)
}

// draws returns which keys are asked for, by Zipf's law with 1.01.
func draws() []int32 {
	zipf := rand.NewZipf(rand.New(rand.NewPCG(1, 2)), 1.01, 1, keys-1)
	draws := make([]int32, 1<<21)
	for i := range draws {
		draws[i] = int32(zipf.Uint64())
	}
	return draws
}

func keyNames() []string {
	names := make([]string, keys)
	for i := range names {
		names[i] = "key:" + strconv.Itoa(i)
	}
	return names
}

func compare(ctx context.Context) error {
	callers, err := program.Numbers(*callers)
	if err != nil {
		return err
	}
	writes, err := program.Numbers(*writes)
	if err != nil {
		return err
	}
	s, err := startServers(ctx)
	if err != nil {
		return err
	}
	defer s.Stop()
	value := strings.Repeat("v", valueBytes)
	if err := s.Fill(ctx, keys, value); err != nil {
		return err
	}
	var systems []*system
	for name := range strings.SplitSeq(*names, ",") {
		sys, err := s.open(ctx, name)
		if err != nil {
			return err
		}
		defer sys.close()
		systems = append(systems, sys)
	}
	keys, draws := keyNames(), draws()
	for _, sys := range systems { // what is asked for often is kept then
		if _, err := drive(ctx, sys, keys, draws, value, 64, 0, 2*time.Second); err != nil {
			return fmt.Errorf("%s: %w", sys.name, err)
		}
	}

	fmt.Printf("%d rounds of %v, MaxStaleness %v, GOMAXPROCS %d, %s\n\n", *rounds, *duration, *staleness, runtime.GOMAXPROCS(0), runtime.Version())
	fmt.Print("| callers | SETs |")
	for _, sys := range systems {
		fmt.Printf(" %s |", sys.name)
	}
	fmt.Print(" local / go-redis | local / DoCache | local / otter | p99 of local reads |\n|--:|--:|" + strings.Repeat("--:|", len(systems)+4) + "\n")
	panel := chart.Panel{Title: fmt.Sprintf("Operations a second, 100,000 keys of 100 bytes, MaxStaleness %v", *staleness)}
	for _, n := range callers {
		for _, percent := range writes {
			rates, p99 := map[string][]float64{}, []time.Duration{}
			for range *rounds {
				for _, sys := range systems {
					got, err := drive(ctx, sys, keys, draws, value, n, percent, *duration)
					if err != nil {
						return fmt.Errorf("%s: %w", sys.name, err)
					}
					rates[sys.name] = append(rates[sys.name], got.rate)
					if sys.name == "local" {
						p99 = append(p99, got.p99)
					}
				}
			}
			fmt.Printf("| %d | %d %% |", n, percent)
			g := chart.Group{Label: fmt.Sprintf("%d callers\n%d %% SET", n, percent)}
			for _, sys := range systems {
				m := median(rates[sys.name])
				fmt.Printf(" %.0f |", m)
				g.Values = append(g.Values, m)
			}
			panel.Groups = append(panel.Groups, g)
			for _, peer := range []string{"go-redis", "rueidis-docache", "otter"} {
				if peer == "otter" && percent > 0 {
					fmt.Print(" |")
				} else {
					fmt.Printf(" %.2f |", median(rates["local"])/median(rates[peer]))
				}
			}
			fmt.Printf(" %v |\n", median(p99))
			if os.Getenv("DEBUG") != "" {
				st := systems[0].stats()
				fmt.Fprintf(os.Stderr, "hits %d local %d catchups %d statements %d keys %d resets %d\n", st.Hits, st.Local.Hits, st.Local.CatchUps, st.Statements, st.Keys, st.Local.Resets)
			}
		}
	}
	if err := single(ctx, s, keys); err != nil {
		return err
	}
	if *svg != "" {
		return os.WriteFile(*svg, []byte(chart.Columns(strings.Split(*names, ","), 10_000, []chart.Panel{panel})), 0o644)
	}
	return nil
}

func median[T int | float64 | time.Duration](all []T) (m T) {
	if len(all) == 0 {
		return m
	}
	sorted := slices.Sorted(slices.Values(all))
	return sorted[len(sorted)/2]
}

type result struct {
	rate float64
	p99  time.Duration
}

// drive lets n goroutines ask, and write now and then, for a while.
func drive(ctx context.Context, sys *system, keys []string, draws []int32, value string, n, percent int, d time.Duration) (result, error) {
	const batch = 32 // operations between two looks at the clock
	every := 1 << 62
	if percent > 0 {
		every = 100 / percent
	}
	counts, errs, times := make([]int, n), make([]error, n), make([][]time.Duration, n)
	var wg sync.WaitGroup
	begin := time.Now()
	for g := range n {
		wg.Go(func() {
			i := g * len(draws) / n
			done, v := 0, ""
			for time.Since(begin) < d && ctx.Err() == nil {
				for range batch {
					i++
					key := keys[draws[i%len(draws)]]
					var err error
					switch {
					case (done+g)%every == every-1:
						err = sys.set(ctx, key, value)
					case done%1024 == 7: // one in some is timed
						at := time.Now()
						err = sys.get(ctx, key, &v)
						times[g] = append(times[g], time.Since(at))
					default:
						err = sys.get(ctx, key, &v)
					}
					if err != nil {
						errs[g] = err
						return
					}
					done++
				}
			}
			counts[g] = done
		})
	}
	wg.Wait()
	took := time.Since(begin)
	total := 0
	var all []time.Duration
	for g := range n {
		if errs[g] != nil && ctx.Err() == nil {
			return result{}, errs[g]
		}
		total += counts[g]
		all = append(all, times[g]...)
	}
	slices.Sort(all)
	r := result{rate: float64(total) / took.Seconds()}
	if len(all) > 0 {
		r.p99 = all[len(all)*99/100]
	}
	return r, ctx.Err()
}

// single measures what one caller waits for an answer from memory.
func single(ctx context.Context, s *servers, keys []string) error {
	c, err := s.cache(time.Hour)
	if err != nil {
		return err
	}
	defer c.Close()
	var v string
	for range 1000 { // until both hits and misses are answered from memory
		c.Get(ctx, keys[0], &v)
		c.Get(ctx, "missing", &v)
		time.Sleep(time.Millisecond)
		if stats := c.Stats(); stats.Local.Hits > 10 && stats.Local.Misses > 10 {
			break
		}
	}
	const n = 2_000_000
	fmt.Print("\n| one caller | ns |\n|--|--:|\n")
	for _, ask := range []struct{ name, key string }{{"local hit", keys[0]}, {"local miss", "missing"}} {
		best := time.Duration(1 << 62)
		for range 5 {
			begin := time.Now()
			for range n {
				c.Get(ctx, ask.key, &v)
			}
			best = min(best, time.Since(begin))
		}
		fmt.Printf("| %s | %.0f |\n", ask.name, float64(best)/n)
	}
	return nil
}
