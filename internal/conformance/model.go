package conformance

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/history"
)

var modelTests = []test{
	{name: "RandomOperationsAgreeWithAMap", run: testModel},
	{name: "RandomOperationsInATransactionAgreeWithAMap", run: testModelInTx},
	{name: "ManyCallersEachAgreeWithTheirMap", run: testConcurrentModels, lone: true},
	{name: "ManyCallersOfSharedKeysSeeNoStaleValue", run: testSharedKeys, lone: true},
	{name: "OfManyDeletesOneGetsTrue", run: testDeleteOnce},
}

// model is what a cache should hold, and a source of operations on both.
//
// The server's clock alone decides whether an entry has expired. So the model
// reads that clock before and after each operation on an entry that will expire
// soon: an operation that began after the expiry must not see it, one that ended
// before must, and where the expiry lies between the two, the model goes by what
// the operation saw.
type model struct {
	s       *suite
	t       *testing.T
	c       *fastpgcache.Cache
	db      querier // where the cache's writes can be seen
	clock   querier
	shared  bool // others clean up, too
	inTx    bool
	r       *rand.Rand
	keys    []string
	entries map[string]entry
	log     []string // what was done, for a failure
}

// entry is a row; an expired one stays until a Set or a Cleanup.
type entry struct {
	value  string
	ttl    time.Duration // as it was given; 0 for none
	soon   bool          // it runs out during the test,
	expiry int64         // then, in microseconds by the server's clock
}

// presence is whether an entry was there during an operation.
type presence string

const (
	there  presence = "there"
	absent presence = "absent"
	either presence = "either"
)

func (s *suite) newModel(t *testing.T, c *fastpgcache.Cache, seed uint64, prefix string) *model {
	t.Helper()
	m := &model{s: s, t: t, c: c, db: c.DB(), clock: s.admin, r: rand.New(rand.NewPCG(seed, 0)), entries: make(map[string]entry)}
	for i := range 4 {
		m.keys = append(m.keys, fmt.Sprintf("%s%d", prefix, i))
	}
	return m
}

// now is the server's clock, in microseconds.
func (m *model) now() int64 {
	return m.microseconds(m.clock, `SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint`)
}

// expiry is when the row of key expires, or 0 if there is no row.
func (m *model) expiry(key string) int64 {
	return m.microseconds(m.db, `SELECT coalesce((
		SELECT (extract(epoch FROM expires_at) * 1000000)::bigint FROM `+
		m.s.union(`SELECT expires_at FROM {schema}.cache WHERE user_id = current_user AND key = $1`)+`), 0)`, key)
}

func (m *model) microseconds(db querier, query string, args ...any) (v int64) {
	if err := db.QueryRowContext(m.t.Context(), query, args...).Scan(&v); err != nil {
		m.failf("%s: %v", query, err)
	}
	return v
}

func (m *model) failf(format string, args ...any) {
	m.t.Helper()
	m.t.Errorf("%s\nafter %q", fmt.Sprintf(format, args...), m.log[max(0, len(m.log)-12):])
}

// look runs an operation that tells whether key is there, and checks what it says.
func (m *model) look(op, key string, call func() (bool, error)) (found bool) {
	m.t.Helper()
	m.log = append(m.log, op+" "+key)
	e, ok := m.entries[key]
	want := absent
	var err error
	switch {
	case !ok:
		found, err = call()
	case !e.soon:
		want = there
		found, err = call()
	default:
		expired := m.now() >= e.expiry
		found, err = call()
		if !expired {
			want = either
			if m.now() < e.expiry {
				want = there
			}
		}
	}
	if err != nil || want == there && !found || want == absent && found {
		m.failf("%s %s: got found %t, %v, want it %s", op, key, found, err, want)
	}
	return found
}

// ttl is one to write: none, long, or 1 to 5 ms.
func (m *model) ttl() (ttl time.Duration, soon bool) {
	switch m.r.IntN(4) {
	case 0:
		return 0, false
	case 1:
		return time.Hour + time.Duration(m.r.IntN(1000))*time.Minute, false
	default:
		return time.Millisecond + time.Duration(m.r.IntN(4_000_000)), true
	}
}

// wrote notes what key now holds, for how long.
func (m *model) wrote(key, value string, ttl time.Duration, soon bool) {
	e := entry{value: value, ttl: ttl, soon: soon}
	if soon {
		if e.expiry = m.expiry(key); e.expiry == 0 && !m.shared {
			m.failf("%s: no row was written", key)
		}
	}
	m.entries[key] = e
}

func (m *model) value() string {
	return fmt.Sprintf("%d%s", m.r.Uint32(), []string{"", "\x00", "\xff", "'", "ключ🔑"}[m.r.IntN(5)])
}

