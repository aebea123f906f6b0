package fastpgcache

import (
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"math/bits"
	"sync"
	"sync/atomic"
)

const (
	slotsPerBucket    = 4
	maxFilterCapacity = 1 << 30
	maxHops           = 1024 // of a search for an empty slot; within the capacity it takes dozens, seldom hundreds
	maxLookupTries    = 16
	moveStripes       = 32
)

// filterSeed is shared by all filters of the process, so that they can be united.
var filterSeed = maphash.MakeSeed()

// A CuckooFilter is a set of strings that remembers only a fingerprint of each:
// Lookup is always right about an item that is in it, and takes one that is not
// for a member at a small, known rate. Unlike in a Bloom filter, items can be
// deleted. It is in memory only, and of no use to another process.
//
// It is the filter of Fan, Andersen, Kaminsky and Mitzenmacher, "Cuckoo Filter:
// Practically Better Than Bloom", CoNEXT 2014, with buckets of four, and differs
// from it in this:
//
//   - The number of buckets n is any even number instead of a power of two, which
//     can waste half of the memory. The partner of bucket i is (h - i) mod n, where
//     h is an odd hash of the fingerprint: the partner's partner is i again, and
//     the two are never the same bucket, so there is room for eight copies of any item.
//   - An insert first searches breadth-first for the shortest way to an empty
//     slot and then moves fingerprints along it, from the far end. The paper
//     evicts at random until it gives up, and then has lost an item.
//   - Lookups take no lock: writers count the fingerprints they move, in stripes
//     by fingerprint, and a lookup that found nothing looks again if the count has
//     changed (as in MemC3, Fan et al., NSDI 2013).
//   - Fingerprints are drawn evenly from 1 to 2^bits - 1, since 0 marks an empty
//     slot, and are packed without padding, but not semi-sorted.
//
// The methods are safe for concurrent use. Lookups allocate nothing and are never
// blocked; the other operations that change or copy the filter take turns.
// Create one with NewCuckooFilter or NewCuckooFilterWithRate.
type CuckooFilter struct {
	words   []atomic.Uint64 // the slots of all buckets, packed; 0 is an empty slot
	buckets uint64          // even
	bits    uint64          // of a fingerprint
	mask    uint64          // 2^bits - 1
	lanes   uint64          // fingerprints compared at once: as many of 4 or 2 as fit 64 bits
	ones    uint64          // 1 in each lane

	capacity int

	// moves counts the occupied slots that were overwritten, striped by the
	// fingerprint they held. See lookupHash.
	moves [moveStripes]atomic.Uint64

	mu   sync.Mutex   // held by whoever writes words
	size atomic.Int64 // written under mu
}

// FilterStats describes a CuckooFilter. While others write, FilledBuckets is approximate.
type FilterStats struct {
	Size              int     // items in it, each copy counted
	Capacity          int     // items that fit for certain
	Buckets           int     // of BucketSize slots each
	FilledBuckets     int     // buckets with at least one item
	BucketSize        int     // always 4
	FingerprintBits   int     // 8 to 32
	Slots             int     // Buckets × BucketSize
	LoadFactor        float64 // Size / Slots
	FalsePositiveRate float64 // expected at this load, from 0 to 1
	Bytes             int     // memory held by the slots
}

// NewCuckooFilter returns an empty filter that takes capacity distinct items with
// 16-bit fingerprints: 2.13 bytes an item and 0.0115 % false positives when it holds
// them all, and a few hundred bytes more. Below 1, capacity is taken as 1; above 2^30, as 2^30.
func NewCuckooFilter(capacity int) *CuckooFilter {
	return newCuckooFilter(capacity, 16)
}

// NewCuckooFilterWithRate is like NewCuckooFilter, but has the shortest fingerprints
// of 8 to 32 bits with which at most falsePositiveRate (0.01 is one percent) of the
// lookups of absent items answer true when the filter holds capacity items. A rate above what 8 bits
// give (3 %) gets 8 bits; one below what 32 bits give (2e-9), zero, negative or NaN, 32.
func NewCuckooFilterWithRate(capacity int, falsePositiveRate float64) *CuckooFilter {
	capacity = min(max(capacity, 1), maxFilterCapacity)
	load := float64(capacity) / float64(slotsPerBucket*bucketsFor(capacity))
	width := uint64(8)
	for width < 32 && !(falsePositives(width, load) <= falsePositiveRate) {
		width++
	}
	return newCuckooFilter(capacity, width)
}

