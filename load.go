package fastpgcache

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"reflect"
	"sync"
	"time"
)

// leaseFor is how long a process that loads a key has it to itself without
// renewing its lease.
const leaseFor = 10 * time.Second

// GetOrSet fills dest with the value under key, as Get does, or, if it is not there
// or does not decode, with what load returns, which it stores as Set does. Of all
// concurrent callers, in every process on this database, one calls load; the others
// wait for what it returns, each until its own ctx ends, and each decodes a copy of
// its own. No connection is held meanwhile.
//
// The ctx that load gets has the values of its caller's, and ends when no caller in
// this process waits any more, and with Close. It must not ask for the same key.
// When load fails, its callers in this process get the error; when it panics, so
// does the first of them, and the others get an error. Nothing is stored then, and
// another process that waits calls its own load, as it does when the first one dies
// or stands still for 10 s.
//
// Whoever changes the entry while load runs wins: nothing is stored, and the callers
// get the entry as it is then. Where there is none, the first caller gets what its
// load returned, and the others start over. If the database fails, load runs
// nonetheless and its callers get the value; the error goes to Config.OnError. In a
// transaction load runs on the caller's goroutine, for it alone, and what it returns
// replaces what is there.
//
// Errors match ErrInvalidKey, ErrInvalidTTL, ErrValueTooLarge, ErrClosed, or what
// load returned.
func (c *Cache) GetOrSet(ctx context.Context, key string, dest any, ttl time.Duration,
	load func(context.Context) (any, error)) error {
	micros, err := storeTTL(ttl)
	if err == nil {
		err = checkKey(key)
	}
	if err == nil {
		err = checkDest(dest)
	}
	if err == nil && load == nil {
		err = errors.New("load is nil")
	}
	if err == nil {
		err = c.getOrSet(ctx, request{key, micros, load}, dest)
	}
	if failed := (*loadError)(nil); errors.As(err, &failed) {
		return prefixed("get or set", err)
	}
	return c.fail(ctx, "get or set", err)
}

type loads struct {
	acquire, renew, release, look, store *statement

	flights  flights
	leaseFor time.Duration // the constant, but in tests
}

func newLoads(c *Cache) loads {
	ss := c.statements
	return loads{acquire: ss.new(acquireSQL), renew: ss.new(renewSQL), release: ss.new(releaseSQL),
		look: ss.new(lookSQL), store: ss.new(storeSQL), leaseFor: leaseFor}
}

// request is what a caller of GetOrSet wants.
type request struct {
	key    string
	micros int64
	load   func(context.Context) (any, error)
}

// loadError is an error of a loader, whose SQLSTATE is not about the cache.
type loadError struct{ err error }

func (e *loadError) Error() string { return "load: " + e.err.Error() }
func (e *loadError) Unwrap() error { return e.err }

func (c *Cache) getOrSet(ctx context.Context, r request, dest any) error {
	var own *flight // that this caller led and another's write overtook
	for {
		v, found, err := c.get(ctx, r.key)
		hit := found && decodes(v, dest)
		if err == nil {
			c.stats.lookup(hit)
		}
		switch {
		case hit:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, ErrClosed), err != nil && c.tx != nil:
			return err
		case c.tx != nil:
			return c.loadInTx(ctx, r, dest)
		case own != nil:
			return own.value.decode(dest)
		}
		f, first := c.join(ctx, r, dest)
		select {
		case <-f.done:
		case <-ctx.Done():
			c.leave(f)
			return ctx.Err()
		}
		switch {
		case first && f.panicked != nil:
			panic(f.panicked)
		case f.err != nil:
			return f.err
		case f.entry && decodes(f.value, dest):
			return nil
		case f.entry: // which decodes for the first caller, but not for this one
		case !f.overtaken:
			return f.value.decode(dest)
		case first:
			own = f
		}
	}
}

func (c *Cache) loadInTx(ctx context.Context, r request, dest any) error {
	v, err := c.call(ctx, r)
	if err == nil {
		err = c.set(ctx, entry{r.key, v, r.micros})
	}
	if err != nil {
		return err
	}
	c.stats.sets.Add(1)
	return v.decode(dest)
}

// call runs the loader.
func (c *Cache) call(ctx context.Context, r request) (stored, error) {
	c.stats.loads.Add(1)
	value, err := r.load(ctx)
	if err != nil {
		if c.ended() && !errors.Is(err, ErrClosed) {
			err = fmt.Errorf("%w: %w", ErrClosed, err)
		}
		return stored{}, &loadError{err}
	}
	return encode(value)
}

