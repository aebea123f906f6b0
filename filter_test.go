package fastpgcache

import (
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// fill inserts n items that bear the prefix and returns them.
func fill(t testing.TB, f *CuckooFilter, prefix string, n int) []string {
	t.Helper()
	items := make([]string, n)
	for i := range items {
		items[i] = fmt.Sprint(prefix, i)
		if !f.Insert(items[i]) {
			t.Fatalf("Insert of item %d of %d = false at load %.3f", i+1, n, f.LoadFactor())
		}
	}
	return items
}

func wantAll(t testing.TB, f *CuckooFilter, items []string) {
	t.Helper()
	for _, item := range items {
		if !f.Lookup(item) {
			t.Fatalf("Lookup(%q) = false, but it is in the filter", item)
		}
	}
}

// A cell is all that a filter knows of an item: its fingerprint and its two buckets.
type cell struct{ fp, bucket uint64 }

func (f *CuckooFilter) cellOf(fp, bucket uint64) cell {
	return cell{fp, min(bucket, f.partner(fp, bucket))}
}

// cells returns how many copies f holds of each cell.
func (f *CuckooFilter) cells() map[cell]int {
	m := make(map[cell]int)
	for slot := range f.slots() {
		if fp := f.get(slot * f.bits); fp != 0 {
			m[f.cellOf(fp, slot/slotsPerBucket)]++
		}
	}
	return m
}

// hashAt returns a hash with the given fingerprint and first bucket.
func (f *CuckooFilter) hashAt(fp, bucket uint64) uint64 {
	low := ((fp-1)<<32 + f.mask - 1) / f.mask
	high := (bucket<<32 + f.buckets - 1) / f.buckets
	return high<<32 | low
}

func (f *CuckooFilter) contents() []uint64 {
	words := make([]uint64, len(f.words))
	for i := range words {
		words[i] = f.words[i].Load()
	}
	return words
}

// scaled is a tenth of n under the race detector, which makes single-threaded work
// ten times as slow to no end.
func scaled(n int) int {
	if raceEnabled {
		return n / 10
	}
	return n
}

// widths is every width of a fingerprint, or, under the race detector, some.
func widths() []uint64 {
	if raceEnabled {
		return []uint64{8, 13, 16, 27, 32}
	}
	var all []uint64
	for width := uint64(8); width <= 32; width++ {
		all = append(all, width)
	}
	return all
}

func TestFilterPartnerIsAnInvolution(t *testing.T) {
	for _, capacity := range []int{1, 7, 100, 1000, 12345, 1 << 20} {
		for _, width := range []uint64{8, 13, 16, 32} {
			f := newCuckooFilter(capacity, width)
			for range 20000 {
				fp, bucket := f.locate(rand.Uint64())
				if fp == 0 || fp > f.mask || bucket >= f.buckets {
					t.Fatalf("capacity %d, %d bits: fingerprint %d in bucket %d of %d", capacity, width, fp, bucket, f.buckets)
				}
				partner := f.partner(fp, bucket)
				if partner == bucket || partner >= f.buckets || f.partner(fp, partner) != bucket {
					t.Fatalf("capacity %d, %d bits: fingerprint %d: bucket %d of %d, its partner %d, that one's %d",
						capacity, width, fp, bucket, f.buckets, partner, f.partner(fp, partner))
				}
			}
		}
	}
}

func TestFilterTakesItsCapacity(t *testing.T) {
	t.Parallel()
	trials := map[int]int{math.MinInt: 10, -1: 10, 0: 10, 1: 200, 2: 200, 7: 200, 9: 200, 20: 200, 50: 200, 100: 200, 333: 50, 1000: 20, 65537: 1}
	for capacity, n := range trials {
		for _, width := range []uint64{8, 16, 27} {
			for trial := range max(scaled(n), 1) {
				f := newCuckooFilter(capacity, width)
				if got, want := f.Cap(), max(capacity, 1); got != want {
					t.Fatalf("Cap() = %d, want %d", got, want)
				}
				items := fill(t, f, fmt.Sprint(width, "/", trial, "/"), f.Cap())
				if f.Len() != len(items) {
					t.Fatalf("Len() = %d after %d inserts", f.Len(), len(items))
				}
				wantAll(t, f, items)
			}
		}
	}
}

// The chance that more items share two buckets than these hold, were they alone, bounds what can go wrong in
// a small filter; in a large one the search must stay far from its limit.
func TestFilterHasRoomToSpare(t *testing.T) {
	t.Parallel()
	for capacity := 1; capacity < 100_000; capacity += 1 + capacity/10 {
		n := float64(bucketsFor(capacity))
		ways, _ := math.Lgamma(float64(capacity) + 1)
		rest, _ := math.Lgamma(max(float64(capacity)-9, 0) + 1)
		nine, _ := math.Lgamma(10)
		if p := math.Exp(ways - rest - nine - 8*math.Log(n*n/4)); capacity >= 9 && p > 1e-9 {
			t.Errorf("capacity %d in %v buckets: nine items meet in one pair with probability %.2g", capacity, n, p)
		}
	}
	for _, width := range []uint64{8, 16} {
		f := newCuckooFilter(scaled(1_200_000), width)
		for float64(f.Len()) < 0.96*float64(f.slots()) {
			if !f.insertHash(rand.Uint64()) {
				t.Fatalf("%d bits: an insert failed at load %.4f, capacity is at %.4f", width, f.LoadFactor(), float64(f.Cap())/float64(f.slots()))
			}
		}
	}
}

func TestFilterFailedInsertChangesNothing(t *testing.T) {
	t.Parallel()
	for _, width := range []uint64{8, 16, 21, 32} {
		f := newCuckooFilter(2000, width)
		var items []string
		failed := 0
		for i := 0; failed < 20; i++ {
			item := fmt.Sprint(i)
			before, size := f.contents(), f.Len()
			if f.Insert(item) {
				items = append(items, item)
				continue
			}
			failed++
			if !slices.Equal(f.contents(), before) || f.Len() != size {
				t.Fatalf("%d bits: a failed insert changed the filter", width)
			}
		}
		if len(items) < f.Cap() || f.Len() != len(items) {
			t.Errorf("%d bits: %d of %d items are in, Len() = %d", width, len(items), f.Cap(), f.Len())
		}
		wantAll(t, f, items)
	}
}

func TestFilterHoldsEightCopies(t *testing.T) {
	t.Parallel()
	for _, width := range []uint64{8, 16, 19, 32} {
		f := newCuckooFilter(5000, width)
		others := fill(t, f, "other", 4000)
		for i := range scaled(50) {
			item := fmt.Sprint("again", i)
			fp, bucket := f.locate(hashOf(item))
			want := 8 // less the items that happen to have the same two buckets, and so cannot make room
			for c, n := range f.cells() {
				if c.bucket == min(bucket, f.partner(fp, bucket)) && f.partner(c.fp, c.bucket) == max(bucket, f.partner(fp, bucket)) {
					want -= n
				}
			}
			mates := f.cells()[f.cellOf(fp, bucket)] // of those, the ones mistaken for item
			for n := range want {
				if !f.Insert(item) {
					t.Fatalf("%d bits: Insert of copy %d of %d = false", width, n+1, want)
				}
			}
			before := f.contents()
			if f.Insert(item) || !slices.Equal(f.contents(), before) {
				t.Fatalf("%d bits: Insert of one copy more = true or changed the filter", width)
			}
			wantAll(t, f, others)
			for n := range want {
				if !f.Lookup(item) || !f.Delete(item) {
					t.Fatalf("%d bits: copy %d of %d is missing", width, n+1, want)
				}
			}
			if got := f.Lookup(item); got != (mates > 0) {
				t.Fatalf("%d bits: Lookup after the last Delete = %v", width, got)
			}
		}
		if f.Len() != len(others) {
			t.Errorf("%d bits: Len() = %d, want %d", width, f.Len(), len(others))
		}
	}
}

// A filter is exactly a multiset of cells.
func TestFilterAgreesWithModel(t *testing.T) {
	t.Parallel()
	for _, width := range widths() {
		ops := make([]byte, 20_000)
		for i := range ops {
			ops[i] = byte(rand.Uint32())
		}
		checkModel(t, newCuckooFilter(40+rand.IntN(200), width), ops)
	}
}

func FuzzCuckooFilter(f *testing.F) {
	f.Add(10, 0.01, []byte("insert and delete"))
	f.Add(0, math.NaN(), []byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Add(-1, math.Inf(1), []byte{255, 0, 1, 2, 3, 128, 7})
	f.Fuzz(func(t *testing.T, capacity int, rate float64, ops []byte) {
		checkModel(t, NewCuckooFilterWithRate(min(capacity, 5000), rate), ops)
	})
}

// checkModel runs ops, two bytes each, and compares every answer with a map of cells.
func checkModel(t *testing.T, f *CuckooFilter, ops []byte) {
	model, size, filling := make(map[cell]int), 0, true
	for ; len(ops) >= 2; ops = ops[2:] {
		item := fmt.Sprint(int(ops[0]) + int(ops[1]&3)<<8)
		fp, bucket := f.locate(hashOf(item))
		c := f.cellOf(fp, bucket)
		op, inserts := ops[1]>>2, byte(40)
		if !filling {
			inserts = 10
		}
		switch {
		case op == 63 && ops[0] < 4:
			f.Reset()
			clear(model)
			size = 0
		case op < inserts:
			if f.Insert(item) {
				model[c]++
				size++
			} else if size < f.Cap()/2 && model[c] < 3 {
				t.Fatalf("Insert = false with %d items of %d", size, f.Cap())
			} else {
				filling = false
			}
		case op < 60:
			if got, want := f.Delete(item), model[c] > 0; got != want {
				t.Fatalf("Delete = %v with %d copies in", got, model[c])
			} else if want {
				model[c]--
				size--
				filling = filling || size < f.Cap()/2
			}
		}
		if got, want := f.Lookup(item), model[c] > 0; got != want {
			t.Fatalf("Lookup = %v with %d copies in", got, model[c])
		}
		if f.Len() != size {
			t.Fatalf("Len() = %d, want %d", f.Len(), size)
		}
	}
	maps.DeleteFunc(model, func(_ cell, n int) bool { return n == 0 })
	if got := f.cells(); !maps.Equal(got, model) {
		t.Fatalf("holds %v, want %v", got, model)
	}
}

func TestFilterLookupAllocatesNothing(t *testing.T) {
	for _, width := range []uint64{8, 13, 16, 32} {
		f := newCuckooFilter(1000, width)
		items := fill(t, f, "in", 1000)
		if n := testing.AllocsPerRun(1000, func() { f.Lookup(items[0]); f.Lookup("absent") }); n != 0 {
			t.Errorf("%d bits: Lookup allocates %v times", width, n)
		}
	}
}

func TestFilterCloneIsIndependent(t *testing.T) {
	f := NewCuckooFilterWithRate(1000, 1e-5)
	items := fill(t, f, "in", 900)
	c := f.Clone()
	if c.Len() != 900 || c.Cap() != 1000 || c.Stats() != f.Stats() {
		t.Errorf("clone has %+v, want %+v", c.Stats(), f.Stats())
	}
	f.Reset()
	wantAll(t, c, items)
	c.Delete(items[0])
	fill(t, c, "more", 100)
	if f.Len() != 0 || c.Len() != 999 {
		t.Errorf("Len() = %d and of the clone %d, want 0 and 999", f.Len(), c.Len())
	}
}

func TestFilterUnion(t *testing.T) {
	f, other := NewCuckooFilter(1000), NewCuckooFilter(1000)
	mine, theirs := fill(t, f, "mine", 400), fill(t, other, "theirs", 400)
	fill(t, f, "both", 50)
	both := fill(t, other, "both", 50)
	want := f.cells()
	for c, n := range other.cells() {
		want[c] += n
	}
	before := other.contents()
	if err := f.Union(other); err != nil {
		t.Fatal(err)
	}
	if f.Len() != 900 || !maps.Equal(f.cells(), want) {
		t.Errorf("union has %d items, or the wrong ones", f.Len())
	}
	if other.Len() != 450 || !slices.Equal(other.contents(), before) {
		t.Error("Union changed the other filter")
	}
	wantAll(t, f, slices.Concat(mine, theirs, both))
	for _, item := range both { // each is in twice
		if !f.Delete(item) || !f.Lookup(item) || !f.Delete(item) {
			t.Fatalf("%q is not in the union twice", item)
		}
	}
}

func TestFilterUnionOfDifferentShapesIsAnError(t *testing.T) {
	f := NewCuckooFilter(1000)
	fill(t, f, "in", 10)
	before := f.contents()
	for _, other := range []*CuckooFilter{nil, NewCuckooFilter(1001), NewCuckooFilter(2000), newCuckooFilter(1000, 15)} {
		if other != nil {
			fill(t, other, "other", 10)
		}
		if err := f.Union(other); err == nil {
			t.Errorf("Union with %+v = nil", other)
		}
		if !slices.Equal(f.contents(), before) || f.Len() != 10 {
			t.Fatal("a failed Union changed the filter")
		}
	}
}

func TestFilterUnionThatDoesNotFitChangesNothing(t *testing.T) {
	f, other := newCuckooFilter(1000, 12), newCuckooFilter(1000, 12)
	items := fill(t, f, "mine", 900)
	fill(t, other, "theirs", 900)
	want := f.cells()
	if err := f.Union(other); err == nil {
		t.Fatal("Union of 1800 items in room for 1000 = nil")
	}
	if f.Len() != 900 || !maps.Equal(f.cells(), want) {
		t.Error("a failed Union changed what is in the filter")
	}
	wantAll(t, f, items)
}

func TestFilterUnionWithItself(t *testing.T) {
	f := NewCuckooFilter(1000)
	items := fill(t, f, "in", 300)
	if err := f.Union(f); err != nil {
		t.Fatal(err)
	}
	if f.Len() != 600 {
		t.Errorf("Len() = %d, want 600", f.Len())
	}
	wantAll(t, f, items)
}

func TestFilterReset(t *testing.T) {
	f := NewCuckooFilter(1000)
	items := fill(t, f, "in", 1000)
	f.Reset()
	for _, item := range items {
		if f.Lookup(item) {
			t.Fatalf("Lookup(%q) = true after Reset", item)
		}
	}
	if f.Len() != 0 || f.Cap() != 1000 {
		t.Errorf("Len() = %d, Cap() = %d, want 0 and 1000", f.Len(), f.Cap())
	}
	wantAll(t, f, fill(t, f, "again", 1000))
}

func TestFilterStats(t *testing.T) {
	f := newCuckooFilter(1000, 10)
	fill(t, f, "in", 600)
	filled := make(map[uint64]bool)
	for slot := range f.slots() {
		if f.get(slot*f.bits) != 0 {
			filled[slot/4] = true
		}
	}
	got := f.Stats()
	want := FilterStats{
		Size: 600, Capacity: 1000, Buckets: 298, FilledBuckets: len(filled), BucketSize: 4, FingerprintBits: 10, Slots: 1192,
		LoadFactor: 600.0 / 1192, FalsePositiveRate: f.FalsePositiveRate(), Bytes: 187 * 8,
	}
	if got != want {
		t.Errorf("Stats() = %+v, want %+v", got, want)
	}
	if f.LoadFactor() != want.LoadFactor {
		t.Errorf("LoadFactor() = %v, want %v", f.LoadFactor(), want.LoadFactor)
	}
}

// The four below fail with the Python library's filter.

func TestUpstreamBugFilterEmptyAtStart(t *testing.T) {
	f := NewCuckooFilter(100)
	if f.Lookup("a") || f.Delete("a") || f.Len() != 0 {
		t.Error("an empty filter holds something")
	}
	if !f.Insert("a") || !f.Lookup("a") {
		t.Error("an empty filter takes nothing")
	}
}

func TestUpstreamBugItemsLostAtHighLoad(t *testing.T) {
	t.Parallel()
	f := NewCuckooFilterWithRate(99_600, 0.03) // 8 bits, 26,526 buckets
	if n := f.Stats().Buckets; n&(n-1) == 0 {
		t.Fatalf("%d buckets are a power of two", n)
	}
	items := fill(t, f, "key", int(0.95*float64(f.slots())))
	wantAll(t, f, items)
}

func TestUpstreamBugDuplicatesFillBuckets(t *testing.T) {
	f := NewCuckooFilter(1000)
	others := fill(t, f, "other", 900)
	taken := 0
	for range 1000 {
		if f.Insert("same") {
			taken++
		}
	}
	if taken < 4 || taken > 8 || f.Len() != 900+taken { // rarely, other items have the same two buckets
		t.Errorf("took %d copies, Len() = %d, want 8 and 908", taken, f.Len())
	}
	if n := testing.AllocsPerRun(100, func() { f.Insert("same") }); n != 0 {
		t.Errorf("Insert of a ninth copy searches far and allocates %v times", n)
	}
	wantAll(t, f, others)
	for range taken {
		f.Delete("same")
	}
	if f.Lookup("same") || f.Len() != 900 {
		t.Error("a copy was left behind")
	}
}

func TestUpstreamBugDeleteOfWhatWasNeverInserted(t *testing.T) {
	f := newCuckooFilter(1000, 32) // no false positives to be expected
	items := fill(t, f, "in", 1000)
	for i := range 10_000 {
		if f.Delete(fmt.Sprint("out", i)) {
			t.Fatalf("Delete of an item that is not in = true")
		}
	}
	if f.Len() != 1000 {
		t.Errorf("Len() = %d, want 1000", f.Len())
	}
	wantAll(t, f, items)
}
