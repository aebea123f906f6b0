package fastpgcache

import (
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestFilterLookupTakesNoLock(t *testing.T) {
	f := NewCuckooFilter(100)
	fill(t, f, "in", 50)
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.Lookup("in7") || f.Len() != 50 {
		t.Error("Lookup or Len is wrong while a writer is at work")
	}
	f.Lookup("absent")
}

// untilDone runs each function again and again, in goroutines of their own, until the time is up or the test has failed.
func untilDone(t *testing.T, d time.Duration, fns ...func()) {
	t.Helper()
	var wg sync.WaitGroup
	end := time.Now().Add(d)
	for _, fn := range fns {
		wg.Go(func() {
			for !t.Failed() && time.Now().Before(end) {
				for range 50 {
					fn()
				}
			}
		})
	}
	wg.Wait()
}

func TestFilterNeverMissesAnItemThatMoves(t *testing.T) {
	for _, width := range []uint64{8, 13, 16, 24, 27, 32} {
		f := newCuckooFilter(60, width)
		permanent := fill(t, f, "permanent", int(f.slots())*6/10)
		hashes := make([]uint64, len(permanent))
		for i, item := range permanent {
			hashes[i] = hashOf(item)
		}
		var displaced atomic.Int64
		var in []uint64
		writer := func() {
			before := f.contents()
			for hash := rand.Uint64(); f.LoadFactor() < 0.96 && f.insertHash(hash); hash = rand.Uint64() {
				in = append(in, hash)
			}
			for range len(in) / 3 {
				i := rand.IntN(len(in))
				if !f.deleteHash(in[i]) {
					t.Error("Delete of an item that is in = false")
				}
				in[i] = in[len(in)-1]
				in = in[:len(in)-1]
			}
			if !slices.Equal(before, f.contents()) {
				displaced.Add(1)
			}
		}
		reader := func() {
			for _, hash := range hashes {
				if !f.lookupHash(hash) {
					t.Errorf("%d bits: an item that is in was missed", width)
				}
			}
		}
		untilDone(t, 250*time.Millisecond, writer, reader, reader)
		if displaced.Load() == 0 {
			t.Error("the writer has done nothing")
		}
	}
}

// Items with the same fingerprint and buckets share their copies. When the copy that a reader is to find
// first is deleted, put back and then the other one deleted, the reader must not miss both.
func TestFilterNeverMissesAnItemWhoseTwinIsDeleted(t *testing.T) {
	f := newCuckooFilter(1, 8)
	const fp = 77
	a, b := uint64(3), f.partner(fp, 3)
	twins := []uint64{f.hashAt(fp, a), f.hashAt(fp, b)}
	f.insertHash(twins[0])
	copies := 1
	writer := func() {
		// At most one slot of the two buckets is taken, then two, then one again, on either side.
		if f.insertHash(twins[rand.IntN(2)]) {
			copies++
		}
		for copies > 1 {
			f.deleteHash(twins[rand.IntN(2)])
			copies--
		}
	}
	reader := func() {
		for range 50 {
			if !f.lookupHash(twins[0]) || !f.lookupHash(twins[1]) {
				t.Error("an item was missed while a twin of it was deleted")
			}
		}
	}
	untilDone(t, time.Second, writer, reader)
}

func TestFilterLookupEndsUnderAStormOfWrites(t *testing.T) {
	f := NewCuckooFilter(10)
	fp, _ := f.locate(hashOf("absent"))
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for !stop.Load() {
			f.moves[fp%moveStripes].Add(1)
		}
	})
	for range 100_000 {
		f.Lookup("absent")
	}
	stop.Store(true)
	wg.Wait()
}

func TestFilterConcurrentWritersLoseNothing(t *testing.T) {
	f := NewCuckooFilter(80_000)
	kept := make([]uint64, 80_000)
	for i := range kept {
		kept[i] = rand.Uint64()
	}
	var wg sync.WaitGroup
	for mine := range slices.Chunk(kept, 10_000) {
		wg.Go(func() {
			gone := rand.Uint64()
			for _, hash := range mine {
				if !f.insertHash(hash) || !f.insertHash(gone) || !f.deleteHash(gone) {
					t.Error("an insert or delete failed")
				}
			}
		})
	}
	wg.Wait()
	for _, hash := range kept {
		if !f.lookupHash(hash) {
			t.Fatal("an item was lost")
		}
	}
	in := 0
	for _, n := range f.cells() {
		in += n
	}
	if f.Len() != len(kept) || in != len(kept) {
		t.Errorf("Len() = %d with %d items in, want %d", f.Len(), in, len(kept))
	}
}

func TestFilterCloneIsOfOneMoment(t *testing.T) {
	f := newCuckooFilter(5000, 16)
	permanent := fill(t, f, "permanent", 4800)
	writer := func() {
		var in []uint64
		for hash := rand.Uint64(); len(in) < 200 && f.insertHash(hash); hash = rand.Uint64() {
			in = append(in, hash)
		}
		for _, hash := range in {
			f.deleteHash(hash)
		}
	}
	cloner := func() {
		c := f.Clone()
		n := 0
		for _, copies := range c.cells() {
			n += copies
		}
		if n != c.Len() {
			t.Errorf("clone has %d items and says %d", n, c.Len())
		}
		for _, item := range permanent {
			if !c.Lookup(item) {
				t.Errorf("Lookup(%q) = false in a clone, but it is in the filter", item)
			}
		}
	}
	untilDone(t, 200*time.Millisecond, writer, cloner)
}

func TestFilterCrossedUnionsEnd(t *testing.T) {
	for range 300 {
		a, b := NewCuckooFilter(100), NewCuckooFilter(100)
		items := append(fill(t, a, "a", 10), fill(t, b, "b", 10)...)
		unite := func(f, other *CuckooFilter) func() {
			return func() {
				if err := f.Union(other); err != nil {
					t.Error(err)
				}
			}
		}
		var wg sync.WaitGroup
		wg.Go(unite(a, b))
		wg.Go(unite(b, a))
		wantAll(t, a, items[:10])
		wantAll(t, b, items[10:])
		wg.Wait()
		wantAll(t, a, items)
		wantAll(t, b, items)
	}
}
