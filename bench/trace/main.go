// Command trace replays accesses to keys, and compares which share of them finds its key: by
// the rule by which a limit on size evicts, by FIFO, by LRU and by SIEVE.
//
//	cd bench && go run ./trace                  # a made-up trace, with skew, drift and scans
//	cd bench && go run ./trace -trace file      # of 8-byte big-endian keys
//	cd bench && go run ./trace -real            # the rule as it is built, on a throwaway PostgreSQL
//
// The rule oscillates around its number of entries: the limit is chosen so that it has as
// many, on average, as the others. It prints a Markdown table.
package main

import (
	"context"
	"flag"
	"fmt"

	"github.com/fastpgcache/fastpgcache/bench/internal/program"
)

var (
	path  = flag.String("trace", "", "file of 8-byte big-endian keys; defaults to a made-up trace")
	n     = flag.Int("n", 2_000_000, "accesses at most")
	keys  = flag.Int("keys", 100_000, "popular keys of the made-up trace")
	seed  = flag.Uint64("seed", 1, "of the made-up trace")
	round = flag.Int("round", 2500, "accesses between two rounds of touching, which come each 250 ms")
	live  = flag.Bool("real", false, "replay on PostgreSQL, too")
)

func main() {
	flag.Parse()
	program.Main(run)
}

func run(ctx context.Context) (err error) {
	trace := makeTrace(*seed, *n, *keys)
	if *path != "" {
		if trace, err = readTrace(*path, *n); err != nil {
			return err
		}
	}
	d := distinct(trace)
	fmt.Printf("%d accesses of %d keys\n\n", len(trace), d)
	if *live {
		return compareReal(ctx, trace, d)
	}
	fmt.Println("| entries | FIFO | LRU | SIEVE | one queue | the rule | − LRU | keys told per 100 accesses | touched |")
	fmt.Println("|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
	for _, percent := range []int{2, 5, 10, 20, 30} {
		capacity := d * percent / 100
		fmt.Printf("| %d %% |", percent)
		lru := 0.0
		for _, kind := range []string{"FIFO", "LRU", "SIEVE"} {
			hits := replay(newList(kind, capacity), trace)
			if kind == "LRU" {
				lru = hits
			}
			fmt.Printf(" %.2f %% |", hits)
		}
		fmt.Printf(" %.2f %% |", replay(newRule(limitFor(capacity), 1, *round), trace))
		r := newRule(limitFor(capacity), 2, *round)
		hits := replay(r, trace)
		per := 100 / float64(len(trace))
		fmt.Printf(" %.2f %% | %+.2f | %.1f | %.1f |\n", hits, hits-lru, float64(r.sent)*per, float64(r.touches)*per)
	}
	return nil
}

// limitFor is the limit with which the rule has, on average, so many entries.
func limitFor(entries int) int { return entries * 16 / 17 }

// replay returns how many of 100 accesses found their key.
func replay(p policy, trace []uint64) float64 {
	hits := 0
	for _, key := range trace {
		if p.access(key) {
			hits++
		}
	}
	return 100 * float64(hits) / float64(len(trace))
}
