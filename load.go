package fastpgcache

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"time"
)

// loads is what loading needs: GetOrSet, GetOrRefresh and GetOrSetMany are three short
// ways through flights, which know what this process searches for, and leases, which
// the processes share.
type loads struct {
	acquire, renew, release, look, store, remember *statement

	one, many flights[answer] // what GetOrSetMany searches for is its callers' alone
	refreshes refreshes
	leaseFor  time.Duration // the constant, but in tests
}

func newLoads(c *Cache) loads {
	ss := c.statements
	return loads{acquire: ss.new(acquireSQL), renew: ss.new(renewSQL), release: ss.new(releaseSQL),
		look: ss.new(lookSQL), store: ss.new(storeSQL), remember: ss.new(rememberSQL),
		one: flights[answer]{ctx: c.ctx, run: c.run}, many: flights[answer]{ctx: c.ctx, run: c.run},
		refreshes: refreshes{pause: refreshPause}, leaseFor: leaseFor}
}

// GetOrSet fills dest with the value under key, as Get does. If it is not there, or does
// not decode, GetOrSet fills dest with what load returns, and stores that for ttl, as Set
// does. Of all concurrent callers, in every process on this database, one calls load. The
// others wait for what it returns, each until its own ctx ends, and each decodes a copy of
// its own. No connection is held meanwhile.
//
// The ctx that load gets has the values of its caller's. It ends when no caller in this
// process waits any more, and with Close. load must not ask for the same key, nor call
// Close. A load that returns NotFoundFor has all processes remember that there is nothing
// to load.
//
// When load fails, its callers in this process get the error. When it panics, so does the
// first of them; the others get an error that has the panic and its stack. When it ends
// its goroutine with runtime.Goexit, as testing's FailNow does, all of them get an error.
// Nothing is stored then, and another process that waits calls its own load. So it does
// when the first process dies or stands still for 10 s.
//
// Whoever changes the entry while load runs wins: nothing is stored, and the callers get
// the entry as it is then. Where there is none, those who came before load began get what
// it returned, and the others start over. So who calls GetOrSet after a Delete, Set or the
// like has returned, in any process, never gets what was there before it, unless
// Config.MaxStaleness allows it.
//
// If the database fails, load runs nonetheless and its callers get the value; the error
// goes to Config.OnError. In a transaction load runs on the caller's goroutine, for it
// alone, and what it returns replaces what is there.
//
// Errors match ErrInvalidKey, ErrInvalidTTL, ErrValueTooLarge, ErrClosed, ErrNotFound
// where it is remembered, or what load returned.
func (c *Cache) GetOrSet(ctx context.Context, key string, dest any, ttl time.Duration,
	load func(context.Context) (any, error)) error {
	c = c.of(key)
	const op = "get or set"
	micros, err := storeTTL(ttl)
	if err == nil {
		err = c.getOrLoad(ctx, key, dest, request{op: op, micros: micros}, load)
	}
	return c.loadFailed(ctx, op, err)
}

// NotFoundFor is what a load returns where there is nothing to load. All processes
// remember that for ttl: GetOrSet and GetOrRefresh return an error that matches
// ErrNotFound, without a load, and GetOrSetMany leaves the key out. Get and the other
// lookups miss. Whatever stores something under the key, or deletes it, ends that.
//
// The error itself matches ErrNotFound, and may be wrapped. For a ttl under a millisecond
// it matches ErrInvalidTTL, and nothing is remembered.
func NotFoundFor(ttl time.Duration) error {
	micros, err := storeTTL(ttl)
	if err == nil && micros == noTTL {
		err = fmt.Errorf("%w: %v", ErrInvalidTTL, ttl)
	}
	if err != nil {
		return fmt.Errorf("%w, but it cannot be remembered: %w", ErrNotFound, err)
	}
	return &notFound{micros}
}

// notFound is an absence to be remembered.
type notFound struct{ micros int64 }

