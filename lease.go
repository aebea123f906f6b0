package fastpgcache

import (
	"context"
	"crypto/rand"
	"database/sql"
	"maps"
	"slices"
	"time"
)

// leaseFor is how long a process that loads a key has it to itself without
// renewing its lease. acquireSQL has it, too.
const leaseFor = 10 * time.Second

// lease is the right to load some keys, which one of all processes has at a time. It
// is rows in the database. Whoever deletes an entry deletes its lease, too, so that
// what is being loaded then is not stored.
type lease struct {
	cache  *Cache
	op     string // that loads
	holder string
	keys   map[string]bool // to be given back; false where it is unknown whether there is a lease
}

func (c *Cache) newLease(op string) *lease {
	return &lease{cache: c, op: op, holder: rand.Text(), keys: make(map[string]bool)}
}

func (l *lease) sorted() textArray { return slices.Sorted(maps.Keys(l.keys)) }

// An absence that is remembered is an entry that expired for ever ago, with the end of
// the absence as its value, in seconds since 1970: so every write replaces it, and
// nothing but a look sees it.
const absentSQL = `
  (expires_at = '-infinity'::timestamptz AND CASE WHEN value ~ '^[0-9]{1,12}([.][0-9]{1,9})?$'
    THEN value::numeric > extract(epoch FROM statement_timestamp()) END) IS TRUE`

// No lease is given where an absence is remembered. The arrays are queries, here and
// below, so that the planner does not know how long they are: it would make a plan for
// each run, and never keep one.
const acquireSQL = `
INSERT INTO {schema}.cache_lease AS l (user_id, key, holder, expires_at, xid)
SELECT {user}, k.key, $2, statement_timestamp() + $3::float8 * interval '1 microsecond', txid_current()
FROM unnest((SELECT $1::text[])) k(key)
WHERE (SELECT` + absentSQL + `
  FROM {schema}.cache WHERE user_id = {user} AND key = k.key LIMIT 1) IS NOT TRUE
ON CONFLICT (user_id, key) DO UPDATE SET holder = excluded.holder, expires_at = excluded.expires_at, xid = excluded.xid
WHERE l.expires_at <= clock_timestamp() OR l.expires_at > clock_timestamp() + interval '10 seconds'
RETURNING key`

// acquire takes the leases of those keys that nobody else loads and whose absence is
// not remembered. A lease that ends later than any can was given before the server's
// clock was set back: it is over.
func (l *lease) acquire(ctx context.Context, keys []string) error {
	c := l.cache
	sorted := textArray(slices.Sorted(slices.Values(keys)))
	held, err := query(ctx, c, c.loads.acquire, c.args(sorted, l.holder, c.loads.leaseFor.Microseconds()),
		func(rows *sql.Rows) (key string, err error) { return key, rows.Scan(&key) })
	if err != nil {
		for _, key := range keys {
			l.keys[key] = false
		}
		return err
	}
	for _, key := range held {
		l.keys[key] = true
	}
	return nil
}

const renewSQL = `
WITH locked AS MATERIALIZED (
  SELECT l.tid FROM unnest((SELECT $1::text[])) k(key), LATERAL (
    SELECT ctid AS tid FROM {schema}.cache_lease
    WHERE user_id = {user} AND key = k.key AND holder = $2 LIMIT 1 FOR UPDATE) l LIMIT (SELECT 1000))
UPDATE {schema}.cache_lease l SET expires_at = statement_timestamp() + $3::float8 * interval '1 microsecond'
FROM locked WHERE l.ctid = locked.tid`

// keep renews the lease in the background until stop is called, ctx ends, or all of
// the lease is lost. After stop no renewal is under way.
func (l *lease) keep(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	keys := l.sorted()
	l.cache.run(func() {
		defer close(ended)
		l.renew(ctx, keys)
	})
	return func() {
		cancel()
		<-ended
	}
}