func newCuckooFilter(capacity int, width uint64) *CuckooFilter {
	capacity = min(max(capacity, 1), maxFilterCapacity)
	f := &CuckooFilter{
		buckets:  bucketsFor(capacity),
		bits:     width,
		mask:     1<<width - 1,
		lanes:    2,
		ones:     1 | 1<<width,
		capacity: capacity,
	}
	if width <= 16 {
		f.lanes = 4
		f.ones |= f.ones << (2 * width)
	}
	f.words = make([]atomic.Uint64, (f.slots()*width+63)/64)
	return f
}

// bucketsFor leaves 6 % of the slots empty at capacity, and 32 buckets more for the sake of small
// filters, where a few items with the same two buckets are likelier. With these the chance that
// some item within the capacity finds no place is below one in a billion.
func bucketsFor(capacity int) uint64 {
	return 2 * (uint64(capacity)*25/188 + 17)
}

// falsePositives is the chance that a fingerprint equals one of those in its two buckets.
func falsePositives(width uint64, load float64) float64 {
	return -math.Expm1(2 * slotsPerBucket * load * math.Log1p(-1/float64(uint64(1)<<width-1)))
}

// Insert adds item and reports whether it found room; if not, nothing has changed.
// There is room for capacity distinct items, and beyond that as long as luck lasts. An item
// inserted n times is in the filter n times, up to eight, or
// fewer where other items hold the slots of its two buckets.
func (f *CuckooFilter) Insert(item string) bool { return f.insertHash(hashOf(item)) }

// Lookup reports whether item may be in the filter. False is certain.
func (f *CuckooFilter) Lookup(item string) bool { return f.lookupHash(hashOf(item)) }

// Delete removes one copy of item and reports whether there was one. Delete only what was
// inserted: for an item that never was, it answers false, except when Lookup answers true
// by mistake; then it removes the other item that is mistaken for it.
func (f *CuckooFilter) Delete(item string) bool { return f.deleteHash(hashOf(item)) }

func hashOf(item string) uint64 { return maphash.String(filterSeed, item) }

func (f *CuckooFilter) insertHash(hash uint64) bool {
	fp, bucket := f.locate(hash)
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.insert(fp, bucket)
}

// lookupHash cannot miss a fingerprint that moves between its two buckets while it reads them:
// the new copy is written, then moves is counted, then the old one is overwritten. So either
// the reader sees a copy or it sees the count change. Under a storm of writes it
// ends with "maybe", which a filter may always answer.
func (f *CuckooFilter) lookupHash(hash uint64) bool {
	fp, bucket := f.locate(hash)
	partner := f.partner(fp, bucket)
	moves := &f.moves[fp%moveStripes]
	for range maxLookupTries {
		before := moves.Load()
		if _, ok := f.find(fp, bucket); ok {
			return true
		}
		if _, ok := f.find(fp, partner); ok {
			return true
		}
		if moves.Load() == before {
			return false
		}
	}
	return true
}

func (f *CuckooFilter) deleteHash(hash uint64) bool {
	fp, bucket := f.locate(hash)
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.remove(fp, bucket)
}

// locate takes the fingerprint from the low half of the hash and the bucket from the high half.
func (f *CuckooFilter) locate(hash uint64) (fp, bucket uint64) {
	return hash&math.MaxUint32*f.mask>>32 + 1, hash >> 32 * f.buckets >> 32
}

// partner returns the other bucket where fp may be. As the sum of the two is odd, modulo an even
// number, they differ. The sums must be spread at random: with evenly spaced ones (a single
// multiplication) a filter of 8 bits is full at 95 % load instead of 97 %.
func (f *CuckooFilter) partner(fp, bucket uint64) uint64 {
	h := fp * 0x9e3779b97f4a7c15
	h = (h ^ h>>32) * 0xd6e8feb86659fd93
	sum := h>>32*(f.buckets/2)>>32*2 + 1
	if sum < bucket {
		sum += f.buckets
	}
	return sum - bucket
}