// step does one random operation.
func (m *model) step(ctx context.Context) {
	m.t.Helper()
	key := m.keys[m.r.IntN(len(m.keys))]
	e := m.entries[key]
	switch m.r.IntN(11) {
	case 0, 1, 2:
		value := m.value()
		ttl, soon := m.ttl()
		m.log = append(m.log, fmt.Sprintf("set %s %q %v", key, value, ttl))
		if err := m.c.Set(ctx, key, value, ttl); err != nil {
			m.failf("set: %v", err)
		}
		m.wrote(key, value, ttl, soon)
	case 3, 4:
		var got string
		if m.look("get", key, func() (bool, error) { return m.c.Get(ctx, key, &got) }) && got != e.value {
			m.failf("get %s: got %q, want %q", key, got, e.value)
		}
	case 5:
		if m.look("delete", key, func() (bool, error) { return m.c.Delete(ctx, key) }) {
			delete(m.entries, key)
		}
	case 6:
		m.look("exists", key, func() (bool, error) { return m.c.Exists(ctx, key) })
	case 7:
		var got time.Duration
		if !m.look("ttl", key, func() (found bool, err error) {
			got, found, err = m.c.TTL(ctx, key)
			return found, err
		}) {
			break
		}
		if e.ttl == 0 && got != fastpgcache.NoExpiry || e.ttl > 0 && (got <= 0 || got > e.ttl+time.Microsecond) || !e.soon && e.ttl > 0 && got < e.ttl-patience {
			m.failf("ttl %s: got %v, want what is left of %v", key, got, e.ttl)
		}
	case 8:
		ttl, soon := m.ttl()
		if m.look("expire", key, func() (bool, error) { return m.c.Expire(ctx, key, cmp.Or(ttl, fastpgcache.NoExpiry)) }) {
			m.log = append(m.log, fmt.Sprint(ttl))
			m.wrote(key, e.value, ttl, soon)
		}
	case 9:
		if m.look("persist", key, func() (bool, error) { return m.c.Persist(ctx, key) }) {
			m.wrote(key, e.value, 0, false)
		}
	case 10:
		if !m.inTx {
			m.cleanup(ctx)
		}
	}
}

func (m *model) cleanup(ctx context.Context) {
	m.log = append(m.log, "cleanup")
	before := m.now()
	removed, err := m.c.Cleanup(ctx)
	after := m.now()
	least, most := 0, 0
	for key, e := range m.entries {
		if !e.soon || e.expiry > after {
			continue
		}
		most++
		if e.expiry <= before {
			least++
		}
		if m.expiry(key) == 0 {
			delete(m.entries, key)
		} else if e.expiry <= before && !m.shared {
			m.failf("cleanup left %s", key)
		}
	}
	if err != nil || !m.shared && (removed < least || removed > most) {
		m.failf("cleanup: got %d, %v, want %d to %d", removed, err, least, most)
	}
}

func testModel(s *suite, t *testing.T) {
	c := s.cache(t)
	if _, err := c.Cleanup(bounded(t)); err != nil { // what other tests left
		t.Fatal(err)
	}
	steps := 400
	if s.callers > 0 {
		steps = 60
	}
	m := s.newModel(t, c, 1, "model/")
	for range steps {
		if m.step(t.Context()); t.Failed() {
			return
		}
	}
}

func testModelInTx(s *suite, t *testing.T) {
	c := s.cache(t)
	if _, err := c.Cleanup(bounded(t)); err != nil { // what other tests left
		t.Fatal(err)
	}
	steps := 200
	if s.callers > 0 {
		steps = 40
	}
	tx, in := begin(t, c)
	m := s.newModel(t, c, 2, "model/")
	m.c, m.db, m.inTx = in, tx, true
	for range steps {
		if m.step(t.Context()); t.Failed() {
			return
		}
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	m.c, m.db, m.inTx = c, c.DB(), false
	for range steps / 4 {
		if m.step(t.Context()); t.Failed() {
			return
		}
	}
}

func testConcurrentModels(s *suite, t *testing.T) {
	dsn, _ := s.role(t)
	c := s.open(t, dsn)
	var wg sync.WaitGroup
	for caller := range Callers {
		m := s.newModel(t, c, uint64(caller), fmt.Sprintf("caller %d/", caller))
		m.shared = true
		wg.Go(func() {
			for range 4 {
				if m.step(t.Context()); t.Failed() {
					return
				}
			}
		})
	}
	wg.Wait()
}

func testSharedKeys(s *suite, t *testing.T) {
	dsn, _ := s.role(t)
	c := s.open(t, dsn)
	const keys = 3
	logs := make([]history.Log, Callers)
	ctx := bounded(t)
	var wg sync.WaitGroup
	for caller := range Callers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(caller), 0))
			log := &logs[caller]
			log.Number, log.Process = int64(caller+1), 1
			for range 5 {
				n := r.IntN(keys)
				key := fmt.Sprint("shared", n)
				start := history.Now()
				var err error
				switch r.IntN(6) {
				case 0, 1:
					value, text := log.Value()
					err = c.Set(ctx, key, text, time.Hour)
					log.Stored(n, value, start, time.Hour, err)
				case 2:
					var deleted bool
					if deleted, err = c.Delete(ctx, key); deleted {
						log.Removed(n, start, err)
					} else {
						log.Answered(n, "", false, start, err)
					}
				default:
					var text string
					var found bool
					found, err = c.Get(ctx, key, &text)
					log.Answered(n, text, found, start, err)
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	var events []history.Event
	for _, log := range logs {
		events = append(events, log.Events...)
	}
	for _, wrong := range history.Check(events).Wrong {
		t.Error(wrong)
	}
}

func testDeleteOnce(s *suite, t *testing.T) {
	c := s.cache(t)
	ctx := bounded(t)
	for range 3 {
		mustSet(t, c, "k", "v", time.Hour)
		var deleted atomic.Int64
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				ok, err := c.Delete(ctx, "k")
				if err != nil {
					t.Error(err)
				}
				if ok {
					deleted.Add(1)
				}
			})
		}
		wg.Wait()
		if got := deleted.Load(); got != 1 {
			t.Errorf("got true %d times, want once", got)
		}
	}
}
