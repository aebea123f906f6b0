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

// note notes key, unless there is no room for it, or a key with its hash was noted.
func (r *reads) note(key string) {
	hash := hashOf(key)
	word, bit := &r.seen[hash/64%(seenBits/64)], uint64(1)<<(hash%64)
	if word.Load()&bit != 0 || r.full.Load() || word.Or(bit)&bit != 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.keys) < maxReads {
		r.keys = append(r.keys, strings.Clone(key)) // it may be cut from something large
	}
	r.full.Store(len(r.keys) == maxReads)
}

// take returns what was noted and makes room. Where most hashes are taken it forgets them.
func (r *reads) take() []string {
	r.mu.Lock()
	keys := r.keys
	r.keys = nil
	r.full.Store(false)
	r.all += len(keys)
	many := r.all > seenBits/4
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
