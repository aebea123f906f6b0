package main

import (
	"flag"
	"fmt"
	"os"
)

var (
	path  = flag.String("trace", "", "file of 8-byte big-endian keys; defaults to a made-up trace")
	n     = flag.Int("n", 2_000_000, "accesses")
	keys  = flag.Int("keys", 100_000, "popular keys of the made-up trace")
	seed  = flag.Uint64("seed", 1, "of the made-up trace")
	round = flag.Int("round", 2500, "accesses between two rounds of touching")
)

func main() {
	flag.Parse()
	var trace []uint64
	var err error
	if *path != "" {
		trace, err = readTrace(*path, *n)
	} else {
		trace = makeTrace(*seed, *n, *keys)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	d := distinct(trace)
	fmt.Printf("%d accesses of %d keys\n\n", len(trace), d)
	for _, percent := range []int{2, 5, 10, 20, 30} {
		capacity := d * percent / 100
		fmt.Printf("| %d %% | %d |", percent, capacity)
		for _, kind := range []string{"FIFO", "LRU", "SIEVE"} {
			fmt.Printf(" %s %.2f |", kind, 100*replay(newList(kind, capacity), trace))
		}
		for q := 1; q <= 2; q++ {
			r := newRule(capacity*16/17, q, *round)
			h := replay(r, trace)
			fmt.Printf(" %.2f (mean %.3f, touches %.1f, sent %.1f) |", 100*h, float64(r.sum)/float64(r.samples)/float64(capacity), 100*float64(r.touches)/float64(len(trace)), 100*float64(r.sent)/float64(len(trace)))
		}
		fmt.Println()
	}
}

func replay(p policy, trace []uint64) float64 {
	hits := 0
	for _, key := range trace {
		if p.access(key) {
			hits++
		}
	}
	return float64(hits) / float64(len(trace))
}
