package fastpgcache

import (
	"errors"
	"sync"
	"sync/atomic"
)

// misses tells which keys certainly are not there, from a filter of those that may be.
// It knows no SQL: a feed loads it, and tells it of keys that others wrote. What holds
// at any time:
//
//   - A filter of the current generation has every key that was there at the current
//     moment, unless it was deleted since. So a key that it has not was absent then, or later.
//   - A key that this process has written is in the filter, and in the one being loaded,
//     before its writer hears of the end.
//   - No key ever leaves a filter: a deleted key may be inserted again, or an expired
//     row revived, unnoticed. The garbage goes with the filter.
type misses struct {
	current atomic.Pointer[keyFilter] // nil: none. Replaced under mu.

	falsePositives, loads atomic.Int64

	mu      sync.Mutex
	loading int64    // the generation of the filter that hashes become; 0: none
	hashes  []uint64 // of keys read, heard of or written by us, since loading began
	grown   int      // keys that the last filter took up after it was loaded
}

// keyFilter is a filter of one generation. Only its filter changes: it gains keys.
type keyFilter struct {
	filter     *CuckooFilter
	generation int64
	loaded     int // keys it was made of

	answers, falsePositives int64 // of all filters until this one was loaded
}

// absent reports whether the key with this hash certainly was absent at some moment
// since that of the generation which the caller has loaded before.
func (n *misses) absent(hash uint64, generation int64) bool {
	f := n.current.Load()
	return f != nil && f.generation == generation && !f.filter.lookupHash(hash)
}

// enter puts a key into the filter: what others wrote, when the feed tells of it, and what
// this process wrote, when the write has ended. What a user's transaction wrote comes
// with the feed, since it is committed later.
func (n *misses) enter(hash uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.loading != 0 {
		n.hashes = append(n.hashes, hash)
	}
	if f := n.current.Load(); f != nil && !hold(f.filter, hash) {
		n.drop(f)
	}
}

// hold reports whether filter holds hash now. What it has already, even by mistake,
// need not be in it twice, since nothing ever leaves it.
func hold(filter *CuckooFilter, hash uint64) bool {
	return filter.lookupHash(hash) || filter.insertHash(hash)
}

// drop takes f out of use. n.mu is held.
func (n *misses) drop(f *keyFilter) {
	if n.current.Load() == f {
		n.grown = f.filter.Len() - f.loaded
		n.current.Store(nil)
	}
}

// missed is told of a key that the database did not have, where the filter could not
// tell, after answers misses that it could. It reports whether a filter of this
// generation ought to be loaded: there is none, or it sends too many lookups to the
// database for nothing. That those lookups have cost a fair part of what loading costs
// bounds the loss where a new filter will be no better, because what is asked for are
// expired entries.
func (n *misses) missed(hash uint64, generation, answers int64) bool {
	f := n.current.Load()
	if f == nil || f.generation != generation {
		return true
	}
	if !f.filter.lookupHash(hash) {
		return false
	}
	falsePositives := n.falsePositives.Add(1) - f.falsePositives
	if falsePositives < int64(256+f.filter.Len()/16) || falsePositives < (answers-f.answers)/32 {
		return false
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.drop(f)
	return true
}

// load makes a filter for a generation that is current: of the keys that read enters,
// which must bring each that was there when load was called, and of those that are
// entered meanwhile by others.
func (n *misses) load(generation, answers int64, read func() error) error {
	n.mu.Lock()
	n.loading = generation
	n.mu.Unlock()
	defer func() {
		n.mu.Lock()
		n.loading, n.hashes = 0, nil
		n.mu.Unlock()
	}()
	if err := read(); err != nil {
		return err
	}
	n.mu.Lock()
	hashes := n.hashes
	f := &keyFilter{generation: generation, answers: answers, falsePositives: n.falsePositives.Load()}
	f.filter = NewCuckooFilter(len(hashes) + len(hashes)/16 + n.grown + 1024)
	n.mu.Unlock()
	fits := true
	for _, hash := range hashes { // meanwhile others enter more
		fits = fits && hold(f.filter, hash)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, hash := range n.hashes[len(hashes):] {
		fits = fits && hold(f.filter, hash)
	}
	if !fits {
		return errors.New("the filter is full")
	}
	f.loaded = f.filter.Len()
	n.loads.Add(1)
	n.current.Store(f)
	return nil
}