func (l *lease) renew(ctx context.Context, keys textArray) {
	c := l.cache
	for sleep(ctx, c.loads.leaseFor/3) {
		renewing, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.loads.leaseFor)
		n, err := c.exec(renewing, c.loads.renew, c.args(keys, l.holder, c.loads.leaseFor.Microseconds())...)
		cancel()
		if err != nil && ctx.Err() == nil {
			c.report(l.op, err)
		}
		if err == nil && n == 0 {
			return
		}
	}
}

// Leases are locked in the order of the array, which is that of their keys, by every
// statement that locks several: so no two wait for each other. LIMIT has the planner
// take them for few, and so go by ctid: by the index it might read all of a user's rows.
const releaseSQL = `
WITH locked AS MATERIALIZED (
  SELECT l.tid FROM unnest((SELECT $1::text[])) k(key), LATERAL (
    SELECT ctid AS tid FROM {schema}.cache_lease
    WHERE user_id = {user} AND key = k.key AND holder = $2 LIMIT 1 FOR UPDATE) l LIMIT (SELECT 1000))
DELETE FROM {schema}.cache_lease l USING locked WHERE l.ctid = locked.tid`

// release gives the lease back, and reports whether all of it was still there, so that
// nothing was deleted since acquire. It does so also while the cache closes, or other
// processes would wait until the lease runs out, as they do if this fails.
func (l *lease) release(ctx context.Context) (intact bool) {
	if len(l.keys) == 0 {
		return true
	}
	c := l.cache
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.loads.leaseFor)
	defer cancel()
	keys := l.sorted()
	clear(l.keys)
	result, err := c.db.ExecContext(ctx, c.loads.release.text, c.args(keys, l.holder)...)
	if err != nil {
		return false
	}
	n, err := result.RowsAffected()
	return err == nil && n == int64(len(keys))
}

const lookSQL = `
SELECT c.key, c.value, c.value_bytes, date_part('epoch'::text, statement_timestamp()), c.expires, c.version, c.absent
FROM unnest((SELECT $1::text[])) k(key), LATERAL (
  SELECT key, value, value_bytes, coalesce(date_part('epoch'::text, expires_at), 'Infinity'::float8) AS expires,
    xmin::text AS version,` + absentSQL + ` AS absent
  FROM {schema}.cache WHERE user_id = {user} AND key = k.key LIMIT 1) c`

// row is an entry as a look sees it: found if it is live.
type row struct {
	key string
	lookup
	version string // which every write changes
	absent  bool   // it is the memory of an absence
}

// look returns what the table has of keys, live or expired.
func (c *Cache) look(ctx context.Context, keys []string) (map[string]row, error) {
	tickets := c.tickets(keys...)
	rows, err := query(ctx, c, c.loads.look, c.args(textArray(keys)), func(rows *sql.Rows) (r row, err error) {
		var value, valueBytes any
		err = rows.Scan(&r.key, &value, &valueBytes, &r.now, &r.expires, &r.version, &r.absent)
		r.value, _ = fromColumns(value, valueBytes)
		r.found = r.expires > r.now
		return r, err
	})
	byKey := make(map[string]row, len(rows))
	for _, r := range rows {
		byKey[r.key] = r
	}
	for i, t := range tickets { // memory may have what was there before
		if r := byKey[keys[i]]; r.found {
			c.keep(r.key, t, r.lookup)
		}
	}
	return byKey, err
}

