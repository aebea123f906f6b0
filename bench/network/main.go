// Command network measures merged calls over a network: this library with and without
// merging, and Redis through go-redis and rueidis, each with a pool of the same size,
// behind a proxy that is late by half a round trip in each direction.
//
// It starts a throwaway PostgreSQL and a Redis, runs every system in turn within each
// round, and prints medians, and ratios within the round, as a Markdown table. It needs
// Linux.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/fastpgcache/fastpgcache/bench/internal/peers"
	"github.com/fastpgcache/fastpgcache/bench/internal/program"
)

func main() {
	run := run
	if len(os.Args) > 2 && os.Args[1] == "forward" {
		run = func(context.Context) error { return forward(os.Args[2:]) }
	}
	program.Main(run)
}

const (
	merged   = "fastpgcache-pq"
	unmerged = "unmerged-pq"
	goRedis  = "go-redis"
	rueidis  = "rueidis"
)

var systems = []string{merged, unmerged, goRedis, rueidis}

// plan is what to measure.
type plan struct {
	roundTrips []time.Duration
	ops        []string
	callers    []int
	pool       int
	keys       int
	rounds     int
	length     time.Duration
}

// setting is one thing measured.
type setting struct {
	roundTrip time.Duration
	op        string
	callers   int
}

// results are samples of each system, by round.
type results map[setting]map[string][]peers.Sample

func run(ctx context.Context) error {
	p := plan{}
	roundTrips := flag.String("roundtrips", "0,300us,1ms,7ms", "round trips to measure; 0 is without the proxy")
	ops := flag.String("ops", "get,set", "operations: get, set (existing keys, with TTL)")
	callers := flag.String("callers", "4,8,16,64,256", "concurrent callers")
	svg := flag.String("svg", "", "file to write a chart to")
	flag.IntVar(&p.pool, "pool", 16, "connections of each system's pool")
	flag.IntVar(&p.keys, "keys", 20_000, "keys")
	flag.IntVar(&p.rounds, "rounds", 3, "rounds")
	flag.DurationVar(&p.length, "length", time.Second, "length of one measurement, or 150 round trips if they are longer")
	flag.Parse()
	p.ops = strings.Split(*ops, ",")
	for _, s := range strings.Split(*roundTrips, ",") {
		d, err := time.ParseDuration(s)
		if err != nil {
			return err
		}
		p.roundTrips = append(p.roundTrips, d)
	}
	var err error
	if p.callers, err = program.Numbers(*callers); err != nil {
		return err
	}
	all, err := measureAll(ctx, p)
	if err != nil {
		return err
	}
	printTable(os.Stdout, p, all)
	if *svg != "" {
		return writeChart(*svg, p, all)
	}
	return nil
}

func measureAll(ctx context.Context, p plan) (results, error) {
	s, err := peers.Start(ctx)
	if err != nil {
		return nil, err
	}
	defer s.Stop()
	value := strings.Repeat("x", 100)
	if err := s.Fill(ctx, p.keys, value); err != nil {
		return nil, err
	}
	all := results{}
	for _, roundTrip := range p.roundTrips {
		far := *s
		if roundTrip > 0 {
			ctx, end := context.WithCancel(ctx)
			defer end()
			addresses, err := behind(ctx, roundTrip, s.Postgres, s.Redis)
			if err != nil {
				return nil, err
			}
			far.Postgres, far.Redis = addresses[0], addresses[1]
		}
		for _, op := range p.ops {
			for _, callers := range p.callers {
				set := setting{roundTrip, op, callers}
				length := max(p.length, 150*roundTrip)
				load := peers.Load{Op: op, Callers: callers, Keys: p.keys, Value: value, WarmUp: length / 2, Length: length}
				all[set] = map[string][]peers.Sample{}
				for round := range p.rounds {
					for i := range systems {
						name := systems[(i+round)%len(systems)]
						one, err := measure(ctx, &far, name, p.pool, load)
						if err != nil {
							return nil, fmt.Errorf("%s, %+v: %w", name, set, err)
						}
						all[set][name] = append(all[set][name], one)
					}
				}
				fmt.Fprintf(os.Stderr, "measured %v %s, %d callers\n", roundTrip, op, callers)
			}
		}
	}
	return all, nil
}

func measure(ctx context.Context, s *peers.Servers, name string, pool int, l peers.Load) (peers.Sample, error) {
	sys, err := s.Open(ctx, name, pool)
	if err != nil {
		return peers.Sample{}, err
	}
	defer sys.Close()
	return peers.Measure(ctx, sys, l)
}

func printTable(w io.Writer, p plan, all results) {
	fmt.Fprintf(w, "%d rounds of %v or 150 round trips, medians; pools of %d; %s, %d CPUs, %s/%s.\n\n", p.rounds, p.length, p.pool, runtime.Version(), runtime.NumCPU(), runtime.GOOS, runtime.GOARCH)
	fmt.Fprintln(w, "| round trip | op | callers | ops/s | p50 | p99 | × unmerged | p99 × unmerged | × go-redis | p99 × go-redis | × rueidis | p99 × rueidis |")
	fmt.Fprintln(w, "|---|---|---|---|---|---|---|---|---|---|---|---|")
	for _, roundTrip := range p.roundTrips {
		for _, op := range p.ops {
			for _, callers := range p.callers {
				of := all[setting{roundTrip, op, callers}]
				ours := of[merged]
				fmt.Fprintf(w, "| %v | %s | %d | %.0f | %v | %v |", roundTrip, strings.ToUpper(op), callers, peers.Median(ours, peers.Rate),
					short(peers.Median(ours, peers.P50)), short(peers.Median(ours, peers.P99)))
				for _, other := range systems[1:] {
					fmt.Fprintf(w, " %.2f | %.2f |", peers.Ratio(ours, of[other], peers.Rate), peers.Ratio(ours, of[other], peers.P99))
				}
				fmt.Fprintln(w)
			}
		}
	}
}

func short(d time.Duration) time.Duration { return d.Round(10 * time.Microsecond) }
