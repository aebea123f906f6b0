package fastpgcache

import (
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"
)

// The model of local answers: two processes, each with the real code of kept, misses and
// feed, and a server that is made up. Everybody acts in small steps, of which one at a
// time happens, in random order. Each answer is held against what was true when.

// worlds is how many random histories a test run explores, unless
// FASTPGCACHE_MODEL_WORLDS says so.
const worlds = 4000

// process is one that has the code in question.
type process struct {
	*world
	local    *local
	position position
	busy     bool           // somebody reads the feed
	own      map[string]int // of each key, the version of the last own write that has ended

	clockFault int
	skew       int64 // of the clock that is at fault
	monotonic  int64 // the last time of that clock
}

const (
	wallClockIsSet = iota + 1
	monotonicClockSleeps
)

// modelActor acts until it returns, in steps.
type modelActor struct {
	step  func() (struct{}, bool)
	stop  func()
	pause func()
}

var errStopped = fmt.Errorf("the world ended")

// actor adds one that does act.
func (w *world) actor(act func()) *modelActor {
	a := &modelActor{}
	a.step, a.stop = iter.Pull(func(yield func(struct{}) bool) {
		defer func() {
			if r := recover(); r != nil && r != errStopped {
				panic(r)
			}
		}()
		a.pause = func() {
			if !yield(struct{}{}) {
				panic(errStopped)
			}
		}
		a.pause()
		act()
	})
	w.actors = append(w.actors, a)
	w.step(a)
	return a
}

// step lets a take a step. It reports whether there is another one.
func (w *world) step(a *modelActor) bool {
	w.pause = a.pause
	_, more := a.step()
	return more
}

// run lets one actor after the other take a step until none is left.
func (w *world) run() {
	for len(w.actors) > 0 && w.wrong == "" {
		w.time++
		i := w.random.IntN(len(w.actors))
		if !w.step(w.actors[i]) {
			w.actors = slices.Delete(w.actors, i, i+1)
		}
		if w.time > 100_000 {
			w.wrong = "nobody gets on"
		}
	}
	for _, a := range w.actors {
		a.stop()
	}
}

func (p *process) catchUp() {
	for p.busy {
		p.pause()
	}
	p.busy = true
	at, from := p.clock(), p.position
	if m := p.local.kept.current.Load(); m == nil || m.generation != from.generation {
		from = position{}
	}
	p.pause()
	n := p.readFeed(from)
	p.pause()
	p.position = p.local.take(from, at, n)
	p.busy = false
}

// loadFilter reads the keys one by one.
func (p *process) loadFilter() {
	m := p.local.kept.current.Load()
	if m == nil {
		return
	}
	p.local.misses.load(m.generation, 0, func() error {
		for _, key := range p.keys {
			p.pause()
			if p.last(key).text != "" { // expired ones, too
				p.local.misses.enter(hashOf(key))
			}
		}
		return nil
	})
}

// clock is of a process whose wall clock is set now and then, or whose monotonic clock
// stands still while the machine sleeps: not both, since nothing could tell then.
func (p *process) clock() instant {
	at := instant{p.time * 1000, p.time * 1000}
	switch p.clockFault {
	case wallClockIsSet:
		if p.random.IntN(30) == 0 {
			p.skew = p.random.Int64N(400) - 200
		}
		at.wall += p.skew * 1000
	case monotonicClockSleeps:
		if p.random.IntN(30) == 0 {
			p.skew = max(p.skew, p.random.Int64N(p.time+1)) // it never runs backwards
		}
		at.monotonic = max(p.monotonic, at.monotonic-p.skew*1000)
		p.monotonic = at.monotonic
	}
	return at
}

// look asks the server for a key.
func (p *process) look() {
	key := p.keys[p.random.IntN(len(p.keys))]
	t := p.local.tickets(key)[0]
	p.pause()
	v := p.last(key)
	found := v.text != "" && v.expires > p.now()
	p.pause()
	if found {
		p.local.found(key, t, v.text, v.expires)
	}
}

// write writes keys as our statements do.
func (p *process) write(how string) {
	keys := p.some()
	w := begin(p.local, keys...)
	done := func(did bool, xid int64, changes map[string]version) {
		for i, key := range keys {
			if v := changes[key]; did && v.text != "" {
				w.stored(i, v.text, xid, v.expires)
			}
		}
		w.done()
	}
	p.pause()
	xid := p.begin()
	p.pause()
	if how == "left" { // the caller's ctx ends, and the server goes on
		done(false, 0, nil)
	}
	changes := map[string]version{}
	for _, key := range keys {
		if !p.lock(xid, key) {
			done(false, 0, nil)
			return
		}
		changes[key] = p.version()
	}
	row := feedRow{xid, keys}
	if how == "in a transaction" { // it ends later, and does more
		p.pause()
		done(false, 0, nil)
		p.pause()
		for key := range changes {
			changes[key] = p.version()
		}
		row.keys = slices.Clone(keys)
	}
	p.pause()
	did := p.end(xid, changes, row)
	ends := map[string]int{}
	for _, key := range keys {
		ends[key] = len(p.history[key]) - 1
	}
	if how != "" {
		return
	}
	p.pause()
	done(did, xid, changes)
	if did {
		for key, i := range ends {
			p.own[key] = max(p.own[key], i)
		}
	}
}

