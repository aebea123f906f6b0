package fastpgcache

import (
	"context"
	"database/sql"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"
)

// lookup is what looking up a key gives.
type lookup struct {
	value stored
	found bool
	large bool // there, but to be fetched by a statement of its own
}

// A value of more than 32 KiB comes back as two NULLs: it would hold up the rest.
// LIMIT 1 keeps the planner from all but one index lookup per key, whatever it
// thinks of the table.
const getManySQL = `
SELECT c.key, c.value, c.value_bytes
FROM unnest($1::text[]) k(key), LATERAL (
  SELECT key, CASE WHEN octet_length(value) <= 32768 THEN value END AS value,
    CASE WHEN octet_length(value_bytes) <= 32768 THEN value_bytes END AS value_bytes
  FROM {schema}.cache
  WHERE user_id = {user} AND key = k.key AND (expires_at IS NULL OR expires_at > statement_timestamp())
  LIMIT 1) c`

// getBatch looks up keys, which may repeat.
func (c *Cache) getBatch(ctx context.Context, keys []string) ([]lookup, error) {
	results := make([]lookup, len(keys))
	first, unique := distinct(keys)
	c.stats.keys.Add(int64(len(unique)))
	var key string
	var value, valueBytes any
	err := c.query(ctx, c.stmt.getMany, c.args(textArray(unique)), func(rows *sql.Rows) error {
		if err := rows.Scan(&key, &value, &valueBytes); err != nil {
			return err
		}
		v, ok := fromColumns(value, valueBytes)
		results[first[key]] = lookup{value: v, found: true, large: !ok}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if len(unique) < len(keys) {
		for i, key := range keys {
			results[i] = results[first[key]]
		}
	}
	return results, nil
}

// distinct returns each key once, and where in keys it stands first.
func distinct(keys []string) (first map[string]int, unique []string) {
	first = make(map[string]int, len(keys))
	unique = make([]string, 0, len(keys))
	for i, key := range keys {
		if _, ok := first[key]; !ok {
			first[key] = i
			unique = append(unique, key)
		}
	}
	return first, unique
}

const existsManySQL = `
SELECT c.key
FROM unnest($1::text[]) k(key), LATERAL (
  SELECT key FROM {schema}.cache
  WHERE user_id = {user} AND key = k.key AND (expires_at IS NULL OR expires_at > statement_timestamp())
  LIMIT 1) c`

func (c *Cache) existsBatch(ctx context.Context, keys []string) ([]bool, error) {
	results := make([]bool, len(keys))
	first, unique := distinct(keys)
	c.stats.keys.Add(int64(len(unique)))
	var key string
	err := c.query(ctx, c.stmt.haveMany, c.args(textArray(unique)), func(rows *sql.Rows) error {
		if err := rows.Scan(&key); err != nil {
			return err
		}
		results[first[key]] = true
		return nil
	})
	if err != nil {
		return nil, err
	}
	for i, key := range keys {
		results[i] = results[first[key]]
	}
	return results, nil
}

// Rows are written in the order of the arrays, which is that of their keys: so no
// two statements wait for each other.
const setManySQL = `
INSERT INTO {schema}.cache (user_id, key, value, value_bytes, expires_at)
SELECT {user}, e.key, e.value, e.value_bytes, statement_timestamp() + e.ttl::float8 * interval '1 microsecond'
FROM unnest($1::text[], $2::text[], $3::bytea[], $4::bigint[]) e(key, value, value_bytes, ttl)
ON CONFLICT (user_id, key) DO UPDATE
SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at`

// setBatch stores entries; of several for one key the last wins.
func (c *Cache) setBatch(ctx context.Context, entries []entry) ([]struct{}, error) {
	sorted := slices.Clone(entries)
	slices.SortStableFunc(sorted, func(a, b entry) int { return strings.Compare(a.key, b.key) })
	last := sorted[:0]
	for i, e := range sorted {
		if i+1 == len(sorted) || sorted[i+1].key != e.key {
			last = append(last, e)
		}
	}
	return make([]struct{}, len(entries)), c.setSorted(ctx, last)
}

// setSorted stores entries that are in key order, each key once.
func (c *Cache) setSorted(ctx context.Context, entries []entry) error {
	c.stats.keys.Add(int64(len(entries)))
	keys := make(textArray, len(entries))
	for i, e := range entries {
		keys[i] = e.key
	}
	c.enter(keys...)
	defer c.enter(keys...)
	_, err := c.exec(ctx, c.stmt.setMany, c.args(keys, valueArray(entries), valueBytesArray(entries), ttlArray(entries))...)
	return err
}

// Rows are locked in the order of the array, which is that of their keys, before
// any is deleted. A row that a concurrent write has changed since the statement
// began is locked but not deleted; it comes back as false, as does, see deleteSQL, a
// key whose lease has ended since.
const deleteManySQL = `
WITH lease AS (
  DELETE FROM {schema}.cache_lease WHERE user_id = {user} AND key = ANY ($1::text[]) RETURNING key),
locked AS MATERIALIZED (
  SELECT k.key, c.tid
  FROM unnest($1::text[]) k(key), LATERAL (
    SELECT ctid AS tid FROM {schema}.cache
    WHERE user_id = {user} AND key = k.key AND (expires_at IS NULL OR expires_at > statement_timestamp())
    LIMIT 1 FOR UPDATE) c),
deleted AS (
  DELETE FROM {schema}.cache WHERE ctid = ANY (ARRAY(SELECT tid FROM locked)) RETURNING key)
SELECT key, false FROM {schema}.cache_lease
WHERE user_id = {user} AND key = ANY ($1::text[]) AND key NOT IN (SELECT key FROM lease)
UNION ALL
SELECT locked.key, deleted.key IS NOT NULL FROM locked LEFT JOIN deleted USING (key)`

// deleteBatch deletes keys; of several calls for one key the first gets true.
func (c *Cache) deleteBatch(ctx context.Context, keys []string) ([]bool, error) {
	results := make([]bool, len(keys))
	first, unique := distinct(keys)
	slices.Sort(unique)
	c.stats.keys.Add(int64(len(unique)))
	var again []string
	err := c.query(ctx, c.stmt.delMany, c.args(textArray(unique)), func(rows *sql.Rows) error {
		var key string
		var deleted bool
		if err := rows.Scan(&key, &deleted); err != nil {
			return err
		}
		if deleted {
			results[first[key]] = true
		} else {
			again = append(again, key)
		}
		return nil
	})
	for _, key := range again {
		if err == nil {
			var more bool
			more, err = c.deleteOne(ctx, key)
			results[first[key]] = results[first[key]] || more
		}
	}
	return results, err
}

// Bounds of one statement of SetMany, GetMany and DeleteMany, and of the entries that
// SetMany encodes once; what is beyond is encoded for the check, and again when sent.
const (
	chunkKeys    = 1000
	chunkBytes   = 4 << 20
	maxHeldBytes = 32 << 20
	entryBytes   = int(unsafe.Sizeof(entry{})) // beside its value
)

// GetMany looks keys up, in statements of at most 1,000, and returns those that are
// there. Keys may repeat. The error names the first key that is not valid.
func (c *Cache) GetMany(ctx context.Context, keys []string) (map[string]Value, error) {
	values, err := c.getMany(ctx, keys)
	return values, c.fail(ctx, "get many", err)
}

func (c *Cache) getMany(ctx context.Context, keys []string) (map[string]Value, error) {
	if err := checkKeys(keys); err != nil {
		return nil, err
	}
	values := make(map[string]Value, len(keys))
	if c.negative != nil {
		keys = slices.DeleteFunc(slices.Clone(keys), c.absent)
	}
	for chunk := range slices.Chunk(keys, chunkKeys) {
		results, err := c.getBatch(ctx, chunk)
		if err != nil {
			return nil, err
		}
		for i, hit := range results {
			c.stats.lookup(hit.found)
			c.answered(chunk[i], hit.found, nil)
			if hit.large {
				if hit, err = c.getOne(ctx, chunk[i]); err != nil {
					return nil, err
				}
			}
			if hit.found {
				values[chunk[i]] = hit.value.value()
			}
		}
	}
	return values, nil
}

// DeleteMany removes keys, in statements of at most 1,000, and returns how many
// were there. Keys may repeat. The error names the first key that is not valid; if
// a statement fails, deleted counts what those before it removed.
func (c *Cache) DeleteMany(ctx context.Context, keys []string) (deleted int, err error) {
	deleted, err = c.deleteMany(ctx, keys)
	c.stats.deletes.Add(int64(deleted))
	return deleted, c.fail(ctx, "delete many", err)
}

func (c *Cache) deleteMany(ctx context.Context, keys []string) (deleted int, err error) {
	if err := checkKeys(keys); err != nil {
		return 0, err
	}
	_, unique := distinct(keys)
	slices.Sort(unique)
	for chunk := range slices.Chunk(unique, chunkKeys) {
		results, err := c.deleteBatch(ctx, chunk)
		if err != nil {
			return deleted, err
		}
		for _, d := range results {
			if d {
				deleted++
			}
		}
	}
	return deleted, nil
}

// SetMany stores every item for ttl, as Set does, or, if it fails, none. It is one
// transaction of statements of at most 1,000 items; beside items it holds their
// keys, sorted, and some 32 MiB of encoded values. The error names the first key
// that is not valid, or whose value is not; then nothing was sent.
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
	var first [][]entry // chunks, as many as may be held
	later := keys       // those of the others, which are encoded again
	for rest, bytes := keys, 0; len(rest) > 0; {
		entries, size, err := encodeChunk(rest, items, micros)
		if err != nil {
			return err
		}
		rest = rest[len(entries):]
		if bytes += size; bytes <= maxHeldBytes {
			first, later = append(first, entries), rest
		}
	}
	if len(first) == 1 && len(later) == 0 {
		return c.setSorted(ctx, first[0])
	}
	store := func(c *Cache, to *caller) error {
		for _, entries := range first {
			if err := c.setSorted(ctx, entries); err != nil {
				return err
			}
		}
		for rest := later; len(rest) > 0; {
			var entries []entry
			err := to.deliver(func() (err error) { // who left may change items
				entries, _, err = encodeChunk(rest, items, micros)
				return err
			})
			if err == nil {
				err = c.setSorted(ctx, entries)
			}
			if err != nil {
				return err
			}
			rest = rest[len(entries):]
		}
		return nil
	}
	if c.tx != nil {
		return store(c, nil)
	}
	defer c.enter(keys...)
	return c.retry(ctx, func(to *caller) error {
		if _, err := c.prepared(ctx, c.stmt.setMany); err != nil { // the transaction could not
			return err
		}
		tx, err := c.db.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		defer tx.Rollback()
		if err := store(c.WithTx(tx), to); err != nil {
			return err
		}
		return tx.Commit()
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

// checkKeys names the first key that is not valid.
func checkKeys(keys []string) error {
	for _, key := range keys {
		if err := checkKey(key); err != nil {
			return fmt.Errorf("key %s: %w", shorten(key), err)
		}
	}
	return nil
}

// shorten quotes a key for an error.
func shorten(key string) string {
	const most = 64
	if len(key) > most {
		return strconv.Quote(key[:most]) + "..."
	}
	return strconv.Quote(key)
}
