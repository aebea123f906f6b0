package fastpgcache

import (
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/maypok86/otter/v2"
)

// filled returns a local that answers n keys, and a keyspace of theirs.
func filled(t testing.TB, n int) (*local, []string) {
	l := newLocal(time.Hour, 64<<20)
	generation := l.kept.begin(l.now(), 0)
	keys := make([]string, n)
	err := l.misses.load(generation, 0, func() error {
		for i := range keys {
			keys[i] = fmt.Sprintf("user:%08d", i)
			l.misses.enter(hashOf(keys[i]))
		}
		return nil
	})
	check(t, err)
	text := fmt.Sprintf("%0100d", 1)
	for _, key := range keys {
		l.found(key, l.tickets(key)[0], text, noExpiry)
	}
	return l, keys
}

// draws returns indexes of n keys by Zipf's law.
func draws(n int) []int32 {
	zipf := rand.NewZipf(rand.New(rand.NewPCG(1, 2)), 1.01, 1, uint64(n-1))
	draws := make([]int32, 1<<20)
	for i := range draws {
		draws[i] = int32(zipf.Uint64())
	}
	return draws
}

func TestLocalAnswersAllocateNothing(t *testing.T) {
	l, keys := filled(t, 100)
	if n := testing.AllocsPerRun(1000, func() {
		if _, _, a := l.lookup(keys[7]); a != present {
			t.Fatal("no hit")
		}
		if _, _, a := l.lookup("not there"); a != absent {
			t.Fatal("no miss")
		}
	}); n != 0 {
		t.Errorf("got %v allocations", n)
	}
}

func BenchmarkLocalHit(b *testing.B) {
	l, keys := filled(b, 100_000)
	var text string
	for b.Loop() {
		v, _, _ := l.lookup(keys[7])
		text = v.text
	}
	_ = text
}

func BenchmarkLocalMiss(b *testing.B) {
	l, _ := filled(b, 100_000)
	for b.Loop() {
		l.lookup("not there")
	}
}

func BenchmarkLocalParallel(b *testing.B) {
	l, keys := filled(b, 100_000)
	draws := draws(len(keys))
	var n atomic.Int64
	b.SetParallelism(32)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for i := int(n.Add(7777)); pb.Next(); i++ {
			l.lookup(keys[draws[i&(1<<20-1)]])
		}
	})
}

func BenchmarkOtterParallel(b *testing.B) {
	l, keys := filled(b, 100_000)
	values := otter.Must(&otter.Options[string, *keptValue]{MaximumWeight: 64 << 20, Weigher: func(string, *keptValue) uint32 { return 300 }})
	for _, key := range keys {
		v, _ := l.kept.values.GetIfPresent(key)
		values.Set(key, v)
	}
	draws := draws(len(keys))
	var n atomic.Int64
	b.SetParallelism(32)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for i := int(n.Add(7777)); pb.Next(); i++ {
			values.GetIfPresent(keys[draws[i&(1<<20-1)]])
		}
	})
}