// clear removes all keys, as Clear does.
func (p *process) clear() {
	xid := p.begin()
	changes := map[string]version{}
	for _, key := range p.keys {
		if !p.lock(xid, key) {
			p.local.kept.reset()
			return
		}
		changes[key] = version{expires: noExpiry}
	}
	p.pause()
	did := p.end(xid, changes, feedRow{xid, nil})
	ends := map[string]int{}
	for key, h := range p.history {
		ends[key] = len(h) - 1
	}
	p.pause()
	p.local.kept.reset()
	if did {
		for key, i := range ends {
			p.own[key] = max(p.own[key], i)
		}
	}
}

// get asks memory for a key, and judges the answer.
func (p *process) get() {
	key := p.keys[p.random.IntN(len(p.keys))]
	own, start := p.own[key], p.time
	v, _, a := p.local.lookup(key)
	oldest := start - p.local.maxStaleness.Microseconds()
	h := p.history[key]
	switch a {
	case present:
		p.hits++
		i := slices.IndexFunc(h, func(x version) bool { return x.text == v.text })
		switch {
		case i < 0:
			p.wrong = fmt.Sprintf("%s: %q was never committed", key, v.text)
		case i+1 < len(h) && h[i+1].at < oldest:
			p.wrong = fmt.Sprintf("%s: %q was replaced at %d, answered at %d", key, v.text, h[i+1].at, start)
		case i < own:
			p.wrong = fmt.Sprintf("%s: the own write of %q was not seen", key, h[own].text)
		case h[i].expires <= start+serverAhead:
			p.wrong = fmt.Sprintf("%s: %q had expired", key, v.text)
		}
	case absent:
		p.misses++
		for i := own; i < len(h); i++ {
			gone := h[i].at
			if h[i].text != "" {
				if h[i].expires == noExpiry {
					continue
				}
				gone = max(gone, h[i].expires-serverAhead)
			}
			if gone <= p.time && (i+1 == len(h) || h[i+1].at > gone && h[i+1].at >= oldest) {
				return
			}
		}
		p.wrong = fmt.Sprintf("%s was there, %v, from %d to %d, own %d", key, h, oldest, p.time, own)
	}
}

// times returns an actor that does something a few times.
func (w *world) times(n int, act func()) {
	w.actor(func() {
		for range 1 + w.random.IntN(n) {
			act()
			w.pause()
		}
	})
}

// newWorld makes up who is there. The stores of kept values are used again and again,
// with garbage in them.
func newWorld(seed uint64, stores [2]*kept, keys []string) *world {
	w := &world{
		random: rand.New(rand.NewPCG(seed, 1)), next: 10, running: map[int64]bool{}, locks: map[string]int64{},
		history: map[string][]version{}, keys: keys,
	}
	for _, key := range keys {
		v := version{expires: noExpiry}
		if w.random.IntN(2) == 0 {
			v = w.version()
		}
		w.history[key] = []version{v}
	}
	if w.random.IntN(2) == 0 { // a transaction is running when all begins
		w.step(w.actor(w.foreign))
	}
	for _, store := range stores[:1+w.random.IntN(2)] {
		store.reset()
		staleness := time.Duration(5<<w.random.IntN(7)) * time.Microsecond
		p := &process{world: w, local: newLocal(staleness, 0), own: map[string]int{}, clockFault: w.random.IntN(4)}
		p.local.kept = store
		p.local.now = func() instant { p.pause(); return p.clock() }
		w.pause = func() {}
		if w.random.IntN(5) > 0 {
			p.catchUp()
			for range w.random.IntN(4) {
				p.look()
			}
			if w.random.IntN(2) == 0 {
				p.loadFilter()
			}
		}
		w.times(5, p.catchUp)
		for range 1 + w.random.IntN(3) {
			w.times(3, p.look)
		}
		for range w.random.IntN(3) {
			w.times(2, func() { p.write([]string{"", "", "", "left", "in a transaction"}[w.random.IntN(5)]) })
		}
		for range 1 + w.random.IntN(2) {
			w.times(12, p.get)
		}
		if w.random.IntN(2) == 0 {
			w.times(2, p.loadFilter)
		}
		if w.random.IntN(5) == 0 {
			w.actor(p.clear)
		}
	}
	for range w.random.IntN(3) {
		w.actor(w.foreign)
	}
	if w.random.IntN(3) == 0 {
		w.times(2, w.trim)
	}
	if w.random.IntN(4) == 0 {
		w.actor(w.administrate)
	}
	return w
}

// sameStripe returns three keys, two of which share a stripe.
func sameStripe() []string {
	keys := []string{"a", "b"}
	for i := 0; ; i++ {
		key := fmt.Sprint("c", i)
		if hashOf(key)%keptStripes == hashOf("a")%keptStripes {
			return append(keys, key)
		}
	}
}

func TestNoInterleavingBreaksTheGuarantee(t *testing.T) {
	t.Parallel()
	stores := [2]*kept{newKept(1 << 20), newKept(1 << 20)}
	keys := sameStripe()
	start, worlds := rand.Uint64(), uint64(worlds)
	if n, err := strconv.ParseUint(os.Getenv("FASTPGCACHE_MODEL_WORLDS"), 10, 64); err == nil {
		worlds = n
	}
	var hits, misses, wrong int
	begin := time.Now()
	for seed := range worlds {
		w := newWorld(start+seed, stores, keys)
		w.run()
		hits += w.hits
		misses += w.misses
		if w.wrong != "" {
			if wrong++; wrong <= 5 {
				t.Errorf("seed %d: %s", start+seed, w.wrong)
			}
		}
	}
	t.Logf("%d histories in %v, %d hits, %d misses, %d wrong", worlds, time.Since(begin).Round(time.Millisecond), hits, misses, wrong)
	if uint64(hits) < worlds/2 || uint64(misses) < worlds/4 {
		t.Error("too little for a verdict")
	}
}
