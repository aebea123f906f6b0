package fastpgcache

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"
)

// GetOrSetMany is GetOrSet for many keys, which may repeat. It returns what is there, has
// load load the rest, in the order asked, and stores that for ttl. However many are
// missing, that takes four round trips for up to 1,000 keys. Of more keys, load gets at
// most 1,000 at a time.
//
// Of all concurrent callers, in every process, one loads a key: load gets those keys that
// nobody else is loading. What others load is waited for once this call's own are stored.
//
// What load leaves out of its result is not in that of GetOrSetMany, and is not stored.
// If load returns NotFoundFor beside its result, all processes remember that those keys
// are not there. What load returns beyond the missing keys is ignored. When load fails,
// GetOrSetMany returns what was found, with the error.
//
// What else holds for GetOrSet and its loader, and in a transaction, holds here. The
// error names the first key that is not valid.
func (c *Cache) GetOrSetMany(ctx context.Context, keys []string, ttl time.Duration,
	load func(ctx context.Context, missing []string) (map[string]any, error)) (map[string]Value, error) {
	return c.getOrLoadMany(ctx, keys, ttl, func(stored) bool { return true }, load)
}

// getOrLoadMany takes what is not usable for missing.
func (c *Cache) getOrLoadMany(ctx context.Context, keys []string, ttl time.Duration, usable func(stored) bool,
	load loader) (map[string]Value, error) {
	const op = "get or set many"
	values := make(map[string]Value, len(keys))
	micros, err := storeTTL(ttl)
	if err == nil {
		err = checkKeys(keys)
	}
	if err == nil && load == nil {
		err = errNoLoader
	}
	if err == nil {
		err = c.loadMany(ctx, keys, request{op: op, micros: micros, usable: usable, load: load}, values)
	}
	return values, c.loadFailed(ctx, op, err)
}

func (c *Cache) loadMany(ctx context.Context, keys []string, r request, values map[string]Value) error {
	_, missing := distinct(keys)
	if c.tx != nil {
		return c.loadManyInTx(ctx, missing, r, values)
	}
	missing, err := c.findMany(ctx, missing, r, values)
	if err != nil {
		return err
	}
	for part := range slices.Chunk(missing, chunkKeys) {
		for len(part) > 0 {
			late, err := c.flyMany(ctx, part, r, values)
			if err != nil {
				return err
			}
			if part, err = c.findMany(ctx, late, r, values); err != nil {
				return err
			}
		}
	}
	return nil
}

// findMany adds to values what is there of keys, and returns the others: all, if the
// database fails.
func (c *Cache) findMany(ctx context.Context, keys []string, r request, values map[string]Value) ([]string, error) {
	if len(keys) == 0 {
		return nil, nil
	}
	found, err := c.getMany(ctx, keys)
	if over := c.over(ctx); err != nil && over != nil {
		return nil, over
	}
	maps.DeleteFunc(found, func(_ string, v Value) bool { return !r.usable(stored{bytes: v}) })
	maps.Copy(values, found)
	return slices.DeleteFunc(slices.Clone(keys), func(key string) bool { return found[key] != nil }), nil
}

// flyMany adds to values what the flights for keys bring, and returns those keys for
// which it came too late.
func (c *Cache) flyMany(ctx context.Context, keys []string, r request, values map[string]Value) (late []string, err error) {
	seats := c.loads.many.join(ctx, keys, func(ctx context.Context, f *flight[answer]) { c.search(ctx, f, r) })
	defer func() {
		for _, s := range seats {
			s.leave()
		}
	}()
	for i, s := range seats {
		a, good, failure := s.await(ctx)
		switch {
		case !good:
			late = append(late, keys[i])
		case failure == errLeftOut, isAbsence(failure):
		case failure != nil:
			if err == nil {
				err = failure
			}
		case a.loaded || r.usable(a.value):
			values[keys[i]] = a.value.value()
		default:
			late = append(late, keys[i])
		}
	}
	return late, err
}

// isAbsence reports whether err is of an absence that is remembered, or is to be.
func isAbsence(err error) bool {
	var absence *notFound
	return err == ErrNotFound || errors.As(err, &absence)
}

func (c *Cache) loadManyInTx(ctx context.Context, keys []string, r request, values map[string]Value) error {
	for part := range slices.Chunk(keys, chunkKeys) {
		seen, err := c.look(ctx, part)
		if err != nil {
			return err
		}
		var missing []string
		for _, key := range part {
			e := seen[key]
			hit := e.found && r.usable(e.value)
			c.stats.lookup(hit)
			if hit {
				values[key] = e.value.value()
			} else if !e.absent {
				missing = append(missing, key)
			}
		}
		if len(missing) == 0 {
			continue
		}
		loaded, failure := c.call(ctx, r, missing)
		if err := c.storeInTx(ctx, loaded); err != nil {
			return err
		}
		for key, e := range loaded {
			if !e.absent() {
				values[key] = e.value.value()
			}
		}
		if failure != nil && !isAbsence(failure) {
			return failure
		}
	}
	return nil
}
