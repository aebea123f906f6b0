// Command filter compares the cuckoo filter with its peers and prints a Markdown table:
//
//	cd bench && go run ./filter
//
// Each figure is the median of a few rounds, in which the filters take turns.
package main

import (
	"fmt"
	"slices"
	"time"

	"github.com/bits-and-blooms/bloom/v3"
	"github.com/fastpgcache/fastpgcache"
	"github.com/seiflotfy/cuckoofilter"
)

const (
	keys     = 1_000_000 // the capacity asked of each filter
	rounds   = 5
	lookups  = 1_000_000
	fpChecks = 4_000_000
)

// A peer is a new, empty filter.
type peer struct {
	insert, lookup func(string) bool
	slots          int // 0 in a Bloom filter: any number of keys goes in, at any load at the same speed
	bytes          int
}

var peers = []struct {
	name string
	new  func() peer
}{
	{"fastpgcache, 16 bits", func() peer { return ours(fastpgcache.NewCuckooFilter(keys)) }},
	{"fastpgcache, rate 3 % (8 bits)", func() peer { return ours(fastpgcache.NewCuckooFilterWithRate(keys, 0.03)) }},
	{"seiflotfy/cuckoofilter (8 bits)", func() peer {
		f := cuckoo.NewFilter(keys)
		size := len(f.Encode()) // one byte a slot, as in memory
		return peer{
			insert: func(s string) bool { return f.Insert([]byte(s)) },
			lookup: func(s string) bool { return f.Lookup([]byte(s)) },
			slots:  size, bytes: size,
		}
	}},
	{"bits-and-blooms/bloom, rate 0.0115 %", func() peer { return bloomPeer(0.000115) }},
	{"bits-and-blooms/bloom, rate 3 %", func() peer { return bloomPeer(0.03) }},
}

func ours(f *fastpgcache.CuckooFilter) peer {
	s := f.Stats()
	return peer{f.Insert, f.Lookup, s.Slots, s.Bytes}
}

func bloomPeer(rate float64) peer {
	f := bloom.NewWithEstimates(keys, rate)
	return peer{
		insert: func(s string) bool { f.AddString(s); return true },
		lookup: f.TestString,
		bytes:  int(f.Cap()+7) / 8,
	}
}

type figures struct {
	insert, hit, miss, bytesPerKey, falsePositives []float64
	lost, taken                                    int
}

func main() {
	in, out := make([]string, keys*11/10), make([]string, fpChecks)
	for i := range in {
		in[i] = fmt.Sprint("session:", i)
	}
	for i := range out {
		out[i] = fmt.Sprint("absent:", i)
	}
	results := make([]figures, len(peers))
	for range rounds {
		for i := range peers {
			measure(&results[i], peers[i].new, in, out)
		}
	}

	fmt.Printf("| filter for %d keys | insert ns, 89–91 %% load | lookup ns, hit | lookup ns, miss | bytes/key | false positives | lost at 95 %% load |\n|---|---|---|---|---|---|---|\n", keys)
	base := results[0]
	for i, r := range results {
		lost := "–"
		if r.taken > 0 {
			lost = fmt.Sprintf("%d of %d", r.lost, r.taken)
		}
		fmt.Printf("| %s | %s | %s | %s | %.2f | %.4f %% | %s |\n", peers[i].name, ratio(r.insert, base.insert),
			ratio(r.hit, base.hit), ratio(r.miss, base.miss), median(r.bytesPerKey), 100*median(r.falsePositives), lost)
	}
	fmt.Println("\nIn brackets: times the first row. Bytes and false positives are taken at 90 % of the slots (Bloom: at all", keys, "keys).")
}

// measure fills a filter to 90 % of its slots, measures, and goes on to 95 %.
func measure(r *figures, newPeer func() peer, in, out []string) {
	p := newPeer()
	n90, n95 := keys, keys
	if p.slots > 0 {
		n90, n95 = p.slots*9/10, p.slots*95/100
	}
	window := n90 / 90 // 1 % of the slots
	for _, key := range in[:n90-window] {
		p.insert(key)
	}
	start := time.Now()
	for _, key := range in[n90-window : n90] {
		p.insert(key)
	}
	r.insert = append(r.insert, perOp(start, window))

	start = time.Now()
	for i := range lookups {
		p.lookup(in[i%n90])
	}
	r.hit = append(r.hit, perOp(start, lookups))
	start = time.Now()
	hits := 0
	for _, key := range out {
		if p.lookup(key) {
			hits++
		}
	}
	r.miss = append(r.miss, perOp(start, len(out)))
	r.falsePositives = append(r.falsePositives, float64(hits)/float64(len(out)))
	r.bytesPerKey = append(r.bytesPerKey, float64(p.bytes)/float64(n90))
	if p.slots == 0 {
		return
	}
	for _, key := range in[n90:n95] {
		p.insert(key)
	}
	for _, key := range in[:n95] {
		if !p.lookup(key) {
			r.lost++
		}
	}
	r.taken += n95
}

func perOp(start time.Time, n int) float64 {
	return float64(time.Since(start).Nanoseconds()) / float64(n)
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

func ratio(v, base []float64) string {
	return fmt.Sprintf("%.0f (%.1f ×)", median(v), median(v)/median(base))
}
