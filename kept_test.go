package fastpgcache

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// begun returns a local that may answer, by a clock that stands still.
func begun(t *testing.T, maxStaleness time.Duration) (*local, *instant) {
	l := newLocal(maxStaleness, 1<<20)
	now := &instant{}
	l.now = func() instant { return *now }
	l.kept.begin(*now, 0)
	return l, now
}

func (l *local) text(key string) string {
	if v, _, a := l.lookup(key); a == present {
		return v.text
	}
	return ""
}

// localWrite is a write under way.
type localWrite struct {
	local   *local
	keys    []string
	tickets []ticket
	values  []*keptValue
}

func begin(l *local, keys ...string) *localWrite {
	return &localWrite{l, keys, l.tickets(keys...), make([]*keptValue, len(keys))}
}

func (w *localWrite) stored(i int, text string, xid, expires int64) {
	w.values[i] = &keptValue{text: text, expires: expires, xid: xid}
}

func (w *localWrite) done() { w.local.written(w.keys, w.tickets, w.values) }

func TestWhatALookupBroughtIsKept(t *testing.T) {
	l, _ := begun(t, time.Second)
	ticket := l.tickets("k")[0]
	l.found("k", ticket, "v", noExpiry)
	if got := l.text("k"); got != "v" {
		t.Errorf("got %q", got)
	}
	l.catchUp(moment{generation: 1}, func(yield func(string, int64) bool) { yield("k", 7) })
	if got := l.text("k"); got != "" {
		t.Errorf("got %q after a change", got)
	}
	l.found("k", ticket, "v", noExpiry)
	if got := l.text("k"); got != "" {
		t.Errorf("got %q, looked up before the change", got)
	}
	ticket = l.tickets("k")[0]
	l.catchUp(moment{generation: 1}, func(yield func(string, int64) bool) { yield("k", 8) }) // nothing is held
	l.found("k", ticket, "v", noExpiry)
	if got := l.text("k"); got != "" {
		t.Errorf("got %q, looked up before the second change", got)
	}
}

func TestOfTwoDifferentAnswersNeitherIsKept(t *testing.T) {
	l, _ := begun(t, time.Second)
	a, b := l.tickets("k")[0], l.tickets("k")[0]
	l.found("k", a, "a", noExpiry)
	l.found("k", b, "b", noExpiry)
	if got := l.text("k"); got != "" {
		t.Errorf("got %q", got)
	}
	l.found("k", a, "a", noExpiry)
	if got := l.text("k"); got != "" {
		t.Errorf("got %q, of before the doubt", got)
	}
}

func TestOwnWritesAreKeptUnlessAnotherCameBetween(t *testing.T) {
	l, _ := begun(t, time.Second)
	keys := sameStripe()
	w := begin(l, keys...)
	for i := range keys {
		w.stored(i, fmt.Sprint(i), 5, noExpiry)
	}
	w.done()
	l.catchUp(moment{generation: 1}, func(yield func(string, int64) bool) {
		for _, key := range keys {
			yield(key, 5)
		}
	})
	for i, key := range keys {
		if got := l.text(key); got != fmt.Sprint(i) {
			t.Errorf("%s: got %q, want %d", key, got, i)
		}
	}

	a, b := begin(l, "k"), begin(l, "k")
	b.stored(0, "b", 7, noExpiry)
	b.done()
	a.stored(0, "a", 6, noExpiry)
	a.done()
	if got := l.text("k"); got != "" {
		t.Errorf("got %q of two writes at once", got)
	}
	w = begin(l, keys[0])
	w.done()
	if got := l.text(keys[0]); got != "" {
		t.Errorf("got %q after a write that failed", got)
	}
}

func TestAResetMakesGarbageOfAll(t *testing.T) {
	l, now := begun(t, time.Second)
	early := l.tickets("early")[0]
	l.found("k", l.tickets("k")[0], "v", noExpiry)
	w := begin(l, "w")
	l.kept.reset()
	if got := l.text("k"); got != "" {
		t.Errorf("got %q in doubt", got)
	}
	l.kept.begin(*now, 0)
	l.found("early", early, "v", noExpiry)
	w.stored(0, "v", 5, noExpiry)
	w.done()
	for _, key := range []string{"k", "early", "w"} {
		if got := l.text(key); got != "" {
			t.Errorf("%s: got %q of the generation before", key, got)
		}
	}
	if l.catchUp(moment{generation: 1}, func(func(string, int64) bool) {}) {
		t.Error("a moment of the generation before was published")
	}
}

