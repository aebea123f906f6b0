package fastpgcache

import (
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/maypok86/otter/v2"
)

const (
	keptStripes  = 4096
	keptOverhead = 192 // bytes that a kept value takes beside its key and itself, measured
	keptShare    = 64  // a value that takes more than this part of all is not kept
)

// kept holds values in memory and knows which of them may still be answered. It knows
// no SQL and no clock: a feed tells it what has changed, and when that was known.
//
// What holds at any time: a value of the current generation was true at some moment
// since current.at, or is newer. For that
//
//   - a lookup and a write take a ticket before they are sent. What they bring is
//     held only if no change of the key has been heard of since;
//   - whoever hears of a change drops the value and raises the key's stripe, under the
//     lock of the key, before a moment is published that knows the change;
//   - with any doubt a reset begins a new generation. All that was held is garbage then.
//
// This was explored by a model, see kept_model_test.go, which also shows for each rule
// what goes wrong without it.
type kept struct {
	values  *otter.Cache[string, *keptValue] // nil: none are held
	largest int                              // bytes of a value that is held
	evicted atomic.Int64                     // values that had to go for others

	// stripes count the changes heard of, each those of some of the keys.
	stripes [keptStripes]atomic.Uint64

	// current is nil while nothing may be answered.
	current atomic.Pointer[moment]

	mu         sync.Mutex // held by whoever replaces current
	generation int64      // of the next moment, or the current one
	resets     atomic.Int64
}

// moment says as of when the values of a generation are true.
type moment struct {
	at         instant // before the server was asked
	server     int64   // the server's clock at or after at, in microseconds
	generation int64
}

// keptValue never changes once it is held.
type keptValue struct {
	text       string
	expires    int64 // by the server's clock, in microseconds; noExpiry: never
	xid        int64 // the transaction of ours that wrote it; 0 for what a lookup brought
	generation int64
}

// noExpiry is the time at which an entry without a TTL expires.
const noExpiry = math.MaxInt64

// left is how long v will live, in microseconds, age after m; at most 0 if it does not.
func (v *keptValue) left(m *moment, age time.Duration) int64 {
	if v.expires == noExpiry {
		return noExpiry
	}
	return v.expires - m.server - int64(age/time.Microsecond) - 1
}

// ticket is taken before a statement about a key is sent. It tells afterwards whether
// what the statement brought may be held.
type ticket struct {
	generation int64 // 0: nothing is held
	stripe     int
	count      uint64
}

// newKept returns a store of values that take bytes of memory in all, or of none.
func newKept(bytes int) *kept {
	k := &kept{generation: 1}
	if bytes > 0 {
		k.largest = bytes / keptShare
		k.values = otter.Must(&otter.Options[string, *keptValue]{
			MaximumWeight: uint64(bytes),
			Weigher: func(key string, v *keptValue) uint32 {
				return uint32(keptOverhead + len(key) + len(v.text))
			},
			OnAtomicDeletion: func(e otter.DeletionEvent[string, *keptValue]) { // a StatsRecorder costs each hit 5 ns
				if e.WasEvicted() {
					k.evicted.Add(1)
				}
			},
		})
	}
	return k
}

// get returns the value of key if it is one of m's, expired or not. The caller has
// loaded m before, and read the clock after that.
func (k *kept) get(key string, m *moment) (*keptValue, bool) {
	if k.values == nil {
		return nil, false
	}
	v, ok := k.values.GetIfPresent(key)
	return v, ok && v.generation == m.generation
}

// ticket returns a ticket for the key with this hash.
func (k *kept) ticket(hash uint64) ticket {
	t := ticket{stripe: int(hash % keptStripes)}
	if m := k.current.Load(); m != nil {
		t.generation, t.count = m.generation, k.stripes[t.stripe].Load()
	}
	return t
}

// fits reports whether a value of this length may be held.
func (k *kept) fits(length int) bool { return length <= k.largest }

// valid reports whether t is of the generation that is answered from.
func (k *kept) valid(t ticket) bool {
	m := k.current.Load()
	return m != nil && t.generation == m.generation
}

// keep holds what a lookup brought, unless a change of key was heard of meanwhile. A
// value that is held already and differs is of another time, and nobody can say
// which is the later one: neither is held then.
func (k *kept) keep(key string, t ticket, text string, expires int64) {
	if t.generation == 0 || k.values == nil || !k.fits(len(text)) {
		return
	}
	key = strings.Clone(key) // it may be cut from something large
	k.values.Compute(key, func(old *keptValue, held bool) (*keptValue, otter.ComputeOp) {
		switch {
		case !k.valid(t) || k.stripes[t.stripe].Load() != t.count:
			return nil, otter.CancelOp
		case !held || old.generation != t.generation:
			return &keptValue{text, expires, 0, t.generation}, otter.WriteOp
		case old.text == text && old.expires == expires:
			return nil, otter.CancelOp
		}
		k.stripes[t.stripe].Add(1)
		return nil, otter.InvalidateOp
	})
}

// written ends a write of keys, whether it succeeded or not. What it stored is held
// where its ticket says so; a nil value is dropped. It returns before the writer hears
// of the end of its write.
func (k *kept) written(keys []string, tickets []ticket, values []*keptValue) {
	if k.values == nil {
		return
	}
	var own map[int]uint64 // how often we have raised a stripe ourselves
	if len(keys) > 1 {
		own = make(map[int]uint64, len(keys))
	}
	for i, key := range keys {
		t, v := tickets[i], values[i]
		count := t.count + own[t.stripe]
		if v != nil {
			key, v.generation = strings.Clone(key), t.generation
		}
		k.values.Compute(key, func(*keptValue, bool) (*keptValue, otter.ComputeOp) {
			keep := v != nil && k.fits(len(v.text)) && k.valid(t) && k.stripes[t.stripe].Load() == count
			k.stripes[t.stripe].Add(1)
			if !keep {
				return nil, otter.InvalidateOp
			}
			return v, otter.WriteOp
		})
		if own != nil {
			own[t.stripe]++
		}
	}
}

// changed drops what is held of key, unless xid wrote that very value, and sees to it
// that no lookup on its way brings back what was before. A value of another generation
// may be of another transaction of that number: they run again after a crash.
func (k *kept) changed(key string, hash uint64, xid int64) {
	if k.values == nil {
		return
	}
	stripe := int(hash % keptStripes)
	k.values.Compute(key, func(old *keptValue, held bool) (*keptValue, otter.ComputeOp) {
		if m := k.current.Load(); held && old.xid == xid && m != nil && old.generation == m.generation {
			return nil, otter.CancelOp
		}
		k.stripes[stripe].Add(1)
		return nil, otter.InvalidateOp
	})
}

// publish replaces the current moment by a later one of its generation.
func (k *kept) publish(next moment) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	m := k.current.Load()
	if m == nil || m.generation != next.generation {
		return false
	}
	k.current.Store(&next)
	return true
}

// reset makes garbage of all that is held. Nothing is answered until begin.
func (k *kept) reset() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.generation++
	k.resets.Add(1)
	k.current.Store(nil)
}

// begin publishes the first moment of a generation, after a reset, and returns that.
func (k *kept) begin(at instant, server int64) (generation int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.current.Store(&moment{at, server, k.generation})
	return k.generation
}
