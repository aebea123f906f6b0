package fastpgcache

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"time"
)

// GetOrSet fills dest with the value under key, as Get does, or, if it is not there
// or does not decode, with what load returns, which it stores as Set does. Of all
// concurrent callers, in every process on this database, one calls load; the others
// wait for what it returns, each until its own ctx ends, and each decodes a copy of
// its own. No connection is held meanwhile.
//
// The ctx that load gets has the values of its caller's, and ends when no caller in
// this process waits any more, and with Close, which waits for load, but not for long.
// load must not ask for the same key, nor call Close. When load fails, its callers in
// this process get the error; when it panics, so does the first of them, and the
// others get an error that has the panic and its stack. Where load ends its goroutine
// with runtime.Goexit, as testing's FailNow does, all of them get an error. Nothing
// is stored then, and another process that waits calls its own load, as it does when
// the first one dies or stands still for 10 s.
//
// Whoever changes the entry while load runs wins: nothing is stored, and the callers
// get the entry as it is then. Where there is none, those who came before load began
// get what it returned, and the others start over. So who calls GetOrSet after a
// Delete, Set or the like has returned, in any process, never gets what was there
// before it, unless Config.MaxStaleness allows it. If the database fails, load runs
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
		err = c.getOrSet(ctx, key, dest, micros, load)
	}
	return c.loadFailed(ctx, "get or set", err)
}

// loads is what loading needs.
type loads struct {
	acquire, renew, release, look, store *statement

	flights  flights[answer]
	leaseFor time.Duration // the constant, but in tests
}

func newLoads(c *Cache) loads {
	ss := c.statements
	return loads{acquire: ss.new(acquireSQL), renew: ss.new(renewSQL), release: ss.new(releaseSQL),
		look: ss.new(lookSQL), store: ss.new(storeSQL), flights: flights[answer]{ctx: c.ctx, run: c.run}, leaseFor: leaseFor}
}

// loadFailed is fail, but for errors of loaders, whose SQLSTATE is not about the cache.
func (c *Cache) loadFailed(ctx context.Context, op string, err error) error {
	var loader *loadError
	if errors.As(err, &loader) {
		return prefixed(op, err)
	}
	return c.fail(ctx, op, err)
}

// loadError is an error of a loader.
type loadError struct{ err error }

func (e *loadError) Error() string { return "load: " + e.err.Error() }
func (e *loadError) Unwrap() error { return e.err }

