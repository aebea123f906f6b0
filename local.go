package fastpgcache

import (
	"iter"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"
)

// local answers lookups from memory: hits from kept values, misses from a filter of the
// keys. Both are true as of the same moment, which a feed moves on. An answer was true at
// some moment within the last maxStaleness; with any doubt there is none.
type local struct {
	kept   *kept
	misses *misses

	maxStaleness time.Duration
	soon         time.Duration // the age from which on a lookup starts a catch-up
	now          func() instant
	refresh      func() // starts a catch-up in the background
	load         func() // starts a load of the filter in the background

	counters [localCounters]localCounter
}

// maxCatchUpEvery bounds the age from which on a lookup starts a catch-up, so that a
// process seldom falls behind what the feed still has.
const maxCatchUpEvery = 30 * time.Second

func newLocal(maxStaleness time.Duration, bytes int) *local {
	return &local{
		kept:         newKept(bytes),
		misses:       &misses{},
		maxStaleness: maxStaleness,
		soon:         min(maxStaleness/2, maxCatchUpEvery),
		now:          newClock(),
		refresh:      func() {},
		load:         func() {},
	}
}

// answer is what memory says of a key.
type answer int

const (
	unknown answer = iota // the database is to be asked
	present
	absent
)

// lookup answers a lookup of key if memory may, and counts that. left is how long the
// value will live, in microseconds, or noExpiry. It takes no lock and allocates nothing.
func (l *local) lookup(key string) (v *keptValue, left int64, a answer) {
	// The moment is loaded first and the clock read after it: what is held is at least
	// as new as the moment says, and the moment at most as old as the clock says.
	m := l.kept.current.Load()
	if m == nil {
		l.refresh()
		return nil, 0, unknown
	}
	age := l.now().since(m.at)
	if age > l.soon {
		l.refresh()
		if age > l.maxStaleness {
			return nil, 0, unknown
		}
	}
	if v, ok := l.kept.get(key, m); ok {
		if left = v.left(m, age); left <= 0 {
			return nil, 0, unknown // it may have been renewed since m
		}
		l.counter().hits.Add(1)
		return v, left, present
	}
	if l.misses.absent(hashOf(key), m.generation) {
		l.counter().misses.Add(1)
		return nil, 0, absent
	}
	return nil, 0, unknown
}

// localCounters is how many places there are to count in: the processors would wait for
// each other at a single one.
const localCounters = 64

type localCounter struct {
	hits, misses atomic.Int64
	_            [112]byte // two cache lines: processors fetch them in pairs
}

// counter returns the place for this goroutine to count in, chosen by where its stack is.
func (l *local) counter() *localCounter {
	var here byte
	return &l.counters[uintptr(unsafe.Pointer(&here))>>11%localCounters]
}

// counts returns how many hits and misses were answered.
func (l *local) counts() (hits, misses int64) {
	for i := range l.counters {
		hits += l.counters[i].hits.Load()
		misses += l.counters[i].misses.Load()
	}
	return hits, misses
}

// ticket is to be taken before key is looked up in the database.
func (l *local) ticket(key string) ticket {
	if l == nil {
		return ticket{}
	}
	return l.kept.ticket(hashOf(key))
}

func (l *local) tickets(keys []string) []ticket {
	if l == nil {
		return make([]ticket, len(keys))
	}
	tickets := make([]ticket, len(keys))
	for i, key := range keys {
		tickets[i] = l.ticket(key)
	}
	return tickets
}

// found takes up what the database answered to a lookup.
func (l *local) found(key string, t ticket, text string, expires int64) {
	if l != nil {
		l.kept.keep(key, t, text, expires)
	}
}

// missing takes up that the database did not have key.
func (l *local) missing(key string) {
	if l == nil {
		return
	}
	m := l.kept.current.Load()
	if m == nil {
		return
	}
	_, answers := l.counts()
	if l.misses.missed(hashOf(key), m.generation, answers) {
		l.load()
	}
}

// A write is under way: of keys that it may store, change or remove. Its end must be told,
// by done, before whoever waits for it hears of that.
type write struct {
	local   *local
	keys    []string
	tickets []ticket
	values  []*keptValue // nil: nothing was stored, or it must not be held
}

// write is to be called before the write of keys is sent.
func (l *local) write(keys ...string) *write {
	if l == nil {
		return nil
	}
	w := &write{local: l, keys: keys, tickets: make([]ticket, len(keys)), values: make([]*keptValue, len(keys))}
	for i, key := range keys {
		w.tickets[i] = l.ticket(key)
	}
	return w
}

// stored tells that transaction xid, which has ended, stored text under the i-th key and
// changed nothing of it after that.
func (w *write) stored(i int, text string, xid, expires int64) {
	if w != nil {
		w.values[i] = &keptValue{text: strings.Clone(text), expires: expires, xid: xid}
	}
}

// done ends the write.
func (w *write) done() {
	if w == nil {
		return
	}
	for _, key := range w.keys {
		w.local.misses.enter(hashOf(key))
	}
	w.local.kept.written(w.keys, w.tickets, w.values)
}

// catchUp takes up changes, each a key and the transaction that changed it, and then
// publishes next, unless a reset came in between. Whatever changed until next is among
// changes. It reports whether next was published.
func (l *local) catchUp(next moment, changes iter.Seq2[string, int64]) bool {
	for key, xid := range changes {
		hash := hashOf(key)
		l.misses.enter(hash)
		l.kept.changed(key, hash, xid)
	}
	return l.kept.publish(next)
}