// decodes reports whether it filled dest; if not, dest is left empty.
func decodes(v stored, dest any) bool {
	if v.decode(dest) == nil {
		return true
	}
	reflect.ValueOf(dest).Elem().SetZero()
	return false
}

// flights are the searches for values that go on in this process.
type flights struct {
	mu    sync.Mutex
	byKey map[string]*flight // guarded by mu, as is flight.callers
}

// flight is one search for the value of a key, and the loading of it if need be, on
// a goroutine of its own, for all who ask in this process.
type flight struct {
	request
	dest    reflect.Type // what an entry must decode into; nil: it need not
	cancel  context.CancelFunc
	callers int // that wait

	holder  string         // of the lease
	leased  bool           // there may be a lease to give back
	held    bool           // there is one, and f is to load
	version sql.NullString // of the entry that is to be replaced

	done      chan struct{} // closed when what follows is final
	value     stored
	entry     bool // value is an entry that was there
	overtaken bool // value was loaded but not stored, for the entry has changed
	err       error
	panicked  any // what load panicked with, besides err
}

// join returns the flight for r.key, and whether the caller is the first in it.
func (c *Cache) join(ctx context.Context, r request, dest any) (f *flight, first bool) {
	c.loads.flights.mu.Lock()
	if f := c.loads.flights.byKey[r.key]; f != nil {
		f.callers++
		c.loads.flights.mu.Unlock()
		return f, false
	}
	f = &flight{request: r, callers: 1, holder: rand.Text(), done: make(chan struct{})}
	if dest != nil {
		f.dest = reflect.TypeOf(dest).Elem()
	}
	ctx, f.cancel = context.WithCancel(context.WithoutCancel(ctx))
	if c.loads.flights.byKey == nil {
		c.loads.flights.byKey = make(map[string]*flight)
	}
	c.loads.flights.byKey[r.key] = f
	c.loads.flights.mu.Unlock()
	c.run(func() { c.fly(ctx, f) })
	return f, true
}

// leave ends a flight that nobody waits for any more, and keeps others from it.
func (c *Cache) leave(f *flight) {
	c.loads.flights.mu.Lock()
	defer c.loads.flights.mu.Unlock()
	if f.callers--; f.callers == 0 {
		f.cancel()
		c.forget(f)
	}
}

// forget needs flights.mu.
func (c *Cache) forget(f *flight) {
	if c.loads.flights.byKey[f.key] == f {
		delete(c.loads.flights.byKey, f.key)
	}
}

// land wakes everyone who waits for f.
func (c *Cache) land(f *flight) {
	c.loads.flights.mu.Lock()
	c.forget(f)
	c.loads.flights.mu.Unlock()
	close(f.done)
}

// fly is the whole of a flight.
func (c *Cache) fly(ctx context.Context, f *flight) {
	defer context.AfterFunc(c.ctx, f.cancel)()
	defer f.cancel()
	defer c.release(ctx, f)
	defer c.land(f)
	returned := false
	defer func() {
		if !returned { // but load, or a method of its value, panicked or ended the goroutine
			f.panicked = recover()
			f.err = &loadError{fmt.Errorf("panic: %v", f.panicked)}
		}
	}()
	if c.await(ctx, f); f.err == nil && !f.entry {
		c.load(ctx, f)
	}
	returned = true
}

// await returns when f is to load: with the lease, and the version of the entry that
// is to be replaced, or without the lease if the database fails. If there is an
// entry by then, or nobody waits any more, f says so.
func (c *Cache) await(ctx context.Context, f *flight) {
	for attempt := 1; ; attempt++ {
		held, err := c.acquire(ctx, f)
		f.leased = held || err != nil
		var value stored
		var live bool
		if err == nil {
			// After the lease, and not with it: who had it before may just have
			// stored the entry.
			value, live, f.version, err = c.look(ctx, f.key)
		}
		switch {
		case c.ended():
			f.err = ErrClosed
			return
		case ctx.Err() != nil:
			f.err = ctx.Err()
			return
		case err != nil:
			c.report("get or set", err)
			return
		case live && (f.dest == nil || decodes(value, reflect.New(f.dest).Interface())):
			f.value, f.entry = value, true
			return
		case held:
			f.held = true
			return
		}
		const slowest = 7 // 64 to 128 ms
		sleep(ctx, backoff(min(attempt, slowest)))
	}
}