func TestTransactionsOfAnotherGenerationAreNotOwn(t *testing.T) {
	l, now := begun(t, time.Second)
	w := begin(l, "k")
	w.stored(0, "v", 5, noExpiry)
	w.done()
	l.kept.reset() // a crash, after which transactions are numbered anew
	l.kept.begin(*now, 0)
	ticket := l.tickets("k")[0]
	l.kept.changed("k", hashOf("k"), 5)
	l.found("k", ticket, "old", noExpiry)
	if got := l.text("k"); got != "" {
		t.Errorf("got %q, looked up before the change", got)
	}
}

func TestTheClockThatSaysMoreCounts(t *testing.T) {
	l, now := begun(t, time.Second)
	l.found("k", l.tickets("k")[0], "v", noExpiry)
	for _, test := range []struct {
		monotonic, wall time.Duration
		want            string
	}{
		{time.Second, time.Second, "v"},
		{time.Second + 1, time.Second, ""},
		{0, time.Second + 1, ""},          // the machine slept
		{time.Second + 1, -time.Hour, ""}, // the clock was set back
		{time.Millisecond, -time.Hour, "v"},
	} {
		*now = instant{int64(test.monotonic), int64(test.wall)}
		if got := l.text("k"); got != test.want {
			t.Errorf("%v: got %q, want %q", test, got, test.want)
		}
	}
}

func TestTheWallClockIsReadSeldom(t *testing.T) {
	at, reads := instant{1, 1}, 0
	c := newClock()
	c.monotonic = func() int64 { return at.monotonic }
	c.both = func() instant { reads++; return at }
	c.now()
	at.monotonic += wallEvery - 1
	at.wall += wallEvery - 1
	if got := c.now(); got != at || reads != 1 {
		t.Errorf("got %v after %d reads, want %v after 1", got, reads, at)
	}
	at.monotonic++
	at.wall += int64(time.Hour) // the machine slept
	if got := c.now(); got != at || reads != 2 {
		t.Errorf("got %v after %d reads, want %v after 2", got, reads, at)
	}
	c.mu.Lock() // somebody who reads both was stopped
	at.monotonic += wallEvery
	at.wall += int64(time.Hour)
	if got := c.now(); got != at {
		t.Errorf("got %v, want %v", got, at)
	}
}

func TestNoValueOutlivesItsTTLByTheServersClock(t *testing.T) {
	l, now := begun(t, time.Second)
	const server = 1_700_000_000_000_000
	l.kept.publish(moment{*now, server, 1})
	l.found("k", l.tickets("k")[0], "v", server+10)
	now.monotonic = int64(8 * time.Microsecond)
	if _, left, a := l.lookup("k"); a != present || left != 1 {
		t.Errorf("got %v, %d left", a, left)
	}
	now.monotonic = int64(9 * time.Microsecond)
	if got := l.text("k"); got != "" {
		t.Errorf("got %q", got)
	}
	// The server's clock was set forward.
	*now = instant{}
	l.kept.publish(moment{*now, server + 10, 1})
	if got := l.text("k"); got != "" {
		t.Errorf("got %q after the server's clock was set", got)
	}
}

func TestLookupsPastHalfOfTheStalenessStartACatchUp(t *testing.T) {
	for _, test := range []struct {
		staleness, age time.Duration
		want           bool
	}{
		{time.Second, time.Second / 2, false},
		{time.Second, time.Second/2 + 1, true},
		{time.Second, time.Hour, true},
		{time.Hour, 30 * time.Second, false},
		{time.Hour, 31 * time.Second, true},
	} {
		l, now := begun(t, test.staleness)
		got := false
		l.refresh = func() { got = true }
		now.wall = int64(test.age)
		l.lookup("k")
		if got != test.want {
			t.Errorf("%v: got %v", test, got)
		}
	}
}

func TestLargeValuesAreNotKept(t *testing.T) {
	l, _ := begun(t, time.Second)
	large := strings.Repeat("x", 1<<20/keptShare)
	for _, text := range []string{large, large + "x"} {
		l.found("k", l.tickets("k")[0], text, noExpiry)
		w := begin(l, "own")
		w.stored(0, text, 5, noExpiry)
		w.done()
		for _, key := range []string{"k", "own"} {
			if got, want := l.text(key) != "", text == large; got != want {
				t.Errorf("%s of %d bytes: kept %v, want %v", key, len(text), got, want)
			}
		}
		l.kept.changed("k", hashOf("k"), 1)
	}
}

