package fastpgcache

import (
	"context"
	"database/sql"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// batches is the operations on many keys, and what merged calls become.
type batches struct {
	get, aged, set, del, lock, exists *statement
}

func newBatches(c *Cache) batches {
	ss := c.statements
	return batches{
		get:    ss.new(getManySQL),
		aged:   ss.new(c.stamped(getManyAgedSQL, getManyStampedSQL)),
		set:    ss.new(c.stamped(setManySQL, setManyStampedSQL)),
		del:    ss.new(deleteManySQL),
		lock:   ss.new(lockManySQL),
		exists: ss.new(existsManySQL),
	}
}

// A value of more than 32 KiB comes back as two NULLs: it would hold up the rest. The
// array is a query, here and below, so that the planner does not know how long it is: for
// short ones it would make a plan for each run.
// LIMIT 1 keeps the planner from all but one index lookup per key, whatever it
// thinks of the table.
const getManySQL = `
SELECT c.key, c.value, c.value_bytes
FROM unnest((SELECT $1::text[])) k(key), LATERAL (
  SELECT key, CASE WHEN octet_length(value) <= 32768 THEN value END AS value,
    CASE WHEN octet_length(value_bytes) <= 32768 THEN value_bytes END AS value_bytes
  FROM {schema}.cache
  WHERE user_id = {user} AND key = k.key AND (expires_at IS NULL OR expires_at > statement_timestamp())
  LIMIT 1) c`

const getManyAgedSQL = `
SELECT c.key, c.value, c.value_bytes, c.remaining
FROM unnest((SELECT $1::text[])) k(key), LATERAL (
  SELECT key, CASE WHEN octet_length(value) <= 32768 THEN value END AS value,
    CASE WHEN octet_length(value_bytes) <= 32768 THEN value_bytes END AS value_bytes,
    CASE WHEN expires_at <= (SELECT statement_timestamp() + $2::float8 * interval '1 microsecond')
      THEN date_part('epoch'::text, expires_at - statement_timestamp()) END AS remaining
  FROM {schema}.cache
  WHERE user_id = {user} AND key = k.key AND (expires_at IS NULL OR expires_at > statement_timestamp())
  LIMIT 1) c`

const getManyStampedSQL = `
SELECT c.key, c.value, c.value_bytes, c.expires, (SELECT date_part('epoch'::text, statement_timestamp()))
FROM unnest((SELECT $1::text[])) k(key), LATERAL (
  SELECT key, CASE WHEN octet_length(value) <= 32768 THEN value END AS value,
    CASE WHEN octet_length(value_bytes) <= 32768 THEN value_bytes END AS value_bytes,
    coalesce(date_part('epoch'::text, expires_at), 'Infinity'::float8) AS expires
  FROM {schema}.cache
  WHERE user_id = {user} AND key = k.key AND (expires_at IS NULL OR expires_at > statement_timestamp())
  LIMIT 1) c`

// found is a row of a lookup of many keys.
type found struct {
	key string
	lookup
}

// getBatch looks up keys, which may repeat.
func (c *Cache) getBatch(ctx context.Context, keys []string) ([]lookup, error) {
	return c.lookups(ctx, c.batches.get, keys)
}

// getBatchAged is getBatch, and tells the ends of lives.
func (c *Cache) getBatchAged(ctx context.Context, agings []aging) ([]lookup, error) {
	keys, latest := make([]string, len(agings)), int64(0)
	for i, a := range agings {
		keys[i], latest = a.key, max(latest, a.late)
	}
	if c.local != nil {
		return c.lookups(ctx, c.batches.aged, keys)
	}
	return c.lookups(ctx, c.batches.aged, keys, latest)
}

// lookups runs s, whose arguments are keys, which may repeat, and more.
func (c *Cache) lookups(ctx context.Context, s *statement, keys []string, more ...any) ([]lookup, error) {
	first, unique := distinct(keys)
	c.stats.keys.Add(int64(len(unique)))
	aged := s == c.batches.aged
	var tickets []ticket
	if aged {
		tickets = c.tickets(unique...)
	}
	var value, valueBytes, left any
	hits, err := query(ctx, c, s, c.args(append([]any{textArray(unique)}, more...)...), func(rows *sql.Rows) (f found, err error) {
		switch {
		case !aged:
			err = rows.Scan(&f.key, &value, &valueBytes)
		case c.local != nil:
			err = rows.Scan(&f.key, &value, &valueBytes, &f.expires, &f.now)
		default:
			if err = rows.Scan(&f.key, &value, &valueBytes, &left); err == nil {
				f.expires, err = until(left)
			}
		}
		v, ok := fromColumns(value, valueBytes)
		f.value, f.found, f.large = v, true, !ok
		return f, err
	})
	if err != nil {
		return nil, err
	}
	results := make([]lookup, len(keys))
	for _, hit := range hits {
		results[first[hit.key]] = hit.lookup
	}
	for i, t := range tickets {
		if hit := results[first[unique[i]]]; hit.found {
			c.keep(unique[i], t, hit)
		}
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
FROM unnest((SELECT $1::text[])) k(key), LATERAL (
  SELECT key FROM {schema}.cache
  WHERE user_id = {user} AND key = k.key AND (expires_at IS NULL OR expires_at > statement_timestamp())
  LIMIT 1) c`

func (c *Cache) existsBatch(ctx context.Context, keys []string) ([]bool, error) {
	first, unique := distinct(keys)
	c.stats.keys.Add(int64(len(unique)))
	there, err := query(ctx, c, c.batches.exists, c.args(textArray(unique)), scanKey)
	if err != nil {
		return nil, err
	}
	results := make([]bool, len(keys))
	for _, key := range there {
		results[first[key]] = true
	}
	for i, key := range keys {
		results[i] = results[first[key]]
	}
	return results, nil
}

func scanKey(rows *sql.Rows) (key string, err error) { return key, rows.Scan(&key) }

// Rows are written in the order of the arrays, which is that of their keys: so no
// two statements wait for each other.
const setManySQL = `
WITH change AS (INSERT INTO {schema}.cache_change (user_id, keys) VALUES ({user}, $1::text[]))
INSERT INTO {schema}.cache (user_id, key, value, value_bytes, expires_at, mark)
SELECT {user}, e.key, e.value, e.value_bytes, statement_timestamp() + e.ttl::float8 * interval '1 microsecond', txid_current()
FROM unnest((SELECT $1::text[]), (SELECT $2::text[]), (SELECT $3::bytea[]), (SELECT $4::bigint[])) e(key, value, value_bytes, ttl)
ON CONFLICT (user_id, key) DO UPDATE
SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at, mark = excluded.mark`

// setManyStampedSQL is setManySQL where local answers need its stamp: one for all rows.
const setManyStampedSQL = `
WITH change AS (INSERT INTO {schema}.cache_change (user_id, keys) VALUES ({user}, $1::text[])),
stored AS (
  INSERT INTO {schema}.cache (user_id, key, value, value_bytes, expires_at, mark)
  SELECT {user}, e.key, e.value, e.value_bytes, statement_timestamp() + e.ttl::float8 * interval '1 microsecond', txid_current()
  FROM unnest((SELECT $1::text[]), (SELECT $2::text[]), (SELECT $3::bytea[]), (SELECT $4::bigint[])) e(key, value, value_bytes, ttl)
  ON CONFLICT (user_id, key) DO UPDATE
  SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at, mark = excluded.mark)
SELECT txid_current(), date_part('epoch'::text, statement_timestamp())`

// setBatch stores entries; of several for one key the last wins.
func (c *Cache) setBatch(ctx context.Context, entries []entry) ([]stamp, error) {
	sorted := slices.Clone(entries)
	slices.SortStableFunc(sorted, func(a, b entry) int { return strings.Compare(a.key, b.key) })
	last := sorted[:0]
	for i, e := range sorted {
		if i+1 == len(sorted) || sorted[i+1].key != e.key {
			last = append(last, e)
		}
	}
	return make([]stamp, len(entries)), c.setSorted(ctx, last)
}

// setSorted stores entries that are in key order, each key once.
func (c *Cache) setSorted(ctx context.Context, entries []entry) error {
	c.stats.keys.Add(int64(len(entries)))
	keys := make(textArray, len(entries))
	for i, e := range entries {
		keys[i] = e.key
	}
	w := c.write(keys...)
	defer w.done()
	_, at, err := c.writes(ctx, c.batches.set, c.args(keys, valueArray(entries), valueBytesArray(entries), ttlArray(entries)))
	if err == nil {
		c.grew(ctx, entries...)
		w.stored(at, entries...)
	}
	return err
}

// Leases, then rows, are locked in the order of their keys, before any is deleted. A row
// that a concurrent write has changed since the statement began is locked but not
// deleted. It comes back as NULL, as does, see deleteSQL, a key whose lease has ended
// since. A remembered absence comes back as false. LIMIT has the planner take the rows for
// few, and so go by ctid: by the index it might read all of a user's.
const deleteManySQL = `/*fastpgcache*/
WITH held AS MATERIALIZED (
  SELECT key FROM {schema}.cache_lease WHERE user_id = {user} AND key = ANY ($1::text[]) ORDER BY user_id, key FOR UPDATE),
lease AS (
  DELETE FROM {schema}.cache_lease WHERE user_id = {user} AND key IN (SELECT key FROM held) RETURNING key),
locked AS MATERIALIZED (
  SELECT k.key, c.tid
  FROM unnest((SELECT $1::text[])) k(key), LATERAL (
    SELECT ctid AS tid FROM {schema}.cache
    WHERE user_id = {user} AND key = k.key
      AND (expires_at IS NULL OR expires_at > statement_timestamp() OR expires_at = '-infinity'::timestamptz)
    LIMIT 1 FOR UPDATE) c LIMIT (SELECT 1000)),
deleted AS (
  DELETE FROM {schema}.cache c USING locked WHERE c.ctid = locked.tid
  RETURNING c.key, (c.expires_at <= statement_timestamp()) IS NOT TRUE AS live),
change AS (
  INSERT INTO {schema}.cache_change (user_id, keys)
  SELECT {user}, array_agg(key) FROM deleted WHERE live HAVING count(*) > 0)
SELECT key, NULL::boolean FROM {schema}.cache_lease
WHERE user_id = {user} AND key = ANY ($1::text[]) AND key NOT IN (SELECT key FROM lease)
UNION ALL
SELECT locked.key, deleted.live FROM locked LEFT JOIN deleted USING (key)`

// Once its rows are locked, a statement of the same transaction sees them as they are.
const lockManySQL = `
SELECT k.key FROM unnest((SELECT $1::text[])) k(key), LATERAL (
  SELECT FROM {schema}.cache WHERE user_id = {user} AND key = k.key LIMIT 1 FOR UPDATE) c`

// deleteBatch deletes keys; of several calls for one key the first gets true.
func (c *Cache) deleteBatch(ctx context.Context, keys []string) ([]bool, error) {
	first, unique := distinct(keys)
	slices.Sort(unique)
	w := c.write(unique...)
	defer w.done()
	deleted, again, err := c.deleteSorted(ctx, unique)
	if err == nil && len(again) > 0 { // concurrent writes were first
		slices.Sort(again)
		var more []string
		err = c.transact(ctx, func(c *Cache) error {
			if _, err := query(ctx, c, c.batches.lock, c.args(textArray(again)), scanKey); err != nil {
				return err
			}
			more, _, err = c.deleteSorted(ctx, again)
			return err
		})
		deleted = append(deleted, more...)
	}
	results := make([]bool, len(keys))
	for _, key := range deleted {
		results[first[key]] = true
	}
	return results, err
}

// deleteSorted deletes keys in their order. It returns those that were there, and those
// for which it has to run again.
func (c *Cache) deleteSorted(ctx context.Context, keys []string) (deleted, again []string, err error) {
	c.stats.keys.Add(int64(len(keys)))
	type row struct {
		key  string
		live sql.NullBool
	}
	rows, err := query(ctx, c, c.batches.del, c.args(textArray(keys)), func(rows *sql.Rows) (r row, err error) {
		return r, rows.Scan(&r.key, &r.live)
	})
	for _, r := range rows {
		if !r.live.Valid {
			again = append(again, r.key)
		} else if r.live.Bool {
			deleted = append(deleted, r.key)
		}
	}
	return deleted, again, err
}

// GetMany looks keys up, in statements of at most 1,000, and returns those that are
// there. Keys may repeat. The error names the first key that is not valid; with any other
// error come those that were found nonetheless.
func (c *Cache) GetMany(ctx context.Context, keys []string) (map[string]Value, error) {
	values, err := c.getMany(ctx, keys)
	if err != nil && len(values) == 0 {
		values = nil
	}
	return values, c.fail(ctx, "get many", err)
}

func (c *Cache) getMany(ctx context.Context, keys []string) (map[string]Value, error) {
	if err := checkKeys(keys); err != nil {
		return nil, err
	}
	found, err := gather(ctx, c, keys, func(c *Cache, keys []string) (map[string]Value, error) { return c.lookUp(ctx, keys) })
	return union(found), err
}

// union makes one map of several, the only one if there is one.
func union[V any](all []map[string]V) map[string]V {
	if len(all) == 1 {
		return all[0]
	}
	whole := make(map[string]V)
	for _, part := range all {
		maps.Copy(whole, part)
	}
	return whole
}

// lookUp is getMany for valid keys of one database.
func (c *Cache) lookUp(ctx context.Context, keys []string) (map[string]Value, error) {
	values := make(map[string]Value, len(keys))
	one, batch := c.getOne, c.getBatch
	if c.local != nil && c.tx == nil {
		one = func(ctx context.Context, key string) (lookup, error) { return c.getOneAged(ctx, aging{key: key}) }
		batch = func(ctx context.Context, keys []string) ([]lookup, error) {
			return c.lookups(ctx, c.batches.aged, keys)
		}
		keys = slices.DeleteFunc(slices.Clone(keys), func(key string) bool {
			kept, _, says := c.recall(key)
			if says == present {
				c.wasRead(key)
				values[key] = Value(kept.text)
			}
			return says != unknown
		})
	}
	for chunk := range slices.Chunk(keys, chunkKeys) {
		results, err := batch(ctx, chunk)
		if err != nil {
			return values, err
		}
		for i, hit := range results {
			c.stats.lookup(hit.found)
			c.answered(chunk[i], hit.found, nil)
			if hit.large {
				if hit, err = one(ctx, chunk[i]); err != nil {
					return values, err
				}
			}
			if hit.found {
				c.wasRead(chunk[i])
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
	counts, err := gather(ctx, c, unique, func(c *Cache, keys []string) (int, error) { return c.deleteChunks(ctx, keys) })
	return sum(counts), err
}

// deleteChunks deletes keys of one database, in their order.
func (c *Cache) deleteChunks(ctx context.Context, keys []string) (deleted int, err error) {
	for chunk := range slices.Chunk(keys, chunkKeys) {
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

// checkKeys names the first key that is not valid.
func checkKeys(keys []string) error {
	for _, key := range keys {
		if err := checkKey(key); err != nil {
			return fmt.Errorf("key %s: %w", shorten(key), err)
		}
	}
	return nil
}
