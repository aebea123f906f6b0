package fastpgcache

import (
	"context"
	"database/sql"
	"fmt"
	"iter"
	"strings"
	"time"
)

// Typed is a Cache for values of one type, whose keys all begin with one prefix: the
// prefix is put before every key that goes in, and taken off every key that comes out.
//
//	users := fastpgcache.NewTyped[User](cache, "user:v2:")
//	u, err := users.GetOrSet(ctx, "42", time.Hour, loadUser) // under the key "user:v2:42"
//
// So each kind of value has a namespace of its own, which Keys walks over and Clear
// empties. Put a version into the prefix, and change it when the type changes so that
// stored values no longer decode, or mean something else. Programs of the old version and
// the new one then run side by side without seeing each other's values.
//
// Values are stored as Cache.Set stores them: those of a Typed[string] or Typed[[]byte]
// byte for byte, others as JSON. It is safe for concurrent use, and as cheap as its
// Cache. Errors are those of the Cache's methods of the same names; they name keys with
// their prefix.
type Typed[T any] struct {
	cache  *Cache
	prefix string
}

// NewTyped returns a Typed over c. It does no I/O. With an empty prefix every key is
// its own. A prefix that no key can have makes every operation's error match
// ErrInvalidKey.
func NewTyped[T any](c *Cache, prefix string) *Typed[T] { return &Typed[T]{c, prefix} }

// WithTx returns a Typed whose operations run inside tx, see Cache.WithTx.
func (t *Typed[T]) WithTx(tx *sql.Tx) *Typed[T] { return &Typed[T]{t.cache.WithTx(tx), t.prefix} }

// Get returns the value under key, and whether it is there. Found with an error means a
// value that does not decode.
func (t *Typed[T]) Get(ctx context.Context, key string) (value T, found bool, err error) {
	found, err = t.cache.Get(ctx, t.prefix+key, &value)
	return value, found, err
}

// Set stores value under key for ttl; 0 or NoExpiry keeps it until it is deleted.
func (t *Typed[T]) Set(ctx context.Context, key string, value T, ttl time.Duration) error {
	return t.cache.Set(ctx, t.prefix+key, value, ttl)
}

// Add stores value under key unless an entry is there, and reports whether it did.
func (t *Typed[T]) Add(ctx context.Context, key string, value T, ttl time.Duration) (added bool, err error) {
	return t.cache.Add(ctx, t.prefix+key, value, ttl)
}

// Take removes key and returns what was there, to exactly one of any number of callers.
// Found with an error means a value that did not decode, and is gone.
func (t *Typed[T]) Take(ctx context.Context, key string) (value T, found bool, err error) {
	v, found, err := t.cache.Take(ctx, t.prefix+key)
	if err == nil && found {
		value, err = t.decode("take", key, v)
	}
	return value, found, err
}

// decode fills a value of T.
func (t *Typed[T]) decode(op, key string, v Value) (value T, err error) {
	if err = (stored{bytes: v}).decode(&value); err != nil {
		err = prefixed(op, fmt.Errorf("key %s: %w", shorten(t.prefix+key), err))
	}
	return value, err
}

// Delete removes key and reports whether it was there.
func (t *Typed[T]) Delete(ctx context.Context, key string) (deleted bool, err error) {
	return t.cache.Delete(ctx, t.prefix+key)
}

// GetMany returns those of keys that are there. Where one does not decode, the others
// come with an error.
func (t *Typed[T]) GetMany(ctx context.Context, keys []string) (map[string]T, error) {
	values, err := t.cache.GetMany(ctx, t.full(keys))
	return t.decodeAll("get many", values, err)
}

// full returns keys with the prefix.
func (t *Typed[T]) full(keys []string) []string {
	all := make([]string, len(keys))
	for i, key := range keys {
		all[i] = t.prefix + key
	}
	return all
}

// decodeAll decodes the values of a batch. Its error is err, or the first that decoding
// gives.
func (t *Typed[T]) decodeAll(op string, values map[string]Value, err error) (map[string]T, error) {
	decoded := make(map[string]T, len(values))
	for key, v := range values {
		key = strings.TrimPrefix(key, t.prefix)
		if value, failure := t.decode(op, key, v); failure == nil {
			decoded[key] = value
		} else if err == nil {
			err = failure
		}
	}
	return decoded, err
}

// SetMany stores every item for ttl or, if it fails, none.
func (t *Typed[T]) SetMany(ctx context.Context, items map[string]T, ttl time.Duration) error {
	return t.cache.SetMany(ctx, t.items(items), ttl)
}

// items returns items as SetMany of the cache takes them.
func (t *Typed[T]) items(items map[string]T) map[string]any {
	all := make(map[string]any, len(items))
	for key, value := range items {
		all[t.prefix+key] = value
	}
	return all
}

// GetOrSet returns the value under key or, if it is not there or does not decode, what
// load returns, which it stores for ttl. See Cache.GetOrSet.
func (t *Typed[T]) GetOrSet(ctx context.Context, key string, ttl time.Duration,
	load func(context.Context) (T, error)) (value T, err error) {
	err = t.cache.GetOrSet(ctx, t.prefix+key, &value, ttl, untyped(load))
	return value, err
}

// GetOrRefresh is GetOrSet for entries that nobody should wait for twice: one that is
// older than fresh is returned at once, and loaded anew in the background. See
// Cache.GetOrRefresh.
func (t *Typed[T]) GetOrRefresh(ctx context.Context, key string, fresh, ttl time.Duration,
	load func(context.Context) (T, error)) (value T, err error) {
	err = t.cache.GetOrRefresh(ctx, t.prefix+key, &value, fresh, ttl, untyped(load))
	return value, err
}

func untyped[T any](load func(context.Context) (T, error)) func(context.Context) (any, error) {
	if load == nil {
		return nil
	}
	return func(ctx context.Context) (any, error) { return load(ctx) }
}

// GetOrSetMany returns those of keys that are there, and what load returns for the
// others, which it stores for ttl. load gets and returns keys without the prefix. See
// Cache.GetOrSetMany.
func (t *Typed[T]) GetOrSetMany(ctx context.Context, keys []string, ttl time.Duration,
	load func(ctx context.Context, missing []string) (map[string]T, error)) (map[string]T, error) {
	var loader loader
	if load != nil {
		loader = func(ctx context.Context, missing []string) (map[string]any, error) {
			bare := make([]string, len(missing))
			for i, key := range missing {
				bare[i] = strings.TrimPrefix(key, t.prefix)
			}
			loaded, err := load(ctx, bare)
			return t.items(loaded), err
		}
	}
	usable := func(v stored) bool {
		var value T
		return v.decode(&value) == nil
	}
	values, err := t.cache.getOrLoadMany(ctx, t.full(keys), ttl, usable, loader)
	return t.decodeAll("get or set many", values, err)
}

// Keys walks over the keys that begin with prefix, behind the one of the Typed. See
// Cache.Keys.
func (t *Typed[T]) Keys(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for key, err := range t.cache.Keys(ctx, t.prefix+prefix) {
			if !yield(strings.TrimPrefix(key, t.prefix), err) {
				return
			}
		}
	}
}

// Clear removes every entry under the prefix, and returns how many there were. See
// Cache.DeletePrefix.
func (t *Typed[T]) Clear(ctx context.Context) (removed int, err error) {
	if t.prefix == "" {
		return t.cache.Clear(ctx)
	}
	return t.cache.DeletePrefix(ctx, t.prefix)
}
