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
	const op = "get or set"
	if err := checkKey(key); err != nil {
		return c.fail(ctx, op, err)
	}
	if err := checkDest(dest); err != nil {
		return c.fail(ctx, op, err)
	}
	micros, err := storeTTL(ttl)
	if err != nil {
		return c.fail(ctx, op, err)
	}
	if load == nil {
		return c.fail(ctx, op, errors.New("load is nil"))
	}
	var own *flight // the one that this caller led, if it was overtaken
	for {
		v, found, err := c.get(ctx, key)
		switch {
		case found && decodes(v, dest):
			c.stats.lookup(true)
			return nil
		case ctx.Err() != nil:
			return c.fail(ctx, op, ctx.Err())
		case errors.Is(err, ErrClosed), err != nil && c.tx != nil:
			return err
		case own != nil:
			return c.decodeLoaded(ctx, own.value, dest)
		}
		c.stats.lookup(false)
		if c.tx != nil {
			return c.loadInTx(ctx, key, dest, micros, load)
		}
		f, first := c.join(ctx, key, dest, micros, load)
		select {
		case <-f.done:
		case <-ctx.Done():
			c.leave(f)
			return c.fail(ctx, op, ctx.Err())
		}
		switch {
		case first && f.panicked != nil:
			panic(f.panicked)
		case f.err != nil:
			return f.err
		case f.entry && decodes(f.value, dest):
			return nil
		case f.entry: // of a type that suited the first caller only
		case !f.overtaken:
			return c.decodeLoaded(ctx, f.value, dest)
		case first:
			own = f
		}
	}
}

// decodes reports whether it filled dest; if not, dest is left empty.
func decodes(v Value, dest any) bool {
	if decode(v, dest) == nil {
		return true
	}
	reflect.ValueOf(dest).Elem().SetZero()
	return false
}

func (c *Cache) decodeLoaded(ctx context.Context, v Value, dest any) error {
	if err := decode(v, dest); err != nil {
		return c.fail(ctx, "get or set", err)
	}
	return nil
}

func (c *Cache) loadInTx(ctx context.Context, key string, dest, micros any, load func(context.Context) (any, error)) error {
	c.stats.loads.Add(1)
	value, err := load(ctx)
	if err != nil {
		return loadError(err)
	}
	v, err := encode(value)
	if err != nil {
		return c.fail(ctx, "get or set", err)
	}
	if err := c.set(ctx, key, v, micros); err != nil {
		return err
	}
	c.stats.sets.Add(1)
	return c.decodeLoaded(ctx, v.value(), dest)
}

// loadError does not classify err, as fail would: its SQLSTATE may be about other
// tables than the cache's.
func loadError(err error) error {
	return fmt.Errorf("fastpgcache: get or set: load: %w", err)
}

// flights are the searches for values that go on in this process.
type flights struct {
	mu    sync.Mutex
	byKey map[string]*flight // guarded by mu, as is flight.callers
}

// flight is one search for the value of a key, and the loading of it if need be, on
// a goroutine of its own, for all who ask in this process.
type flight struct {
	key    string
	dest   reflect.Type // what an entry must decode into; nil: it need not
	micros any
	load   func(context.Context) (any, error)

	holder  string // of the lease
	leased  bool   // there may be a lease to give back
	callers int    // that wait
	cancel  context.CancelFunc

	done      chan struct{} // closed when what follows is final
	value     Value
	entry     bool // value is an entry that another process stored
	overtaken bool // value was loaded, and not stored since the entry changed
	err       error
	panicked  any // what load panicked with, besides err
}

// join returns the flight for key, and whether the caller is the first in it.
func (c *Cache) join(ctx context.Context, key string, dest, micros any, load func(context.Context) (any, error)) (*flight, bool) {
	c.flights.mu.Lock()
	defer c.flights.mu.Unlock()
	if f := c.flights.byKey[key]; f != nil {
		f.callers++
		return f, false
	}
	f := &flight{key: key, micros: micros, load: load, holder: rand.Text(), callers: 1, done: make(chan struct{})}
	if dest != nil {
		f.dest = reflect.TypeOf(dest).Elem()
	}
	ctx, f.cancel = context.WithCancel(context.WithoutCancel(ctx))
	started := c.start(func(background context.Context) {
		defer context.AfterFunc(background, f.cancel)()
		c.fly(ctx, f)
	})
	if !started {
		f.err = c.fail(ctx, "get or set", ErrClosed)
		close(f.done)
		return f, true
	}
	if c.flights.byKey == nil {
		c.flights.byKey = make(map[string]*flight)
	}
	c.flights.byKey[key] = f
	return f, true
}

// leave ends the flight that nobody waits for, and keeps others from joining it.
func (c *Cache) leave(f *flight) {
	c.flights.mu.Lock()
	defer c.flights.mu.Unlock()
	if f.callers--; f.callers == 0 {
		f.cancel()
		c.forget(f)
	}
}

// forget needs flights.mu.
func (c *Cache) forget(f *flight) {
	if c.flights.byKey[f.key] == f {
		delete(c.flights.byKey, f.key)
	}
}

// land wakes everyone who waits for f.
func (c *Cache) land(f *flight) {
	c.flights.mu.Lock()
	c.forget(f)
	c.flights.mu.Unlock()
	close(f.done)
}

// fly is the whole of a flight. It ends also where load ends the goroutine.
func (c *Cache) fly(ctx context.Context, f *flight) {
	defer f.cancel()
	defer c.release(ctx, f)
	defer c.land(f)

	version, held := c.await(ctx, f)
	if f.entry || f.err != nil {
		return
	}
	if held {
		renewing, stop := context.WithCancel(ctx)
		defer stop()
		c.workers.Go(func() { c.renew(renewing, f) })
	}
	v, ok := c.call(ctx, f)
	if !ok {
		return
	}
	f.value = v.value()
	if held {
		stored, err := c.store(ctx, f, v, version)
		if err != nil {
			c.report(err)
			return
		}
		f.overtaken = !stored
	}
}

