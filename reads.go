package fastpgcache

import (
	"strings"
	"sync"
	"sync/atomic"
)

// reads are keys that were read, each once until the next walk: what is read most is
// noted first, and noting it again costs two loads.
type reads struct {
	seen [seenBits / 64]atomic.Uint64

	full atomic.Bool
	mu   sync.Mutex
	keys []string // that nobody has taken yet
	all  int      // since the last forget
}

const (
	seenBits = 1 << 18
	maxReads = 1000
)

// note notes key, unless there is no room for it, or it was noted: three bits of a word say
// so. Of 10,000 keys they say it of ten too many, and a single bit said it of 180.
func (r *reads) note(key string) {
	hash := hashOf(key)
	word := &r.seen[hash%(seenBits/64)]
	bits := uint64(1)<<(hash>>40%64) | uint64(1)<<(hash>>46%64) | uint64(1)<<(hash>>52%64)
	if word.Load()&bits == bits || r.full.Load() || word.Or(bits)&bits == bits {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.keys) < maxReads {
		r.keys = append(r.keys, strings.Clone(key)) // it may be cut from something large
	}
	r.full.Store(len(r.keys) == maxReads)
}

// take returns what was noted and makes room. Where many bits are set it forgets all.
func (r *reads) take() []string {
	r.mu.Lock()
	keys := r.keys
	r.keys = nil
	r.full.Store(false)
	r.all += len(keys)
	many := r.all > seenBits/8
	r.mu.Unlock()
	if many {
		r.forget()
	}
	return keys
}

// forget lets every key be noted again.
func (r *reads) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range r.seen {
		r.seen[i].Store(0)
	}
	r.all = 0
}
