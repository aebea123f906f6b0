package fastpgcache

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// GetOrRefresh is GetOrSet for entries that nobody should wait for twice. What load
// returns is stored for ttl, and counts as fresh for the first part of that, fresh. After
// that callers still get it at once, while one of them, of all processes, has load run in
// the background. Only what is not there is waited for.
//
// When such a refresh fails, the entry goes on being served until its TTL ends. The error
// goes to Config.OnError, and the next try waits a moment that grows with each failure.
// Who waits for a missing key never gets a refresh's error. A Set or Delete during a
// refresh wins. What load returns as NotFoundFor replaces the entry.
//
// The ctx of a refresh has the values of the caller's that began it. It ends when the
// entry does, and with Close. An entry without a TTL is always fresh. In a transaction
// there is no refresh.
//
// The error matches ErrInvalidTTL unless 0 < fresh <= ttl. Other errors are those of
// GetOrSet.
func (c *Cache) GetOrRefresh(ctx context.Context, key string, dest any, fresh, ttl time.Duration,
	load func(context.Context) (any, error)) error {
	c = c.of(key)
	const op = "get or refresh"
	micros, err := storeTTL(ttl)
	if err == nil && (micros == noTTL || fresh <= 0 || fresh > ttl) {
		err = fmt.Errorf("%w: fresh for %v of %v", ErrInvalidTTL, fresh, ttl)
	}
	if err == nil {
		err = c.getOrLoad(ctx, key, dest, request{op: op, micros: micros, late: (ttl - fresh).Microseconds()}, load)
	}
	return c.loadFailed(ctx, op, err)
}

// refresh has r done for key in the background, whose entry lives for left seconds. It
// ends what refreshes.begin has begun.
func (c *Cache) refresh(ctx context.Context, key string, r request, left float64) {
	const longest = 1e9 // seconds, which a Duration holds
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Duration(min(left, longest)*1e9))
	c.run(func() {
		defer cancel()
		defer context.AfterFunc(c.ctx, cancel)()
		how := failed
		defer func() { c.loads.refreshes.end(key, how) }()
		guard(func() {
			var err error
			if how, err = c.reload(ctx, key, r); err != nil {
				c.reportLoad(r.op, err)
			}
		}, func(err error) { c.reportLoad(r.op, err) })
	})
}

// reportLoad is report, for what may be an error of a loader.
func (c *Cache) reportLoad(op string, err error) {
	if errors.Is(err, ErrClosed) {
		return
	}
	if err = c.loadFailed(context.Background(), op, err); c.cfg.OnError != nil {
		c.cfg.OnError(err)
	}
}

// reload loads key anew, if nobody else does.
func (c *Cache) reload(ctx context.Context, key string, r request) (ending, error) {
	keys := []string{key}
	l := c.newLease(r.op)
	defer l.release(ctx)
	if err := l.acquire(ctx, keys); err != nil {
		return failed, err
	}
	if !l.keys[key] {
		return busy, nil
	}
	// What the caller saw may be older than another's refresh.
	seen, err := c.look(ctx, keys)
	if err != nil {
		return failed, err
	}
	if e := seen[key]; !e.found || !r.stale(e.lookup) {
		return done, nil
	}
	stop := l.keep(ctx)
	loaded, failure := c.call(ctx, r, keys)
	stop()
	if len(loaded) == 0 {
		return failed, failure
	}
	if _, _, err := l.store(ctx, loaded, seen); err != nil {
		return failed, err
	}
	return done, nil
}

// ending is how a refresh ended.
type ending int

const (
	done   ending = iota
	busy          // another process is at it
	failed        // and is to be tried again later
)

// refreshes are the refreshes that go on in this process, and those that are not to be
// tried again yet. There are at most maxRefreshes of the latter: of more, some are
// tried earlier.
type refreshes struct {
	pause func(failures int) time.Duration // before the next try; of one that met another's, after none

	mu    sync.Mutex
	byKey map[string]*refresh
}

type refresh struct {
	running  bool
	failures int       // one after the other
	until    time.Time // no try before
}

const maxRefreshes = 10_000

// refreshPause is 100 to 200 ms, then twice that, and so on up to a minute.
func refreshPause(failures int) time.Duration {
	base := 100 * time.Millisecond << min(max(failures-1, 0), 9)
	return min(base+rand.N(base), time.Minute)
}

// begin reports whether the caller is to refresh key: nobody in this process is at it, or
// failed a moment ago. It calls end then.
func (rs *refreshes) begin(key string) bool {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	r := rs.byKey[key]
	if r == nil {
		if rs.byKey == nil {
			rs.byKey = make(map[string]*refresh)
		}
		r = &refresh{}
		rs.byKey[key] = r
	}
	if r.running || time.Now().Before(r.until) {
		return false
	}
	r.running = true
	return true
}

func (rs *refreshes) end(key string, how ending) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	r := rs.byKey[key]
	switch r.running = false; how {
	case done:
		delete(rs.byKey, key)
		return
	case busy:
		r.failures = 0
	case failed:
		r.failures++
	}
	r.until = time.Now().Add(rs.pause(r.failures))
	for other, r := range rs.byKey {
		if len(rs.byKey) <= maxRefreshes {
			break
		}
		if !r.running && other != key {
			delete(rs.byKey, other)
		}
	}
}
