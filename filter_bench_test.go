package fastpgcache

import (
	"fmt"
	"testing"
)

// benchmarkFilter returns a filter for a million keys, filled to the given part of its slots, and the keys in it.
func benchmarkFilter(b *testing.B, load float64) (*CuckooFilter, []string) {
	f := NewCuckooFilter(1_000_000)
	return f, fill(b, f, "in:", int(load*float64(f.slots())))
}

func BenchmarkFilterLookupHit(b *testing.B) {
	f, in := benchmarkFilter(b, 0.9)
	for i := 0; b.Loop(); i++ {
		f.Lookup(in[i%len(in)])
	}
}

func BenchmarkFilterLookupMiss(b *testing.B) {
	f, _ := benchmarkFilter(b, 0.9)
	out := make([]string, 1<<16)
	for i := range out {
		out[i] = fmt.Sprint("out:", i)
	}
	for i := 0; b.Loop(); i++ {
		f.Lookup(out[i%len(out)])
	}
}

// Inserts at 89 to 91 % load, in turn with deletes of the oldest keys, which are not measured.
func BenchmarkFilterInsert(b *testing.B) {
	f, in := benchmarkFilter(b, 0.91)
	fresh, next, n := in[:0], 0, int(f.slots()/50)
	for b.Loop() {
		if len(fresh) == 0 {
			b.StopTimer()
			fresh = make([]string, n)
			for i := range fresh {
				f.Delete(in[i])
				fresh[i] = fmt.Sprint("fresh:", next)
				next++
			}
			in = append(in[n:], fresh...)
			b.StartTimer()
		}
		f.Insert(fresh[0])
		fresh = fresh[1:]
	}
}
