// Command load measures caches side by side: this library over lib/pq and pgx, the
// plain prepared statement, and Redis through go-redis and rueidis, on one machine.
//
// It starts a throwaway PostgreSQL and a Redis, runs every system in turn within
// each round, so that the machine's moods fall on all alike, and prints medians and
// spread as a Markdown table, with ratios within the round.
package main

import (
	"context"
	"flag"
	"os"
	"strings"
	"time"

	"github.com/fastpgcache/fastpgcache/bench/internal/program"
)

func main() { program.Main(run) }

// plan is what to measure.
type plan struct {
	ops     []string
	callers []int
	sizes   []int
	systems []string
	rounds  int
	length  time.Duration // of one measurement
	keys    int
}

func run(ctx context.Context) error {
	p := plan{}
	ops := flag.String("ops", "get,set,mix", "operations: get, set (existing keys, with TTL), mix (90 % get)")
	callers := flag.String("callers", "1,8,64,256", "concurrent callers")
	sizes := flag.String("sizes", "100,4096", "value sizes in bytes")
	systems := flag.String("systems", "fastpgcache-pq,fastpgcache-pgx,prepared-pq,go-redis,rueidis", "what to measure")
	svg := flag.String("svg", "", "file to write a chart to")
	flag.IntVar(&p.rounds, "rounds", 5, "rounds")
	flag.DurationVar(&p.length, "length", time.Second, "length of one measurement")
	flag.IntVar(&p.keys, "keys", 100_000, "keys")
	flag.Parse()
	p.ops, p.systems = strings.Split(*ops, ","), strings.Split(*systems, ",")
	var err error
	if p.callers, err = program.Numbers(*callers); err != nil {
		return err
	}
	if p.sizes, err = program.Numbers(*sizes); err != nil {
		return err
	}
	results, err := measureAll(ctx, p)
	if err != nil {
		return err
	}
	printTable(os.Stdout, p, results)
	if *svg != "" {
		return writeChart(*svg, p, results)
	}
	return nil
}
