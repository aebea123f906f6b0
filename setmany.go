package fastpgcache

import (
	"context"
	"database/sql"
	"fmt"
	"maps"
	"slices"
	"time"
	"unsafe"
)

// Bounds of one statement of SetMany, GetMany and DeleteMany, and of the entries that
// SetMany encodes once; what is beyond is encoded for the check, and again when sent.
const (
	chunkKeys    = 1000
	chunkBytes   = 4 << 20
	maxHeldBytes = 32 << 20
	entryBytes   = int(unsafe.Sizeof(entry{})) // beside its value
)

// SetMany stores every item for ttl, as Set does, or none if it fails. It is one
// transaction of statements of at most 1,000 items. Beside items it holds their keys,
// sorted, and some 32 MiB of encoded values in memory. Where a key or value is not valid,
// the error names the first such key, and nothing is sent.
func (c *Cache) SetMany(ctx context.Context, items map[string]any, ttl time.Duration) error {
	err := c.setMany(ctx, items, ttl)
	if err == nil {
		c.stats.sets.Add(int64(len(items)))
	}
	return c.fail(ctx, "set many", err)
}

func (c *Cache) setMany(ctx context.Context, items map[string]any, ttl time.Duration) error {
	micros, err := storeTTL(ttl)
	if err != nil {
		return err
	}
	keys := slices.Sorted(maps.Keys(items))
	if err := checkKeys(keys); err != nil || len(keys) == 0 {
		return err
	}
	var loads []part // by database, each in the order of shards and keys
	byDB := make(map[*sql.DB][]bulk)
	held := 0
	for _, p := range c.split(keys) {
		if byDB[p.c.db] == nil {
			loads = append(loads, p)
		}
		for rest := p.keys; len(rest) > 0; {
			entries, size, err := encodeChunk(rest, items, micros)
			if err != nil {
				return err
			}
			next := bulk{p.c, rest[:len(entries)], nil}
			if held += size; held <= maxHeldBytes {
				next.entries = entries
			}
			rest = rest[len(entries):]
			byDB[p.c.db] = append(byDB[p.c.db], next)
		}
	}
	_, err = sideBySide(ctx, c, loads, func(c *Cache, _ []string) (struct{}, error) {
		return struct{}{}, c.storeChunks(ctx, byDB[c.db], items, micros)
	})
	return err
}

// bulk is what one statement of SetMany stores.
type bulk struct {
	c       *Cache
	keys    []string
	entries []entry // nil: too many to be held, so encoded again
}

// storeChunks stores chunks, all of c's database, or none.
func (c *Cache) storeChunks(ctx context.Context, chunks []bulk, items map[string]any, micros int64) error {
	if len(chunks) == 1 && chunks[0].entries != nil {
		return c.setSorted(ctx, chunks[0].entries)
	}
	for _, part := range chunks {
		w := part.c.write(part.keys...)
		defer w.done()
	}
	return c.transact(ctx, func(in *Cache) error {
		for _, part := range chunks {
			if part.entries == nil {
				var err error
				if part.entries, _, err = encodeChunk(part.keys, items, micros); err != nil {
					return err
				}
			}
			if err := part.c.in(in.tx).setSorted(ctx, part.entries); err != nil {
				return part.c.attributed(ctx, err)
			}
		}
		return nil
	})
}

// encodeChunk encodes the items of the first keys, as many as make a statement.
func encodeChunk(keys []string, items map[string]any, micros int64) (entries []entry, bytes int, err error) {
	entries = make([]entry, 0, min(len(keys), chunkKeys))
	for _, key := range keys {
		if len(entries) == chunkKeys || bytes >= chunkBytes {
			break
		}
		v, err := encode(items[key])
		if err != nil {
			return nil, 0, fmt.Errorf("key %s: %w", shorten(key), err)
		}
		entries = append(entries, entry{key, v, micros})
		bytes += entryBytes + v.len()
	}
	return entries, bytes, nil
}

// transact runs f in a transaction, on the caller's goroutine: f may read what belongs to
// the caller. Where that is one of its own, each step ends with ctx, and with ctx the
// transaction; and f runs again when the server undid it in favour of concurrent ones.
func (c *Cache) transact(ctx context.Context, f func(*Cache) error) error {
	if c.tx != nil {
		return f(c)
	}
	for _, s := range []*statement{c.batches.set, c.batches.del} { // the transaction cannot prepare them
		if _, err := await(ctx, c, func() (*sql.Stmt, error) { return c.prepared(ctx, s) }); err != nil {
			return err
		}
	}
	return c.repeat(ctx, func(committed bool) error { return c.transactOnce(ctx, committed, f) })
}

// transactOnce runs f in a transaction, of READ COMMITTED or of the database's default.
func (c *Cache) transactOnce(ctx context.Context, committed bool, f func(*Cache) error) error {
	tx, err := await(ctx, c, func() (*sql.Tx, error) { return c.db.BeginTx(ctx, nil) })
	if err != nil {
		return err
	}
	inside := c.WithTx(tx)
	inside.tx.grown = map[*quota]int64{}
	if committed { // by a statement: not every driver knows sql.TxOptions
		_, err = await(ctx, c, func() (sql.Result, error) {
			return tx.ExecContext(ctx, `SET TRANSACTION ISOLATION LEVEL READ COMMITTED`)
		})
	}
	if err == nil {
		err = f(inside)
	}
	if err != nil {
		await(ctx, c, func() (struct{}, error) { return struct{}{}, tx.Rollback() }) // waits for a statement that goes on
		return err
	}
	_, err = await(ctx, c, func() (struct{}, error) { return struct{}{}, tx.Commit() })
	if err == nil {
		for q, bytes := range inside.tx.grown {
			q.wrote(ctx, bytes)
		}
	}
	return err
}