// insert adds one copy of fp. f.mu is held.
func (f *CuckooFilter) insert(fp, bucket uint64) bool {
	partner := f.partner(fp, bucket)
	slot, ok := f.find(0, bucket)
	// Rather the emptier bucket, or what is likely to be it: that halves the later searches.
	if s, free := f.find(0, partner); free && (!ok || s-f.firstSlot(partner) < slot-f.firstSlot(bucket)) {
		slot, ok = s, true
	}
	if !ok {
		slot, ok = f.makeRoom(bucket, partner)
	}
	if ok {
		f.set(slot, fp)
		f.size.Add(1)
	}
	return ok
}

// A hop is a full bucket that a search has reached, and how: by moving the fingerprint in slot
// there, from the bucket of an earlier hop.
type hop struct {
	bucket, slot uint64
	from         int // index of the earlier hop; unused in the first two
}

// makeRoom moves fingerprints to their other buckets so that one of two full buckets gets an
// overwritable slot, which it returns. The search is breadth-first: the first empty slot ends
// a shortest path, and that cannot visit a bucket twice. f.mu is held.
func (f *CuckooFilter) makeRoom(bucket, partner uint64) (slot uint64, ok bool) {
	hops := append(make([]hop, 0, 64), hop{bucket: bucket}, hop{bucket: partner})
	for i := 0; i < len(hops) && len(hops) < maxHops; i++ {
		from := hops[i].bucket
		for lane := range uint64(slotsPerBucket) {
			slot := f.firstSlot(from) + lane*f.bits
			next := f.partner(f.get(slot), from)
			if empty, ok := f.find(0, next); ok {
				f.set(empty, f.get(slot))
				for ; i >= 2; i = hops[i].from {
					f.set(slot, f.get(hops[i].slot))
					slot = hops[i].slot
				}
				return slot, true
			}
			if next != bucket && next != partner { // else eight copies of one item would search in vain for long
				hops = append(hops, hop{next, slot, i})
			}
		}
	}
	return 0, false
}

// remove takes one copy of fp out. f.mu is held.
func (f *CuckooFilter) remove(fp, bucket uint64) bool {
	slot, ok := f.find(fp, bucket)
	if !ok {
		slot, ok = f.find(fp, f.partner(fp, bucket))
	}
	if ok {
		f.set(slot, 0)
		f.size.Add(-1)
	}
	return ok
}

// firstSlot returns where bucket begins. Slots are addressed by their position in words, in bits.
func (f *CuckooFilter) firstSlot(bucket uint64) uint64 { return bucket * slotsPerBucket * f.bits }

// find returns the first slot of bucket that holds fp. It compares all lanes at once: x is zero in the lanes
// that hold fp, and the lowest bit set in zero is the top bit of the first of them (Warren, Hacker's Delight, 6-1).
func (f *CuckooFilter) find(fp, bucket uint64) (slot uint64, ok bool) {
	slot = f.firstSlot(bucket)
	for lane := uint64(0); lane < slotsPerBucket; lane += f.lanes {
		x := f.load(slot, f.lanes*f.bits) ^ fp*f.ones
		if zero := (x - f.ones) &^ x & (f.ones << (f.bits - 1)); zero != 0 {
			return slot + uint64(bits.TrailingZeros64(zero)) - (f.bits - 1), true
		}
		slot += f.lanes * f.bits
	}
	return 0, false
}

func (f *CuckooFilter) get(slot uint64) uint64 { return f.load(slot, f.bits) & f.mask }

// load returns the width bits at position pos, and anything above them. Where they lie across two words it may see a
// fingerprint half-written, but never another one changed.
func (f *CuckooFilter) load(pos, width uint64) uint64 {
	i, shift := pos/64, pos%64
	v := f.words[i].Load() >> shift
	if shift+width > 64 {
		v |= f.words[i+1].Load() << (64 - shift)
	}
	return v
}