func TestKeptValuesStayWithinTheirBytes(t *testing.T) {
	l, _ := begun(t, time.Hour)
	for i := range 20_000 {
		key := fmt.Sprint(i)
		l.found(key, l.tickets(key)[0], strings.Repeat("x", 100), noExpiry)
	}
	l.kept.values.CleanUp()
	if got := l.kept.values.WeightedSize(); got > 1<<20 || got < 1<<20*9/10 {
		t.Errorf("got %d bytes, want at most %d", got, 1<<20)
	}
	if n := l.kept.evicted.Load(); n < 10_000 {
		t.Errorf("got %d evictions", n)
	}
}

func TestWithoutBytesNothingIsKept(t *testing.T) {
	l := newLocal(time.Hour, -1)
	l.kept.begin(l.now(), 0)
	l.found("k", l.tickets("k")[0], "v", noExpiry)
	w := begin(l, "k")
	w.stored(0, "v", 5, noExpiry)
	w.done()
	l.catchUp(moment{generation: 1}, func(yield func(string, int64) bool) { yield("k", 7) })
	if got := l.text("k"); got != "" {
		t.Errorf("got %q", got)
	}
}

// stressed is a server of one process, for many goroutines at once: its clock is the
// number of commits.
type stressed struct {
	mu      sync.Mutex
	commits int64
	history map[string][]int64 // of each key, when it was written
	feed    []stressedRow
	read    int // rows of the feed
}

type stressedRow struct {
	key string
	xid int64
}

func (s *stressed) commit(key string, xid int64) (version int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.commits++
	s.history[key] = append(s.history[key], s.commits)
	s.feed = append(s.feed, stressedRow{key, xid})
	return len(s.history[key])
}

// at returns the version of key at a time.
func (s *stressed) at(key string, time int64) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, _ := slices.BinarySearch(s.history[key], time+1)
	return i
}

func (s *stressed) news() (server int64, rows []stressedRow) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rows = s.feed[s.read:]
	s.read = len(s.feed)
	return s.commits, rows
}

func TestKeptValuesUnderStress(t *testing.T) {
	s := &stressed{history: map[string][]int64{}}
	l := newLocal(time.Hour, 16<<10) // so that some are evicted
	generation := l.kept.begin(l.now(), 0)
	const nKeys = 70
	var own [nKeys]atomic.Int64
	var xids, hits, wrong atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	start := func(n int, act func(r *rand.Rand, i int, key string)) {
		for range n {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(rand.Uint64(), 1))
				for {
					select {
					case <-stop:
						return
					default:
						i := r.IntN(nKeys)
						act(r, i, fmt.Sprint(i))
					}
				}
			})
		}
	}
	text := func(version int) string { return fmt.Sprintf("%0100d", version) }
	start(3, func(r *rand.Rand, i int, key string) {
		ticket := l.tickets(key)[0]
		if version := s.at(key, 1<<62); version > 0 {
			l.found(key, ticket, text(version), noExpiry)
		}
		time.Sleep(time.Microsecond)
	})
	start(2, func(r *rand.Rand, i int, key string) {
		w := begin(l, key)
		xid := xids.Add(1)
		version := s.commit(key, xid)
		w.stored(0, text(version), xid, noExpiry)
		w.done()
		for {
			old := own[i].Load()
			if old >= int64(version) || own[i].CompareAndSwap(old, int64(version)) {
				break
			}
		}
		time.Sleep(time.Duration(r.IntN(20)) * time.Microsecond)
	})
	start(1, func(r *rand.Rand, i int, key string) {
		s.commit(key, xids.Add(1))
		time.Sleep(time.Duration(r.IntN(50)) * time.Microsecond)
	})
	start(3, func(r *rand.Rand, i int, key string) {
		m, mine := l.kept.current.Load(), own[i].Load()
		v, _, a := l.lookup(key)
		if a != present {
			runtime.Gosched()
			return
		}
		hits.Add(1)
		version, _ := strconv.Atoi(v.text)
		if oldest := s.at(key, m.server); version < oldest || version < int(mine) {
			wrong.Add(1)
			t.Errorf("%s: got version %d, want at least %d, and own %d", key, version, oldest, mine)
		}
	})
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			at := l.now()
			server, rows := s.news()
			l.catchUp(moment{at, server, generation}, func(yield func(string, int64) bool) {
				for _, r := range rows {
					if !yield(r.key, r.xid) {
						return
					}
				}
			})
		}
	})
	for begin := time.Now(); time.Since(begin) < time.Second || hits.Load() < 1000 && time.Since(begin) < 20*time.Second; { // a busy machine needs longer
		time.Sleep(10 * time.Millisecond)
	}
	close(stop)
	wg.Wait()
	t.Logf("%d commits, %d hits, %d evictions, %d wrong", s.commits, hits.Load(), l.kept.evicted.Load(), wrong.Load())
	if hits.Load() < 1000 {
		t.Error("too few hits for a verdict")
	}
}