// The version of an entry that has changed since the look is none of those that the
// look saw: what wrote it had not committed by then. A negative TTL is that of an absence.
const storeSQL = `
WITH locked AS MATERIALIZED (
  SELECT l.tid FROM unnest((SELECT $1::text[])) k(key), LATERAL (
    SELECT ctid AS tid FROM {schema}.cache_lease
    WHERE user_id = {user} AND key = k.key AND holder = $2 LIMIT 1 FOR UPDATE) l LIMIT (SELECT 1000)),
lease AS (DELETE FROM {schema}.cache_lease l USING locked WHERE l.ctid = locked.tid RETURNING l.key),
stored AS (
  INSERT INTO {schema}.cache AS c (user_id, key, value, value_bytes, expires_at, mark)
  SELECT {user}, e.key,
    CASE WHEN e.ttl < 0 THEN (date_part('epoch'::text, statement_timestamp()) - e.ttl::float8 / '1000000'::float8)::text
      ELSE e.value END,
    e.value_bytes,
    CASE WHEN e.ttl < 0 THEN '-infinity'::timestamptz
      ELSE statement_timestamp() + e.ttl::float8 * interval '1 microsecond' END,
    txid_current()
  FROM unnest((SELECT $3::text[]), (SELECT $4::text[]), (SELECT $5::bytea[]), (SELECT $6::bigint[])) e(key, value, value_bytes, ttl)
  WHERE (e.key IN (SELECT key FROM lease)) IS TRUE
  ON CONFLICT (user_id, key) DO UPDATE
  SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at, mark = excluded.mark
  WHERE c.xmin::text = ANY ($7::text[])
  RETURNING key),
fed AS (
  INSERT INTO {schema}.cache_change (user_id, keys)
  SELECT {user}, array_agg(key) FROM stored HAVING count(*) > 0)
SELECT lease.key, stored.key IS NOT NULL, txid_current(), date_part('epoch'::text, statement_timestamp())
FROM lease LEFT JOIN stored ON stored.key = lease.key`

// store ends the lease, and stores those of loaded whose part of the lease was still
// there, and which nobody has changed since seen. It returns the keys whose lease was
// there, with true for those it stored; nil if it failed.
func (l *lease) store(ctx context.Context, loaded map[string]entry, seen map[string]row) (map[string]bool, error) {
	intact := make(map[string]bool, len(l.keys))
	if len(loaded) == 0 {
		keys := l.sorted()
		if l.release(ctx) {
			for _, key := range keys {
				intact[key] = false
			}
		}
		return intact, nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), l.cache.loads.leaseFor)
	defer cancel()
	entries := make([]entry, 0, len(loaded))
	for _, key := range slices.Sorted(maps.Keys(loaded)) {
		entries = append(entries, loaded[key])
	}
	for len(entries) > 0 {
		part := chunk(entries)
		entries = entries[len(part):]
		ended, err := l.storePart(ctx, part, seen, len(entries) == 0)
		if err != nil {
			return nil, err
		}
		maps.Copy(intact, ended)
	}
	return intact, nil
}

// storePart stores entries, which are in key order, and ends their part of the lease, or
// with last all of it.
func (l *lease) storePart(ctx context.Context, entries []entry, seen map[string]row, last bool) (map[string]bool, error) {
	c := l.cache
	keys := make(textArray, len(entries))
	versions := textArray{}
	plain := true
	for i, e := range entries {
		keys[i] = e.key
		plain = plain && !e.absent()
		if r, ok := seen[e.key]; ok {
			versions = append(versions, r.version)
		}
	}
	slices.Sort(versions)
	leases := keys
	if last {
		leases = l.sorted()
	}
	w := c.write(keys...)
	defer w.done()
	type ended struct {
		key    string
		stored bool
		at     stamp
	}
	rows, err := query(ctx, c, c.loads.store, c.args(leases, l.holder, keys, valueArray(entries), valueBytesArray(entries),
		ttlArray(entries), slices.Compact(versions)), func(rows *sql.Rows) (e ended, err error) {
		return e, rows.Scan(&e.key, &e.stored, &e.at.xid, &e.at.now)
	})
	if err != nil {
		return nil, err
	}
	var at stamp
	var stored int
	intact := make(map[string]bool, len(rows))
	for _, e := range rows {
		intact[e.key] = e.stored
		if e.stored {
			at = e.at
			stored++
		}
	}
	c.stats.sets.Add(int64(stored))
	c.grew(ctx, entries...)
	if plain && stored == len(entries) {
		w.stored(at, entries...)
	}
	for _, key := range leases {
		delete(l.keys, key)
	}
	return intact, nil
}