// load gives f the value that its loader returns, and stores it.
func (c *Cache) load(ctx context.Context, f *flight) {
	if f.held {
		renewing, stop := context.WithCancel(ctx)
		defer stop()
		c.run(func() { c.renew(renewing, f) })
	}
	f.value, f.err = c.call(ctx, f.request)
	if f.err != nil || !f.held {
		return
	}
	stored, err := c.store(ctx, f)
	if err != nil && !errors.Is(err, ErrClosed) {
		c.report("get or set", err)
	}
	f.overtaken = err == nil && !stored
}

const acquireSQL = `
INSERT INTO {schema}.cache_lease AS l (user_id, key, holder, expires_at)
VALUES ({user}, $1, $2, statement_timestamp() + $3::float8 * interval '1 microsecond')
ON CONFLICT (user_id, key) DO UPDATE SET holder = excluded.holder, expires_at = excluded.expires_at
WHERE l.expires_at <= statement_timestamp()`

// acquire reports whether nobody else holds the lease.
func (c *Cache) acquire(ctx context.Context, f *flight) (bool, error) {
	n, err := c.exec(ctx, c.loads.acquire, c.args(f.key, f.holder, c.loads.leaseFor.Microseconds())...)
	return n > 0, err
}

const renewSQL = `
UPDATE {schema}.cache_lease SET expires_at = statement_timestamp() + $3::float8 * interval '1 microsecond'
WHERE user_id = {user} AND key = $1 AND holder = $2`

// renew keeps the lease until ctx ends, or it is lost.
func (c *Cache) renew(ctx context.Context, f *flight) {
	for sleep(ctx, c.loads.leaseFor/3) {
		n, err := c.exec(ctx, c.loads.renew, c.args(f.key, f.holder, c.loads.leaseFor.Microseconds())...)
		if err != nil && ctx.Err() == nil {
			c.report("get or set", err)
		}
		if err == nil && n == 0 {
			return
		}
	}
}

const releaseSQL = `
DELETE FROM {schema}.cache_lease WHERE user_id = {user} AND key = $1 AND holder = $2`

// release gives the lease back, if f has one; also while the cache closes, or other
// processes would wait until it runs out, as they do if this fails.
func (c *Cache) release(ctx context.Context, f *flight) {
	if f.leased {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.loads.leaseFor)
		defer cancel()
		c.db.ExecContext(ctx, c.loads.release.text, c.args(f.key, f.holder)...)
	}
}

const lookSQL = `
SELECT value, value_bytes, (expires_at <= statement_timestamp()) IS NOT TRUE, xmin::text FROM {schema}.cache
WHERE user_id = {user} AND key = $1
LIMIT 1`

// look returns what is under key, live or expired, and its version, which every
// write changes.
func (c *Cache) look(ctx context.Context, key string) (v stored, live bool, version sql.NullString, err error) {
	_, err = query(ctx, c, c.loads.look, c.args(key), func(rows *sql.Rows) (none struct{}, err error) {
		var value, valueBytes any
		err = rows.Scan(&value, &valueBytes, &live, &version)
		v, _ = fromColumns(value, valueBytes)
		return none, err
	})
	return v, live, version, err
}

const storeSQL = `
WITH lease AS (DELETE FROM {schema}.cache_lease WHERE user_id = {user} AND key = $1 AND holder = $5 RETURNING key)
INSERT INTO {schema}.cache AS c (user_id, key, value, value_bytes, expires_at)
SELECT {user}, $1, $2::text, $3::bytea, statement_timestamp() + $4::float8 * interval '1 microsecond' FROM lease
ON CONFLICT (user_id, key) DO UPDATE
SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at
WHERE c.xmin::text = $6`

// store ends the lease, and reports whether it stored what was loaded: not if the
// lease was lost, to a Delete or another process, or the entry is not at version any
// more.
func (c *Cache) store(ctx context.Context, f *flight) (bool, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.loads.leaseFor)
	defer cancel()
	w := c.write(f.key)
	defer w.done()
	value, valueBytes := f.value.arguments()
	n, err := c.exec(ctx, c.loads.store, c.args(f.key, value, valueBytes, ttlArgument(f.micros), f.holder, f.version)...)
	if err != nil {
		return false, err
	}
	f.leased = false
	c.stats.sets.Add(n)
	return n > 0, nil
}