func (c *Cache) getOrSet(ctx context.Context, key string, dest any, micros int64,
	load func(context.Context) (any, error)) error {
	err := checkKey(key)
	if err == nil {
		err = checkDest(dest)
	}
	if err == nil && load == nil {
		err = errors.New("load is nil")
	}
	if err != nil {
		return err
	}
	for {
		got, err := c.find(ctx, key)
		hit := got.found && decodes(got.value, dest)
		if err == nil && !got.kept {
			c.stats.lookup(hit)
		}
		switch {
		case hit:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, ErrClosed), err != nil && c.tx != nil:
			return err
		}
		r := request{op: "get or set", micros: micros, usable: decodesInto(dest), load: loadOne(key, load)}
		if c.tx != nil {
			return c.loadInTx(ctx, r, key, dest)
		}
		a, good, err := c.fly(ctx, r, key)
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

// fly takes part in the flight for key until it has landed.
func (c *Cache) fly(ctx context.Context, r request, key string) (answer, bool, error) {
	seat := c.loads.flights.join(ctx, []string{key}, func(ctx context.Context, f *flight[answer]) { c.search(ctx, f, r) })[0]
	defer seat.leave()
	return seat.await(ctx)
}

func (c *Cache) loadInTx(ctx context.Context, r request, key string, dest any) error {
	entries, err := c.call(ctx, r, []string{key})
	if err == nil {
		err = c.set(ctx, entries[key])
	}
	if err != nil {
		return err
	}
	c.stats.sets.Add(1)
	return entries[key].value.decode(dest)
}

// decodes reports whether it filled dest; if not, dest is left empty.
func decodes(v stored, dest any) bool {
	if v.decode(dest) == nil {
		return true
	}
	reflect.ValueOf(dest).Elem().SetZero()
	return false
}

// decodesInto returns what tells whether a value would fill dest.
func decodesInto(dest any) func(stored) bool {
	if dest == nil {
		return func(stored) bool { return true }
	}
	t := reflect.TypeOf(dest).Elem()
	return func(v stored) bool { return v.decode(reflect.New(t).Interface()) == nil }
}

// request is what is to be searched for.
type request struct {
	op     string
	micros int64             // the TTL of what is loaded
	usable func(stored) bool // whether an entry is an answer
	load   loader
}

// loader returns the values of missing keys, in the manner of GetOrSetMany's.
type loader func(ctx context.Context, missing []string) (map[string]any, error)

func loadOne(key string, load func(context.Context) (any, error)) loader {
	return func(ctx context.Context, _ []string) (map[string]any, error) {
		value, err := load(ctx)
		if err != nil {
			return nil, err
		}
		return map[string]any{key: value}, nil
	}
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
	l := c.newLease()
	defer l.release(ctx)
	for rest, attempt := f.keys, 1; len(rest) > 0; attempt++ {
		err := l.acquire(ctx, rest)
		// The look comes after the lease, and not with it: who had the lease before may
		// just have stored the entry.
		looked := f.send()
		var seen map[string]row
		if err == nil {
			seen, err = c.look(ctx, rest)
		}
		if ended := c.over(ctx); ended != nil {
			for _, key := range rest {
				f.land(key, outcome[answer]{err: ended, good: everybody})
			}
			return
		}
		if err != nil {
			c.report(r.op, err)
			c.load(ctx, f, r, nil, rest, nil)
			return
		}
		var missing, others []string
		for _, key := range rest {
			switch e := seen[key]; {
			case e.found && r.usable(e.value):
				f.land(key, outcome[answer]{value: answer{value: e.value}, good: looked})
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

// load calls the loader for missing keys, stores what it returns if l is their lease
// and not nil, and lands them.
func (c *Cache) load(ctx context.Context, f *flight[answer], r request, l *lease, missing []string, seen map[string]row) {
	good := f.send() // who comes later may know better than what is not stored
	if l != nil {
		stop := l.keep(ctx)
		defer stop()
		defer func() { _ = 0 }()
	}
	entries, failure := c.call(ctx, r, missing)
	if failure == nil {
		failure = errLeftOut
	}
	sent := f.send()
	var stored map[string]bool
	var err error
	switch {
	case l == nil:
	case len(entries) > 0:
		stored, err = l.store(ctx, entries, seen)
	case l.release(ctx): // nobody has deleted anything
		good = sent
	}
	if err != nil && !errors.Is(err, ErrClosed) {
		c.report(r.op, err)
	}
	var lost []string
	for _, key := range missing {
		e, ok := entries[key]
		o := outcome[answer]{value: answer{e.value, true}, good: good}
		if !ok {
			o = outcome[answer]{err: failure, good: good}
		}
		switch wrote, intact := stored[key]; {
		case wrote, intact && !ok:
			o.good = sent
		case ok && stored != nil:
			lost = append(lost, key)
			continue
		}
		f.land(key, o)
	}
	if len(lost) > 0 { // to a write meanwhile: so the entry is that, as it is now
		looked := f.send()
		seen, _ = c.look(ctx, lost)
		for _, key := range lost {
			o := outcome[answer]{value: answer{entries[key].value, true}, good: good}
			if e := seen[key]; e.found && r.usable(e.value) {
				o = outcome[answer]{value: answer{value: e.value}, good: looked}
			}
			f.land(key, o)
		}
	}
}

// errLeftOut is the outcome for a key that its loader did not know.
var errLeftOut = errors.New("the loader left it out")

// call runs the loader and encodes what it returns.
func (c *Cache) call(ctx context.Context, r request, missing []string) (map[string]entry, error) {
	c.stats.loads.Add(1)
	values, err := r.load(ctx, missing)
	if err != nil {
		if c.ended() && !errors.Is(err, ErrClosed) {
			err = fmt.Errorf("%w: %w", ErrClosed, err)
		}
		return nil, &loadError{err}
	}
	entries := make(map[string]entry, len(values))
	for _, key := range missing {
		if value, ok := values[key]; ok {
			v, err := encode(value)
			if err != nil {
				return nil, err
			}
			entries[key] = entry{key, v, r.micros}
		}
	}
	return entries, nil
}