func (*notFound) Error() string   { return ErrNotFound.Error() }
func (e *notFound) Unwrap() error { return ErrNotFound }

// loadFailed is fail, but for errors of loaders, whose SQLSTATE is not about the cache.
func (c *Cache) loadFailed(ctx context.Context, op string, err error) error {
	if err == nil {
		return nil
	}
	var loader *loadError
	if errors.As(err, &loader) || errors.Is(err, ErrNotFound) {
		return prefixed(op, err)
	}
	return c.fail(ctx, op, err)
}

// loadError is an error of a loader.
type loadError struct{ err error }

func (e *loadError) Error() string { return "load: " + e.err.Error() }
func (e *loadError) Unwrap() error { return e.err }

// request is what is to be searched for.
type request struct {
	op     string
	micros int64             // the TTL of what is loaded
	late   int64             // microseconds before its end, from when on an entry is to be loaded anew
	usable func(stored) bool // whether an entry is an answer
	load   loader
}

// loader returns the values of missing keys, in the manner of GetOrSetMany's.
type loader func(ctx context.Context, missing []string) (map[string]any, error)

var errNoLoader = errors.New("load is nil")

// getOrLoad does r for one key.
func (c *Cache) getOrLoad(ctx context.Context, key string, dest any, r request, load func(context.Context) (any, error)) error {
	err := checkKey(key)
	if err == nil {
		err = checkDest(dest)
	}
	if err == nil && load == nil {
		err = errNoLoader
	}
	if err != nil {
		return err
	}
	if c.tx != nil {
		return c.getOrLoadInTx(ctx, key, dest, r.of(key, dest, load))
	}
	for {
		got, err := c.findFor(ctx, key, r)
		hit := got.found && decodes(got.value, dest)
		if hit {
			c.wasRead(key)
		}
		if err == nil && !got.kept {
			c.stats.lookup(hit)
		}
		switch {
		case hit && r.stale(got):
			if c.loads.refreshes.begin(key) {
				c.refresh(ctx, key, r.of(key, dest, load), got.expires-got.now)
			}
			return nil
		case hit:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, ErrClosed):
			return err
		}
		a, good, err := c.fly(ctx, r.of(key, dest, load), key)
		switch {
		case err != nil:
			return err
		case good && a.loaded:
			return a.value.decode(dest)
		case good && decodes(a.value, dest):
			return nil
		}
		// It came too late, or this entry decodes for others only.
	}
}

// findFor looks key up, with its age where r needs that.
func (c *Cache) findFor(ctx context.Context, key string, r request) (lookup, error) {
	if r.late > 0 {
		return c.findAged(ctx, aging{key, r.late})
	}
	return c.find(ctx, key)
}

// stale reports whether an entry is to be loaded anew.
func (r request) stale(l lookup) bool { return r.late > 0 && l.expires-l.now <= float64(r.late)/1e6 }

// of completes r for one key.
func (r request) of(key string, dest any, load func(context.Context) (any, error)) request {
	r.usable = func(stored) bool { return true }
	if dest != nil {
		t := reflect.TypeOf(dest).Elem()
		r.usable = func(v stored) bool { return v.decode(reflect.New(t).Interface()) == nil }
	}
	r.load = func(ctx context.Context, _ []string) (map[string]any, error) {
		value, err := load(ctx)
		if err != nil {
			return nil, err
		}
		return map[string]any{key: value}, nil
	}
	return r
}

// decodes reports whether it filled dest; if not, dest is left empty.
func decodes(v stored, dest any) bool {
	if v.decode(dest) == nil {
		return true
	}
	reflect.ValueOf(dest).Elem().SetZero()
	return false
}

// fly takes part in the flight for key until it has landed.
func (c *Cache) fly(ctx context.Context, r request, key string) (answer, bool, error) {
	seat := c.loads.one.join(ctx, []string{key}, func(ctx context.Context, f *flight[answer]) { c.search(ctx, f, r) })[0]
	defer seat.leave()
	return seat.await(ctx)
}

