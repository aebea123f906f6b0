package fastpgcache

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strconv"
	"sync"
)

// shards are the caches that a sharded one is made of. Operations on one key begin with
// Cache.of, those on many go through gather, and those on all through everywhere; each is
// the cache itself where it is one.
type shards struct {
	caches []*Cache   // in the order of their names
	names  rendezvous // theirs
}

// NewSharded returns a cache that spreads its entries over several, which may be schemas
// of one database, or databases of their own. Each key belongs to one of them, its shard,
// chosen by rendezvous hashing of the shard's name and the key: a shard that joins takes
// its share of the keys from the others, and one that leaves gives its own to them. All
// processes must use the same names. It does no I/O.
//
// A shard must be empty when it joins: call its Clear before. Once a shard has joined or
// left, and every process has the new set, call Sweep. Without this, entries from earlier
// may come back. Whoever renames a shard removes one and adds another. docs/scaling.md
// tells how.
//
// All operations work, and errors name the shard. Those on many keys go to their shards
// side by side. SetMany is all or none on each *sql.DB. GetMany and GetOrSetMany return
// what was found, with an error, where a shard fails. WithTx needs shards that are all
// over one *sql.DB, which DB returns: else it is nil, and every operation of WithTx is an
// error. Close closes the shards.
//
// The error matches ErrInvalidConfig where there are no shards, a name is no valid key, or
// one cache is there under two names, also by an earlier call.
func NewSharded(shards map[string]*Cache) (*Cache, error) {
	c, err := newSharded(shards)
	if err != nil {
		return nil, prefixed("new sharded", fmt.Errorf("%w: %w", ErrInvalidConfig, err))
	}
	return c, nil
}

func newSharded(byName map[string]*Cache) (*Cache, error) {
	if len(byName) == 0 {
		return nil, errors.New("there are no shards")
	}
	names := slices.Sorted(maps.Keys(byName))
	s := &shards{names: newRendezvous(names)}
	for _, name := range names {
		c := byName[name]
		switch {
		case checkKey(name) != nil:
			return nil, fmt.Errorf("shard %s: %w", shorten(name), checkKey(name))
		case c == nil || c.shards != nil || c.tx != nil:
			return nil, fmt.Errorf("shard %s is nil, sharded, or of WithTx", shorten(name))
		}
		for i, other := range s.caches {
			if c.core == other.core || c.db == other.db && c.cfg.schema() == other.cfg.schema() && c.cfg.User == other.cfg.User {
				return nil, fmt.Errorf("shards %s and %s are one", shorten(names[i]), shorten(name))
			}
		}
		if was := c.name.Load(); was != nil && *was != name {
			return nil, fmt.Errorf("shard %s is shard %s already", shorten(name), shorten(*was))
		}
		s.caches = append(s.caches, c)
	}
	db := s.caches[0].db
	for i, c := range s.caches {
		c.name.Store(&names[i])
		if c.db != db {
			db = nil
		}
	}
	c := &Cache{core: &core{tasks: newTasks(), db: db, statements: &statements{}}, shards: s}
	c.cfg.OnError = s.report
	c.loads = loads{many: flights[answer]{ctx: c.ctx, run: c.run}, leaseFor: leaseFor}
	return c, nil
}

// report tells the shards that err is about.
func (s *shards) report(err error) {
	for _, c := range s.caches {
		if errors.Is(err, ofShard{c.core}) && c.cfg.OnError != nil {
			c.cfg.OnError(err)
		}
	}
}

// of returns the cache that key is in.
func (c *Cache) of(key string) *Cache {
	if c.shards == nil {
		return c
	}
	return c.shards.caches[c.shards.names.of(key)]
}

// all returns the caches that c is made of, in the order of their names.
func (c *Cache) all() []*Cache {
	if c.shards == nil {
		return []*Cache{c}
	}
	return c.shards.caches
}

// in returns c with its operations in t.
func (c *Cache) in(t *transaction) *Cache {
	in := &Cache{core: c.core, tx: t}
	if c.shards != nil {
		in.shards = &shards{names: c.shards.names}
		for _, shard := range c.shards.caches {
			in.shards.caches = append(in.shards.caches, shard.in(t))
		}
	}
	return in
}

// part is a shard, and those keys of a batch that are there, in the batch's order.
type part struct {
	c    *Cache
	keys []string
}

// split returns the parts of keys, in the order of the shards' names.
func (c *Cache) split(keys []string) []part {
	if c.shards == nil {
		return []part{{c, keys}}
	}
	parts := make([]part, len(c.shards.caches))
	for _, key := range keys {
		i := c.shards.names.of(key)
		parts[i].c, parts[i].keys = c.shards.caches[i], append(parts[i].keys, key)
	}
	return slices.DeleteFunc(parts, func(p part) bool { return p.keys == nil })
}

// gather calls f for each part of keys, and returns all that came back, and an error that
// names each shard that failed.
func gather[T any](ctx context.Context, c *Cache, keys []string, f func(c *Cache, keys []string) (T, error)) ([]T, error) {
	if len(keys) == 0 {
		return nil, nil
	}
	return sideBySide(ctx, c, c.split(keys), f)
}

// everywhere is gather over all shards, whatever their keys.
func everywhere[T any](ctx context.Context, c *Cache, f func(*Cache) (T, error)) ([]T, error) {
	var parts []part
	for _, shard := range c.all() {
		parts = append(parts, part{c: shard})
	}
	return sideBySide(ctx, c, parts, func(c *Cache, _ []string) (T, error) { return f(c) })
}