// set writes a slot. What the slot held is deleted or has been copied to its new slot before. f.mu is held.
func (f *CuckooFilter) set(slot, fp uint64) {
	if old := f.get(slot); old != 0 {
		f.moves[old%moveStripes].Add(1)
	}
	i, shift := slot/64, slot%64
	f.words[i].Store(f.words[i].Load()&^(f.mask<<shift) | fp<<shift)
	if shift+f.bits > 64 {
		f.words[i+1].Store(f.words[i+1].Load()&^(f.mask>>(64-shift)) | fp>>(64-shift))
	}
}

// Len returns the number of items in the filter, each copy counted.
func (f *CuckooFilter) Len() int { return int(f.size.Load()) }

// Cap returns the number of distinct items that fit for certain.
func (f *CuckooFilter) Cap() int { return f.capacity }

func (f *CuckooFilter) slots() uint64 { return f.buckets * slotsPerBucket }

// LoadFactor returns the part of the slots that are taken, from 0 to 1.
func (f *CuckooFilter) LoadFactor() float64 { return float64(f.Len()) / float64(f.slots()) }

// FalsePositiveRate returns the expected part, from 0 to 1, of the lookups of absent items that now answer true.
// With many copies of the same items it is less.
func (f *CuckooFilter) FalsePositiveRate() float64 { return falsePositives(f.bits, f.LoadFactor()) }

// Stats returns the filter's figures. It reads every bucket, which takes milliseconds for a million items;
// the other methods that report a figure read only a counter.
func (f *CuckooFilter) Stats() FilterStats {
	size, filled := f.Len(), 0
	load := float64(size) / float64(f.slots())
	for bucket := range f.buckets {
		slot := f.firstSlot(bucket)
		if f.get(slot)|f.get(slot+f.bits)|f.get(slot+2*f.bits)|f.get(slot+3*f.bits) != 0 {
			filled++
		}
	}
	return FilterStats{
		Size:              size,
		Capacity:          f.capacity,
		Buckets:           int(f.buckets),
		FilledBuckets:     filled,
		BucketSize:        slotsPerBucket,
		FingerprintBits:   int(f.bits),
		Slots:             int(f.slots()),
		LoadFactor:        load,
		FalsePositiveRate: falsePositives(f.bits, load),
		Bytes:             8 * len(f.words),
	}
}

// Reset removes every item and keeps the memory.
func (f *CuckooFilter) Reset() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.words {
		f.words[i].Store(0)
	}
	f.size.Store(0)
}

// Clone returns an independent copy, as of one moment between two writes.
func (f *CuckooFilter) Clone() *CuckooFilter {
	c := newCuckooFilter(f.capacity, f.bits)
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.words {
		c.words[i].Store(f.words[i].Load())
	}
	c.size.Store(f.size.Load())
	return c
}

// Union inserts every item of other, with all its copies; other does not change. It is an error, and f keeps
// what it had, if the two differ in capacity or fingerprint bits, or if not everything fits.
// Lookups that run meanwhile may see a part of other already.
func (f *CuckooFilter) Union(other *CuckooFilter) error {
	if other == nil {
		return errors.New("fastpgcache: union with a nil filter")
	}
	if f.capacity != other.capacity || f.bits != other.bits {
		return fmt.Errorf("fastpgcache: union of different filters: capacity %d with %d-bit fingerprints and capacity %d with %d-bit ones",
			f.capacity, f.bits, other.capacity, other.bits)
	}
	added := other.Clone() // so that only one lock is held at a time, and other may be f
	f.mu.Lock()
	defer f.mu.Unlock()
	for slot := range added.slots() {
		if fp := added.get(slot * f.bits); fp == 0 || f.insert(fp, slot/slotsPerBucket) {
			continue
		}
		for undo := range slot {
			if fp := added.get(undo * f.bits); fp != 0 {
				f.remove(fp, undo/slotsPerBucket)
			}
		}
		return fmt.Errorf("fastpgcache: union does not fit: %d items and %d more in %d slots", f.Len(), added.Len(), f.slots())
	}
	return nil
}