// getOrLoadInTx has no others to wait for, and none who wait.
func (c *Cache) getOrLoadInTx(ctx context.Context, key string, dest any, r request) error {
	keys := []string{key}
	seen, err := c.look(ctx, keys)
	if err != nil {
		return err
	}
	hit := seen[key].found && decodes(seen[key].value, dest)
	c.stats.lookup(hit)
	if hit {
		return nil
	}
	if seen[key].absent {
		return ErrNotFound
	}
	loaded, failure := c.call(ctx, r, keys)
	if err := c.storeInTx(ctx, loaded); err != nil {
		return err
	}
	if failure != nil {
		return failure
	}
	return loaded[key].value.decode(dest)
}

// answer is what a flight brings.
type answer struct {
	value  stored
	loaded bool // and not an entry that was there
}

// search is a flight: it ends when each of its keys has been found, or loaded and
// stored. Keys that other processes load it polls for, once its own are stored and
// given back: so nobody waits in a circle.
func (c *Cache) search(ctx context.Context, f *flight[answer], r request) {
	l := c.newLease(r.op)
	defer l.release(ctx)
	for rest, attempt := f.keys, 1; len(rest) > 0; attempt++ {
		err := l.acquire(ctx, rest)
		// The look comes after the lease, and not with it: who had the lease before may
		// just have stored the entry.
		looked := f.send()
		seen, failed := c.look(ctx, slices.DeleteFunc(slices.Clone(rest), func(key string) bool { return c.blames(err, key) }))
		err = also(err, failed)
		if over := c.over(ctx); over != nil {
			for _, key := range rest {
				f.land(key, outcome[answer]{err: over, good: everybody})
			}
			return
		}
		if err != nil {
			c.report(r.op, err)
		}
		var missing, others []string
		for _, key := range rest {
			switch e := seen[key]; {
			case c.blames(err, key): // it is loaded, and not stored
				l.keys[key] = false
				missing = append(missing, key)
			case e.found && r.usable(e.value):
				f.land(key, outcome[answer]{value: answer{value: e.value}, good: looked})
			case e.absent:
				f.land(key, outcome[answer]{err: ErrNotFound, good: looked})
			case l.keys[key]:
				missing = append(missing, key)
			default:
				others = append(others, key)
			}
		}
		if len(missing) > 0 {
			c.load(ctx, f, r, l, missing, seen)
		} else {
			l.release(ctx)
		}
		if rest = others; len(rest) > 0 {
			const slowest = 7 // 64 to 128 ms
			sleep(ctx, backoff(min(attempt, slowest)))
		}
	}
}

// over is why a flight is not to go on, or nil.
func (c *Cache) over(ctx context.Context) error {
	if c.ended() {
		return ErrClosed
	}
	return ctx.Err()
}

// load calls the loader for missing keys, stores what it returns for those of the lease,
// and lands them.
func (c *Cache) load(ctx context.Context, f *flight[answer], r request, l *lease, missing []string, seen map[string]row) {
	stop := l.keep(ctx)
	begun := f.send()
	loaded, failure := c.call(ctx, r, missing)
	stop()
	if failure == nil {
		failure = errLeftOut
	}

	sent := f.send()
	stored, lost, err := l.store(ctx, loaded, seen)
	if err != nil && !errors.Is(err, ErrClosed) {
		c.report(r.op, err)
	}
	outcomes := make(map[string]outcome[answer], len(missing))
	for _, key := range missing {
		e, ok := loaded[key]
		o := outcome[answer]{err: failure, good: begun} // who comes later may know better
		if ok && !e.absent() {
			o = outcome[answer]{value: answer{e.value, true}, good: begun}
		}
		wrote, intact := stored[key]
		if wrote || intact && !ok { // nobody has changed anything
			o.good = sent
		}
		outcomes[key] = o
	}
	if len(lost) > 0 { // to a write meanwhile: the answer is the entry as it is now, if there is one
		looked := f.send()
		now, _ := c.look(ctx, lost)
		for _, key := range lost {
			if e := now[key]; e.found && r.usable(e.value) {
				outcomes[key] = outcome[answer]{value: answer{value: e.value}, good: looked}
			}
		}
	}
	for _, key := range missing {
		f.land(key, outcomes[key])
	}
}