// sideBySide calls f for each part, and waits for all. In a transaction, which is for one
// goroutine, and for a single part, that is the caller's goroutine.
func sideBySide[T any](ctx context.Context, c *Cache, parts []part, f func(*Cache, []string) (T, error)) ([]T, error) {
	results, failed := make([]T, len(parts)), make([]error, len(parts))
	var wg sync.WaitGroup
	for i, p := range parts {
		if c.tx == nil && i+1 < len(parts) {
			wg.Go(func() { results[i], failed[i] = f(p.c, p.keys) })
		} else {
			results[i], failed[i] = f(p.c, p.keys)
		}
	}
	wg.Wait()
	var err error
	for i, p := range parts {
		err = also(err, p.c.attributed(ctx, failed[i]))
	}
	return results, err
}

// also joins errors, in one line.
func also(err, more error) error {
	switch {
	case err == nil:
		return more
	case more == nil:
		return err
	}
	return fmt.Errorf("%w; %w", err, more)
}

// shardError is an error of a shard. It matches ofShard of it.
type shardError struct {
	shard *core
	err   error
}

// ofShard stands for all errors of a shard.
type ofShard struct{ shard *core }

func (ofShard) Error() string { return "of a shard" }

func (e *shardError) Error() string {
	return "shard " + strconv.Quote(*e.shard.name.Load()) + ": " + e.err.Error()
}
func (e *shardError) Unwrap() error        { return e.err }
func (e *shardError) Is(target error) bool { return target == ofShard{e.shard} }

// attributed is err as one of the shard that c is, if it is one.
func (c *core) attributed(ctx context.Context, err error) error {
	if err == nil || c.name.Load() == nil {
		return err
	}
	return c.described(ctx, err)
}

// blames reports whether err is about the cache that key is in.
func (c *Cache) blames(err error, key string) bool {
	if c.shards == nil || err == nil {
		return err != nil
	}
	return errors.Is(err, ofShard{c.of(key).core})
}

// merged walks over keys of all shards, in order, each of which keys brings in order, and
// over those only that belong there. Errors come last.
func (c *Cache) merged(ctx context.Context, keys func(*Cache) iter.Seq2[string, error]) iter.Seq2[string, error] {
	if c.shards == nil {
		return keys(c)
	}
	return func(yield func(string, error) bool) {
		type source struct {
			shard *Cache
			next  func() (string, error, bool)
			key   string
		}
		var sources []*source
		var failed error
		advance := func(s *source) (more bool) {
			for {
				key, err, ok := s.next()
				if err != nil {
					failed = also(failed, s.shard.attributed(ctx, err))
				}
				if !ok || err != nil {
					return false
				}
				if s.key = key; c.of(key) == s.shard {
					return true
				}
			}
		}
		for _, shard := range c.shards.caches {
			next, stop := iter.Pull2(keys(shard))
			defer stop()
			if s := (&source{shard: shard, next: next}); advance(s) {
				sources = append(sources, s)
			}
		}
		for len(sources) > 0 {
			least := 0
			for i, s := range sources {
				if s.key < sources[least].key {
					least = i
				}
			}
			if !yield(sources[least].key, nil) {
				return
			}
			if !advance(sources[least]) {
				sources = slices.Delete(sources, least, least+1)
			}
		}
		if failed != nil {
			yield("", failed)
		}
	}
}

// Sweep removes this user's entries from those shards that they do not belong to, and
// returns how many there were. It is to be called after the set of shards has changed, once
// every process has the new set: else such an entry answers again when the set changes
// back. It reads all keys, in pages, and holds nobody up. When it fails, removed counts
// what was removed until then. A cache that is not sharded has nothing to sweep.
func (c *Cache) Sweep(ctx context.Context) (removed int, err error) {
	if c.shards != nil {
		if err = c.distinct(ctx); err == nil {
			var counts []int
			counts, err = everywhere(ctx, c, func(shard *Cache) (int, error) { return shard.sweep(ctx, c) })
			removed = sum(counts)
		}
	}
	return removed, c.fail(ctx, "sweep", err)
}

// distinct fails where two shards are one table, reached through two pools: what one of
// them would sweep belongs to the other.
func (c *Cache) distinct(ctx context.Context) error {
	tokens, err := everywhere(ctx, c, func(c *Cache) (string, error) {
		n, _, err := c.feed.news(ctx, nowhere().snapshot)
		if err == nil && n.token == "" {
			if _, err = c.exec(ctx, c.feed.begin, c.args()...); err == nil {
				n, _, err = c.feed.news(ctx, nowhere().snapshot)
			}
		}
		if err != nil {
			return "", err
		}
		return n.token, nil
	})
	for i, token := range tokens {
		if j := slices.Index(tokens, token); err == nil && j < i && token != "" {
			err = fmt.Errorf("%w: shards %s and %s are one table", ErrInvalidConfig,
				shorten(*c.shards.caches[j].name.Load()), shorten(*c.shards.caches[i].name.Load()))
		}
	}
	return err
}

// sweep removes what belongs to another shard of whole.
func (c *Cache) sweep(ctx context.Context, whole *Cache) (removed int, err error) {
	for after := ""; ; {
		page, err := query(ctx, c, c.feed.page, c.args(after), scanKey)
		if err != nil {
			return removed, err
		}
		foreign := slices.DeleteFunc(slices.Clone(page), func(key string) bool { return whole.of(key) == c })
		n, err := c.deleteMany(ctx, foreign)
		c.stats.deletes.Add(int64(n))
		removed += n
		if err != nil || len(page) < pageKeys {
			return removed, err
		}
		after = page[len(page)-1]
	}
}

func sum(counts []int) (n int) {
	for _, count := range counts {
		n += count
	}
	return n
}
