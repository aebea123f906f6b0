package main

import (
	"container/list"
	"context"
	"fmt"
	"math/rand/v2"
	"strings"

	"github.com/maypok86/otter/v2"
)

// compareRatios replays a made-up trace, with keys that drift, scans and values of all
// sizes, through what the store keeps (otter, bounded by weight as Config.LocalBytes
// does), and through LRU and SIEVE with as many bytes.
func compareRatios(context.Context) error {
	trace := makeTrace(2_000_000)
	var total int
	seen := map[int32]bool{}
	for _, a := range trace {
		if !seen[a.key] {
			seen[a.key] = true
			total += a.weight()
		}
	}
	fmt.Printf("%d accesses of %d keys, %d MB\n\n| bytes | kept | LRU | SIEVE |\n|--:|--:|--:|--:|\n", len(trace), len(seen), total>>20)
	for _, percent := range []int{1, 3, 10, 30} {
		bytes := total * percent / 100
		fmt.Printf("| %d %% |", percent)
		for _, store := range []store{newKept(bytes), newLRU(bytes), newSieve(bytes)} {
			hits := 0
			for _, a := range trace {
				if store.get(a.key) {
					hits++
				} else if a.size <= bytes/64 {
					store.set(a)
				}
			}
			fmt.Printf(" %.1f %% |", 100*float64(hits)/float64(len(trace)))
		}
		fmt.Println()
	}
	return nil
}

type access struct {
	key  int32
	size int
}

func (a access) weight() int { return a.size + 192 + 12 }

// makeTrace draws by Zipf's law from keys whose popularity drifts, and puts scans of keys
// that are asked for once in between.
func makeTrace(n int) []access {
	r := rand.New(rand.NewPCG(3, 4))
	zipf := rand.NewZipf(r, 1.01, 1, 200_000)
	size := func(key int32) int { return 50 << (uint32(key) * 2654435761 >> 29) } // 50 bytes to 6.4 kB
	scanned := int32(1 << 28)
	trace := make([]access, 0, n)
	for len(trace) < n {
		if len(trace)%100_000 == 50_000 {
			for range 20_000 {
				scanned++
				trace = append(trace, access{scanned, size(scanned)})
			}
			continue
		}
		drift := int32(len(trace) / 200) // places that the popular ones have moved on
		key := int32(zipf.Uint64()) + drift
		trace = append(trace, access{key, size(key)})
	}
	return trace
}

// store is what holds some of what was asked for.
type store interface {
	get(key int32) bool
	set(a access)
}

type kept struct{ *otter.Cache[int32, string] }

func newKept(bytes int) kept {
	return kept{otter.Must(&otter.Options[int32, string]{
		MaximumWeight: uint64(bytes),
		Weigher:       func(_ int32, v string) uint32 { return uint32(len(v) + 192 + 12) },
		Executor:      func(f func()) { f() },
	})}
}

var text = strings.Repeat("v", 1<<16)

func (k kept) get(key int32) bool { _, ok := k.GetIfPresent(key); return ok }
func (k kept) set(a access)       { k.Set(a.key, text[:a.size]) }

type lru struct {
	left  int
	order *list.List // of access, youngest first
	byKey map[int32]*list.Element
}

func newLRU(bytes int) *lru {
	return &lru{bytes, list.New(), map[int32]*list.Element{}}
}

func (l *lru) get(key int32) bool {
	e, ok := l.byKey[key]
	if ok {
		l.order.MoveToFront(e)
	}
	return ok
}

func (l *lru) set(a access) {
	l.byKey[a.key] = l.order.PushFront(a)
	l.left -= a.weight()
	for l.left < 0 {
		e := l.order.Back()
		old := l.order.Remove(e).(access)
		delete(l.byKey, old.key)
		l.left += old.weight()
	}
}

// sieve is Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024.
type sieve struct {
	left  int
	order *list.List // of *sieved, youngest first
	byKey map[int32]*list.Element
	hand  *list.Element
}

type sieved struct {
	access
	visited bool
}

func newSieve(bytes int) *sieve {
	return &sieve{left: bytes, order: list.New(), byKey: map[int32]*list.Element{}}
}

func (s *sieve) get(key int32) bool {
	e, ok := s.byKey[key]
	if ok {
		e.Value.(*sieved).visited = true
	}
	return ok
}

func (s *sieve) set(a access) {
	for s.left < a.weight() {
		e := s.hand
		if e == nil {
			e = s.order.Back()
		}
		for e.Value.(*sieved).visited {
			e.Value.(*sieved).visited = false
			if e = e.Prev(); e == nil {
				e = s.order.Back()
			}
		}
		s.hand = e.Prev()
		old := s.order.Remove(e).(*sieved)
		delete(s.byKey, old.key)
		s.left += old.weight()
	}
	s.left -= a.weight()
	s.byKey[a.key] = s.order.PushFront(&sieved{access: a})
}