// await returns when f is to load: with the lease and the version of the entry that
// what it loads will replace, or without the lease if the database fails. If there
// is an entry by then, or nobody waits any more, it says so in f.
func (c *Cache) await(ctx context.Context, f *flight) (version sql.NullString, held bool) {
	for attempt := 1; ; attempt++ {
		held, err := c.acquire(ctx, f)
		f.leased = held || err != nil
		var value Value
		var live bool
		if err == nil {
			// In a statement of its own, after the lease: whoever had it before
			// may have stored the entry at the last moment.
			value, live, version, err = c.look(ctx, f.key)
		}
		switch {
		case ctx.Err() != nil:
		case err != nil:
			c.report(err)
			return version, false
		case live && (f.dest == nil || decodes(value, reflect.New(f.dest).Interface())):
			f.value, f.entry = value, true
			return version, held
		case held:
			return version, true
		}
		const longest = 7 // 64 to 128 ms
		if !sleep(ctx, backoff(min(attempt, longest))) {
			f.err = c.fail(ctx, "get or set", ErrClosed) // or nobody is there to read it
			return version, false
		}
	}
}

// call runs load, and reports whether it returned a value; if not, f has the error.
func (c *Cache) call(ctx context.Context, f *flight) (v encoded, ok bool) {
	returned := false
	defer func() {
		if !returned { // but panicked, or ended the goroutine
			f.panicked = recover()
			f.err = loadError(fmt.Errorf("panic: %v", f.panicked))
		}
	}()
	c.stats.loads.Add(1)
	value, err := f.load(ctx)
	returned = true
	switch {
	case err != nil && c.background.Err() != nil:
		f.err = loadError(fmt.Errorf("%w: %w", ErrClosed, err))
		return v, false
	case err != nil:
		f.err = loadError(err)
		return v, false
	}
	if v, err = encode(value); err != nil {
		f.err = c.fail(context.WithoutCancel(ctx), "get or set", err)
		return v, false
	}
	return v, true
}

const acquireSQL = `
INSERT INTO {schema}.cache_lease AS l (user_id, key, holder, expires_at)
VALUES ({user}, $1, $2, statement_timestamp() + $3::bigint * interval '1 microsecond')
ON CONFLICT (user_id, key) DO UPDATE SET holder = excluded.holder, expires_at = excluded.expires_at
WHERE l.expires_at <= statement_timestamp()`

// acquire reports whether nobody else holds the lease.
func (c *Cache) acquire(ctx context.Context, f *flight) (bool, error) {
	n, err := c.exec(ctx, c.stmt.acquire, c.args(f.key, f.holder, microseconds(c.leaseFor))...)
	return n > 0, err
}

const renewSQL = `
UPDATE {schema}.cache_lease SET expires_at = statement_timestamp() + $3::bigint * interval '1 microsecond'
WHERE user_id = {user} AND key = $1 AND holder = $2`

// renew keeps the lease until ctx ends, or it is lost.
func (c *Cache) renew(ctx context.Context, f *flight) {
	for sleep(ctx, c.leaseFor/3) {
		n, err := c.exec(ctx, c.stmt.renew, c.args(f.key, f.holder, microseconds(c.leaseFor))...)
		if err != nil && ctx.Err() == nil {
			c.report(err)
		}
		if err == nil && n == 0 {
			return
		}
	}
}

const releaseSQL = `
DELETE FROM {schema}.cache_lease WHERE user_id = {user} AND key = $1 AND holder = $2`

// release gives the lease back, if f has one. Should that fail, it runs out.
func (c *Cache) release(ctx context.Context, f *flight) {
	if f.leased {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.leaseFor)
		defer cancel()
		c.exec(ctx, c.stmt.release, c.args(f.key, f.holder)...)
	}
}

const lookSQL = `
SELECT value, value_bytes, (expires_at <= statement_timestamp()) IS NOT TRUE, xmin::text FROM {schema}.cache
WHERE user_id = {user} AND key = $1`

// look returns what is under key, live or expired, and its version, which every
// write changes.
func (c *Cache) look(ctx context.Context, key string) (v Value, live bool, version sql.NullString, err error) {
	var value, valueBytes []byte
	_, err = c.row(ctx, c.stmt.look, c.args(key), &value, &valueBytes, &live, &version)
	if value == nil {
		value = valueBytes
	}
	return value, live, version, err
}

const storeSQL = `
WITH lease AS (DELETE FROM {schema}.cache_lease WHERE user_id = {user} AND key = $1 AND holder = $5 RETURNING key)
INSERT INTO {schema}.cache AS c (user_id, key, value, value_bytes, expires_at)
SELECT {user}, $1, $2::text, $3::bytea, statement_timestamp() + $4::bigint * interval '1 microsecond' FROM lease
ON CONFLICT (user_id, key) DO UPDATE
SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at
WHERE c.xmin::text = $6`

// store ends the lease, and reports whether it stored v: not if the lease was lost,
// to a Delete or another process, or the entry is not what it was at version.
func (c *Cache) store(ctx context.Context, f *flight, v encoded, version sql.NullString) (bool, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.leaseFor)
	defer cancel()
	value, valueBytes := v.columns()
	n, err := c.exec(ctx, c.stmt.store, c.args(f.key, value, valueBytes, f.micros, f.holder, version)...)
	if err != nil {
		return false, err
	}
	f.leased = false
	c.stats.sets.Add(n)
	return n > 0, nil
}