// errLeftOut is the outcome for a key that its loader did not know.
var errLeftOut = errors.New("the loader left it out")

// call runs the loader, and returns what is to be stored: what it loaded and, if it so
// wishes, the absence of the rest. Then, too, it returns the loader's error.
func (c *Cache) call(ctx context.Context, r request, missing []string) (map[string]entry, error) {
	c.stats.loads.Add(1)
	values, failure := r.load(ctx, missing)
	var absence *notFound
	if failure != nil {
		if !errors.As(failure, &absence) {
			values = nil
		}
		if c.ended() && !errors.Is(failure, ErrClosed) {
			failure = fmt.Errorf("%w: %w", ErrClosed, failure)
		}
		failure = &loadError{failure}
	}
	loaded := make(map[string]entry, len(values))
	for _, key := range missing {
		if value, ok := values[key]; ok {
			v, err := encode(value)
			if err != nil {
				return nil, fmt.Errorf("key %s: %w", shorten(key), err)
			}
			loaded[key] = entry{key, v, r.micros}
		} else if absence != nil {
			loaded[key] = entry{key, stored{isText: true}, -absence.micros}
		}
	}
	return loaded, failure
}

// absent reports whether e is the memory of an absence: its TTL is negative then.
func (e entry) absent() bool { return e.micros < noTTL }

// chunk returns the first of entries, as many as make a statement.
func chunk(entries []entry) []entry {
	bytes := 0
	for i := range entries {
		if bytes += entryBytes + entries[i].value.len(); i == chunkKeys || i > 0 && bytes > chunkBytes {
			return entries[:i]
		}
	}
	return entries
}

const rememberSQL = `
WITH change AS (INSERT INTO {schema}.cache_change (user_id, keys) VALUES ({user}, $1::text[]))
INSERT INTO {schema}.cache (user_id, key, value, value_bytes, expires_at, mark)
SELECT {user}, k.key, (date_part('epoch'::text, statement_timestamp()) + k.ttl::float8 / '1000000'::float8)::text, NULL::bytea,
  '-infinity'::timestamptz, txid_current()
FROM unnest((SELECT $1::text[]), (SELECT $2::bigint[])) k(key, ttl)
ON CONFLICT (user_id, key) DO UPDATE
SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at, mark = excluded.mark`

// storeInTx stores what was loaded in a transaction.
func (c *Cache) storeInTx(ctx context.Context, loaded map[string]entry) error {
	_, err := gather(ctx, c, slices.Sorted(maps.Keys(loaded)), func(c *Cache, keys []string) (struct{}, error) {
		return struct{}{}, c.storeLoaded(ctx, keys, loaded)
	})
	return err
}

// storeLoaded is storeInTx for keys of one database, in their order.
func (c *Cache) storeLoaded(ctx context.Context, keys []string, loaded map[string]entry) error {
	var values, absences []entry
	var absent textArray
	for _, key := range keys {
		if e := loaded[key]; e.absent() {
			e.micros = -e.micros
			absences, absent = append(absences, e), append(absent, key)
		} else {
			values = append(values, e)
		}
	}
	for rest := values; len(rest) > 0; {
		part := chunk(rest)
		if err := c.setSorted(ctx, part); err != nil {
			return err
		}
		c.stats.sets.Add(int64(len(part)))
		rest = rest[len(part):]
	}
	if len(absent) == 0 {
		return nil
	}
	w := c.write(absent...)
	defer w.done()
	_, err := c.exec(ctx, c.loads.remember, c.args(absent, ttlArray(absences))...)
	c.grew(ctx, absences...)
	return err
}
