package fastpgcache

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
)

// version is what a key answered from a time on.
type version struct {
	text    string // empty: it is absent
	at      int64
	expires int64
}

// world is the server, and what happens in it. Its clock is in microseconds.
type world struct {
	random *rand.Rand
	pause  func() // ends a step of whoever acts

	time    int64
	keys    []string
	history map[string][]version // what was committed
	next    int64                // transaction
	running map[int64]bool
	feed    []feedRow
	locks   map[string]int64 // by which transaction
	trimmed snapshot
	token   int
	silent  bool // the triggers are disabled
	down    int  // how often the server crashed
	values  int

	actors []*modelActor
	wrong  string
	hits   int
	misses int
}

type feedRow struct {
	xid  int64
	keys []string // nil: all
}

const serverAhead = 1_000_000 // of the processes' clocks, in microseconds

func (w *world) now() int64 { return w.time + serverAhead }

func (w *world) last(key string) version {
	h := w.history[key]
	return h[len(h)-1]
}

func (w *world) snapshot() snapshot {
	s := snapshot{w.next, slices.Sorted(maps.Keys(w.running))}
	parsed, err := parseSnapshot(fmt.Sprintf("1:%d:%s", s.xmax, strings.Trim(strings.ReplaceAll(fmt.Sprint(s.running), " ", ","), "[]")))
	if err != nil {
		panic(err)
	}
	return parsed
}

func (w *world) begin() int64 {
	xid := w.next
	w.next++
	w.running[xid] = true
	return xid
}

// lock waits for key. It reports false if the server crashed meanwhile.
func (w *world) lock(xid int64, key string) bool {
	for w.locks[key] != 0 && w.locks[key] != xid {
		w.pause()
	}
	if !w.running[xid] {
		return false
	}
	w.locks[key] = xid
	return true
}

// end commits what xid did, or not.
func (w *world) end(xid int64, changes map[string]version, rows ...feedRow) bool {
	for key, by := range w.locks {
		if by == xid {
			delete(w.locks, key)
		}
	}
	if !w.running[xid] {
		return false
	}
	delete(w.running, xid)
	for key, v := range changes {
		v.at = w.time
		w.history[key] = append(w.history[key], v)
	}
	w.feed = append(w.feed, rows...)
	return true
}

// version makes one up, absent ones and ones that expire soon among them.
func (w *world) version() version {
	if w.random.IntN(5) == 0 {
		return version{expires: noExpiry}
	}
	w.values++
	v := version{text: fmt.Sprint("v", w.values), expires: noExpiry}
	if w.random.IntN(3) == 0 {
		v.expires = w.now() + w.random.Int64N(40)
	}
	return v
}

// some returns up to three keys, in order.
func (w *world) some() []string {
	keys := slices.Clone(w.keys)
	w.random.Shuffle(len(keys), func(i, j int) { keys[i], keys[j] = keys[j], keys[i] })
	keys = keys[:1+w.random.IntN(len(keys))]
	slices.Sort(keys)
	return keys
}

// foreign writes keys as somebody who knows nothing of us: slowly, in a transaction.
func (w *world) foreign() {
	xid := w.begin()
	changes := map[string]version{}
	var rows []feedRow
	for _, key := range w.some() {
		w.pause()
		if !w.lock(xid, key) {
			return
		}
		changes[key] = w.version()
		if !w.silent {
			rows = append(rows, feedRow{xid, []string{key}})
		}
	}
	w.pause()
	if w.random.IntN(5) == 0 { // a rollback
		changes, rows = nil, nil
	}
	w.end(xid, changes, rows...)
}

// trim removes what an old snapshot sees.
func (w *world) trim() {
	old := w.snapshot()
	w.pause()
	w.feed = slices.DeleteFunc(w.feed, func(r feedRow) bool { return old.saw(r.xid) })
	w.trimmed = old
}

// administrate does what leaves no row in the feed.
func (w *world) administrate() {
	free := func() bool { return len(w.locks) == 0 }
	switch w.random.IntN(3) {
	case 0: // TRUNCATE, or another table in its place
		for !free() {
			w.pause()
		}
		for _, key := range w.keys {
			w.history[key] = append(w.history[key], version{at: w.time, expires: noExpiry})
		}
		w.token++
	case 1: // DISABLE TRIGGER, some writes, ENABLE ALWAYS TRIGGER
		for !free() {
			w.pause()
		}
		w.token++
		w.silent = true
		w.foreign()
		w.pause()
		for !free() {
			w.pause()
		}
		w.silent = false
		w.token++
	case 2: // a crash: everything is gone, and transactions may be numbered anew
		clear(w.running)
		clear(w.locks)
		w.feed = nil
		w.trimmed = snapshot{}
		w.next -= min(w.next-3, w.random.Int64N(5))
		for _, key := range w.keys {
			w.history[key] = append(w.history[key], version{at: w.time, expires: noExpiry})
		}
		w.token++
		w.down++
	}
}

// readFeed is the catch-up's statement.
func (w *world) readFeed(p position) *news {
	n := &news{token: fmt.Sprint(w.token), snapshot: w.snapshot(), server: w.now(), trimmed: w.trimmed}
	if w.silent {
		n.token = ""
	}
	type change struct {
		key string
		xid int64
	}
	var changes []change
	for _, r := range w.feed {
		if p.generation == 0 || p.snapshot.saw(r.xid) || !n.snapshot.saw(r.xid) {
			continue
		}
		n.all = n.all || r.keys == nil
		for _, key := range r.keys {
			changes = append(changes, change{key, r.xid})
		}
	}
	n.changes = func(yield func(string, int64) bool) {
		for _, c := range changes {
			w.pause()
			if !yield(c.key, c.xid) {
				return
			}
		}
		w.pause()
	}
	return n
}
