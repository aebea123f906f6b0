package fastpgcache

import (
	"iter"
	"runtime"
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
	soon         atomic.Int64 // the age from which on a lookup starts a catch-up, in nanoseconds
	now          func() instant
	refresh      func() // starts a catch-up in the background
	load         func() // starts a load of the filter in the background

	counters [localCounters]localCounter
}

// maxCatchUpEvery bounds the age from which on a lookup starts a catch-up, so that a
// process seldom falls behind what the feed still has.
const maxCatchUpEvery = 30 * time.Second

func newLocal(maxStaleness time.Duration, bytes int) *local {
	l := &local{
		kept:         newKept(bytes),
		misses:       &misses{},
		maxStaleness: maxStaleness,
		now:          newClock().now,
		refresh:      func() {},
		load:         func() {},
	}
	l.soon.Store(int64(l.latest()))
	return l
}

// latest is the age at which a lookup starts a catch-up at the latest, so that steady
// traffic never waits for one.
func (l *local) latest() time.Duration { return min(l.maxStaleness/2, maxCatchUpEvery) }

// verdict is what memory says of a key.
type verdict int

const (
	unknown verdict = iota // the database is to be asked
	present
	absent
)

// lookup answers a lookup of key if memory may, and counts that. left is how long the
// value will live, in microseconds, or noExpiry. It takes no lock and allocates nothing.
func (l *local) lookup(key string) (v *keptValue, left int64, says verdict) {
	// The moment is loaded first and the clock read after it: what is held is at least
	// as new as the moment says, and the moment at most as old as the clock says.
	m := l.kept.current.Load()
	if m == nil {
		return nil, 0, unknown
	}
	age := l.now().since(m.at)
	if int64(age) > l.soon.Load() {
		l.refresh()
		if age > l.maxStaleness {
			return nil, 0, unknown
		}
		if age > l.maxStaleness-l.maxStaleness/4 {
			runtime.Gosched() // the catch-up may be waiting for a processor
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

// tickets are to be taken before keys are looked up in the database. l may be nil.
func (l *local) tickets(keys ...string) []ticket {
	if l == nil {
		return nil
	}
	tickets := make([]ticket, len(keys))
	for i, key := range keys {
		tickets[i] = l.kept.ticket(hashOf(key))
	}
	return tickets
}

// found takes up what the database answered to a lookup of key: text, until expires.
func (l *local) found(key string, t ticket, text string, expires int64) {
	l.kept.keep(key, t, text, expires)
}

// asked takes up that the database was asked for key, which memory did not answer.
func (l *local) asked(key string, found bool) {
	m := l.kept.current.Load()
	if m == nil {
		l.refresh()
	}
	if found {
		return
	}
	if m == nil {
		l.load()
		return
	}
	_, answers := l.counts()
	if l.misses.missed(hashOf(key), m.generation, answers) {
		l.load()
	}
}

// written ends a write of keys, which may have failed. values are what it stored and may
// be kept, nil for a key of which nothing is known. It is to be called before whoever
// waits for the write hears of its end.
func (l *local) written(keys []string, tickets []ticket, values []*keptValue) {
	for _, key := range keys {
		l.misses.enter(hashOf(key))
	}
	l.kept.written(keys, tickets, values)
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

func (l *local) stats() LocalStats {
	s := LocalStats{
		Evictions:      l.kept.evicted.Load(),
		FalsePositives: l.misses.falsePositives.Load(),
		FilterLoads:    l.misses.loads.Load(),
		Resets:         l.kept.resets.Load(),
	}
	s.Hits, s.Misses = l.counts()
	if l.kept.values != nil {
		s.Values = l.kept.values.EstimatedSize()
		s.Bytes = int64(l.kept.values.WeightedSize())
	}
	if m := l.kept.current.Load(); m != nil {
		s.Age = l.now().since(m.at)
	}
	if f := l.misses.current.Load(); f != nil {
		s.FilterKeys, s.FilterBytes = f.filter.Len(), 8*len(f.filter.words)
	}
	return s
}

// recall answers a lookup of key from memory, if it may. left is how long the value will
// live, in microseconds, or noExpiry. key need not be checked before.
func (c *Cache) recall(key string) (v *keptValue, left int64, says verdict) {
	if c.local == nil || c.tx != nil || c.ended() {
		return nil, 0, unknown
	}
	return c.local.lookup(key)
}

// answered takes up what the database answered to a lookup of key.
func (c *Cache) answered(key string, found bool, err error) {
	if c.local != nil && c.tx == nil && err == nil {
		c.local.asked(key, found)
	}
}

// tickets are to be taken before a lookup of keys is sent, which keep then ends.
func (c *Cache) tickets(keys ...string) []ticket {
	if c.local == nil || c.tx != nil {
		return nil
	}
	return c.local.tickets(keys...)
}

// keep takes up a hit of the database, of the lookup that t was taken for.
func (c *Cache) keep(key string, t ticket, hit lookup) {
	if !hit.large {
		c.local.found(key, t, hit.value.string(), micros(hit.expires))
	}
}

// writing is a write on its way. Whatever makes, changes or removes entries begins with
// write, or writeAll, before it is sent, and ends with done before anybody hears of its
// end: so memory never answers what was before an own write.
type writing struct {
	c       *Cache
	keys    []string
	tickets []ticket
	values  []*keptValue // of keys; nil: nothing was stored, or it must not be kept
}

// write begins a write of keys.
func (c *Cache) write(keys ...string) *writing {
	w := &writing{c: c}
	if c.local != nil {
		w.keys, w.tickets, w.values = keys, c.local.tickets(keys...), make([]*keptValue, len(keys))
	}
	return w
}

// stored tells that the statement of at has stored entries, those of the write's keys. In
// a transaction it has no stamp, and nothing is kept: it may yet do more, or roll back.
func (w *writing) stored(at stamp, entries ...entry) {
	if w.tickets == nil || w.c.tx != nil || at.xid == 0 {
		return
	}
	now := micros(at.now)
	for i, e := range entries {
		if !w.c.local.kept.fits(e.value.len()) {
			continue
		}
		v := &keptValue{text: strings.Clone(e.value.string()), expires: noExpiry, xid: at.xid}
		if e.micros != noTTL {
			v.expires = now + e.micros
		}
		w.values[i] = v
	}
}

// done ends the write, which may have failed.
func (w *writing) done() {
	if w.tickets != nil {
		w.c.local.written(w.keys, w.tickets, w.values)
	}
	w.c.feed.trim()
}

// writingAll is a write of any number of keys on its way.
type writingAll struct{ c *Cache }

// writeAll begins a write that may remove any entry. It ends with done.
func (c *Cache) writeAll() writingAll { return writingAll{c} }

func (w writingAll) done() {
	if w.c.local != nil {
		w.c.local.kept.reset()
	}
	w.c.feed.trim()
}
