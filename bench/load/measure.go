package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/fastpgcache/fastpgcache/bench/internal/peers"
)

// setting is one thing measured.
type setting struct {
	op      string
	callers int
	size    int
}

// samples of each system, by round.
type samples map[setting]map[string][]peers.Sample

func measureAll(ctx context.Context, p plan) (samples, error) {
	s, err := peers.Start(ctx)
	if err != nil {
		return nil, err
	}
	defer s.Stop()
	results := samples{}
	for _, size := range p.sizes {
		value := strings.Repeat("x", size)
		if err := s.Fill(ctx, p.keys, value); err != nil {
			return nil, err
		}
		if slices.Contains(p.systems, "4-shards-pq") {
			if err := s.FillShards(ctx, p.keys, value); err != nil {
				return nil, err
			}
		}
		for _, op := range p.ops {
			for _, callers := range p.callers {
				set := setting{op, callers, size}
				results[set] = map[string][]peers.Sample{}
				for round := range p.rounds {
					for i := range p.systems {
						name := p.systems[(i+round)%len(p.systems)]
						one, err := measure(ctx, s, name, peers.Load{Op: op, Callers: callers, Keys: p.keys, Value: value, WarmUp: p.length / 4, Length: p.length})
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

func measure(ctx context.Context, s *peers.Servers, name string, l peers.Load) (peers.Sample, error) {
	sys, err := s.Open(ctx, name, 0)
	if err != nil {
		return peers.Sample{}, err
	}
	defer sys.Close()
	return peers.Measure(ctx, sys, l)
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
						rates[i] = all[i].PerSecond
					}
					peer := func(peer string) string {
						if other := results[set][peer]; other != nil && peer != name {
							return fmt.Sprintf("%.2f", peers.Ratio(all, other, peers.Rate))
						}
						return ""
					}
					us := func(of func(peers.Sample) time.Duration) string {
						return peers.Median(all, of).Round(time.Microsecond).String()
					}
					fmt.Fprintf(w, "| %s | %d | %d | %s | %.0f | %.0f–%.0f | %s | %s | %s | %s | %s | %.2f | %.2f | %.1f |\n",
						op, size, callers, name, peers.Median(all, peers.Rate), slices.Min(rates), slices.Max(rates), peer("go-redis"), peer("rueidis"),
						us(func(s peers.Sample) time.Duration { return s.Mean }), us(peers.P50), us(peers.P99),
						peers.Median(all, func(s peers.Sample) float64 { return s.Client }), peers.Median(all, func(s peers.Sample) float64 { return s.Server }),
						peers.Median(all, func(s peers.Sample) float64 { return s.Allocs }))
				}
			}
		}
	}
}
