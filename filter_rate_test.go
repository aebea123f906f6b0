package fastpgcache

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
)

func TestFilterFalsePositivesMatchTheory(t *testing.T) {
	t.Parallel()
	for _, width := range widths() {
		f := newCuckooFilter(1000, width)
		fill(t, f, "in", f.Cap())
		theory := 2 * slotsPerBucket * f.LoadFactor() / float64(uint64(1)<<width)
		var measured float64
		if lookups := int(1000 / theory); width <= 10 {
			for i := range lookups {
				if f.lookupHash(hashOf(fmt.Sprint("out", i))) {
					measured += 1 / float64(lookups)
				}
			}
		} else {
			// Too rare to wait for: look up only fingerprints that are in the filter, and weigh each hit by how
			// much likelier than at random that made it.
			var fps []uint64
			count := make(map[uint64]float64)
			for c, n := range f.cells() {
				for range n {
					fps = append(fps, c.fp)
					count[c.fp]++
				}
			}
			lookups := 150_000
			for i := range lookups {
				fp := fps[i%len(fps)]
				if f.lookupHash(f.hashAt(fp, rand.Uint64N(f.buckets))) {
					measured += float64(len(fps)) / float64(f.mask) / count[fp] / float64(lookups)
				}
			}
		}
		if ratio := measured / theory; ratio > 1.2 || ratio < 1/1.2 {
			t.Errorf("%d bits: %.3g measured, %.3g in theory: %.2f times", width, measured, theory, ratio)
		}
		if ratio := measured / f.FalsePositiveRate(); ratio > 1.2 || ratio < 1/1.2 {
			t.Errorf("%d bits: %.3g measured, %.3g estimated: %.2f times", width, measured, f.FalsePositiveRate(), ratio)
		}
	}
}

func TestFilterEstimateFollowsLoad(t *testing.T) {
	t.Parallel()
	f := newCuckooFilter(30_000, 8)
	if got := f.FalsePositiveRate(); got != 0 {
		t.Errorf("FalsePositiveRate() of an empty filter = %v", got)
	}
	check := func() {
		t.Helper()
		hits := 0.0
		for range 200_000 {
			if f.lookupHash(rand.Uint64()) {
				hits++
			}
		}
		if ratio := hits / 200_000 / f.FalsePositiveRate(); ratio > 1.2 || ratio < 1/1.2 {
			t.Errorf("at load %.2f: %.2f times the estimate of %.4f", f.LoadFactor(), ratio, f.FalsePositiveRate())
		}
	}
	first := fill(t, f, "first", 10_000)
	check()
	fill(t, f, "second", 20_000)
	check()
	for _, item := range first {
		f.Delete(item)
	}
	check()
}

func TestFilterWidthFollowsRate(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		rate float64
		bits int
	}{
		{math.Inf(1), 8}, {2, 8}, {1, 8}, {0.05, 8}, {0.03, 8}, {0.01, 10}, {0.001, 13}, {0.0001, 17}, {1e-6, 23}, {2e-9, 32},
		{1e-12, 32}, {0, 32}, {-1, 32}, {math.Inf(-1), 32}, {math.NaN(), 32},
	} {
		f := NewCuckooFilterWithRate(5000, tt.rate)
		if got := f.Stats().FingerprintBits; got != tt.bits {
			t.Errorf("rate %v: %d bits, want %d", tt.rate, got, tt.bits)
		}
		fill(t, f, "in", f.Cap())
		if got := f.FalsePositiveRate(); tt.rate >= 2e-9 && got > tt.rate {
			t.Errorf("rate %v: FalsePositiveRate() = %v when full", tt.rate, got)
		}
	}
	if got := NewCuckooFilter(10).Stats().FingerprintBits; got != 16 {
		t.Errorf("NewCuckooFilter has %d bits, want 16", got)
	}
}

func TestFilterBytesPerKey(t *testing.T) {
	t.Parallel()
	n := scaled(1_000_000)
	f := NewCuckooFilter(n)
	for range n {
		if !f.insertHash(rand.Uint64()) {
			t.Fatalf("an insert failed with %d items of %d", f.Len(), n)
		}
	}
	if got := float64(f.Stats().Bytes) / float64(n); got > 2.3 {
		t.Errorf("%.3f bytes per key, want at most 2.3", got)
	}
	hits := 0
	const lookups = 1_000_000
	for range lookups {
		if f.lookupHash(rand.Uint64()) {
			hits++
		}
	}
	if got := float64(hits) / lookups; got > 0.0002 || f.FalsePositiveRate() > 0.0002 {
		t.Errorf("%.6f false positives, %.6f estimated, want at most 0.0002", got, f.FalsePositiveRate())
	}
	for _, rate := range []float64{0.03, 0.01, 1e-4, 1e-6, 2e-9} {
		s := NewCuckooFilterWithRate(n, rate).Stats()
		if got, want := float64(s.Bytes)/float64(n), float64(s.FingerprintBits)/8/0.93; got > want {
			t.Errorf("rate %v: %.3f bytes per key, want at most %.3f", rate, got, want)
		}
	}
}

// Other than by memory, a capacity is limited by the 32 bits of the hash that choose a bucket.
func TestFilterCapacityIsBounded(t *testing.T) {
	if got := bucketsFor(maxFilterCapacity); got > math.MaxUint32 || got%2 != 0 {
		t.Errorf("%d buckets for the largest capacity", got)
	}
}
