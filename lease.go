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

// held returns the keys whose lease we have.
func (l *lease) held() []string {
	var held []string
	for key, ours := range l.keys {
		if ours {
			held = append(held, key)
		}
	}
	slices.Sort(held)
	return held
}

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
	held, err := gather(ctx, l.cache, keys, func(c *Cache, keys []string) ([]string, error) {
		sorted := textArray(slices.Sorted(slices.Values(keys)))
		return query(ctx, c, c.loads.acquire, c.args(sorted, l.holder, l.micros()), scanKey)
	})
	for _, key := range keys {
		if l.cache.blames(err, key) {
			l.keys[key] = false
		}
	}
	for _, keys := range held {
		for _, key := range keys {
			l.keys[key] = true
		}
	}
	return err
}

func (l *lease) micros() int64 { return l.cache.loads.leaseFor.Microseconds() }

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
	keys := l.held()
	l.cache.run(func() {
		defer close(ended)
		l.renew(ctx, keys)
	})
	return func() {
		cancel()
		<-ended
	}
}

func (l *lease) renew(ctx context.Context, keys []string) {
	c := l.cache
	for sleep(ctx, c.loads.leaseFor/3) {
		renewing, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.loads.leaseFor)
		renewed, err := gather(renewing, c, keys, func(c *Cache, keys []string) (int, error) {
			n, err := c.exec(renewing, c.loads.renew, c.args(textArray(keys), l.holder, l.micros())...)
			return int(n), err
		})
		cancel()
		if err != nil && ctx.Err() == nil {
			c.report(l.op, err)
		}
		if err == nil && sum(renewed) == 0 {
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
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), l.cache.loads.leaseFor)
	defer cancel()
	keys := slices.Sorted(maps.Keys(l.keys))
	clear(l.keys)
	return l.end(ctx, keys) == len(keys)
}

// end ends the leases of keys, and returns how many were still there.
func (l *lease) end(ctx context.Context, keys []string) int {
	ended, _ := gather(ctx, l.cache, keys, func(c *Cache, keys []string) (int, error) {
		result, err := c.db.ExecContext(ctx, c.loads.release.text, c.args(textArray(keys), l.holder)...)
		if err != nil {
			return 0, err
		}
		n, err := result.RowsAffected()
		return int(n), err
	})
	return sum(ended)
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
	seen, err := gather(ctx, c, keys, func(c *Cache, keys []string) (map[string]row, error) { return c.lookAt(ctx, keys) })
	return union(seen), err
}

// lookAt is look in one database.
func (c *Cache) lookAt(ctx context.Context, keys []string) (map[string]row, error) {
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
// there, with true for those it stored, and, where it did not fail, those of loaded that
// were lost to somebody's change.
func (l *lease) store(ctx context.Context, loaded map[string]entry, seen map[string]row) (intact map[string]bool, lost []string, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), l.cache.loads.leaseFor)
	defer cancel()
	held := l.held()
	ended, err := gather(ctx, l.cache, held, func(c *Cache, keys []string) (map[string]bool, error) {
		return l.storeOn(ctx, c, keys, loaded, seen)
	})
	intact = union(ended)
	for _, key := range held {
		if l.cache.blames(err, key) {
			continue
		}
		delete(l.keys, key)
		if _, ok := loaded[key]; ok && !intact[key] {
			lost = append(lost, key)
		}
	}
	return intact, lost, err
}

// storeOn is store for the part of the lease that c has, of keys.
func (l *lease) storeOn(ctx context.Context, c *Cache, keys []string, loaded map[string]entry, seen map[string]row) (map[string]bool, error) {
	intact := make(map[string]bool, len(keys))
	keys = slices.Clone(keys)
	var entries []entry
	for _, key := range keys {
		if e, ok := loaded[key]; ok {
			entries = append(entries, e)
		}
	}
	if len(entries) == 0 && l.end(ctx, keys) == len(keys) {
		for _, key := range keys {
			intact[key] = false
		}
	}
	for len(entries) > 0 {
		part := chunk(entries)
		entries = entries[len(part):]
		ending := keys // what is left of them
		if len(entries) > 0 {
			ending = entryKeys(part)
		}
		ended, err := l.storePart(ctx, c, part, ending, seen)
		if err != nil {
			return nil, err
		}
		maps.Copy(intact, ended)
		keys = slices.DeleteFunc(keys, func(key string) bool { _, found := slices.BinarySearch(ending, key); return found })
	}
	return intact, nil
}

func entryKeys(entries []entry) []string {
	keys := make([]string, len(entries))
	for i, e := range entries {
		keys[i] = e.key
	}
	return keys
}

// storePart stores entries, and ends the leases of ending, both in key order.
func (l *lease) storePart(ctx context.Context, c *Cache, entries []entry, ending []string, seen map[string]row) (map[string]bool, error) {
	keys := entryKeys(entries)
	versions := textArray{}
	plain := true
	for _, e := range entries {
		plain = plain && !e.absent()
		if r, ok := seen[e.key]; ok {
			versions = append(versions, r.version)
		}
	}
	slices.Sort(versions)
	w := c.write(keys...)
	defer w.done()
	type ended struct {
		key    string
		stored bool
		at     stamp
	}
	rows, err := query(ctx, c, c.loads.store, c.args(textArray(ending), l.holder, textArray(keys), valueArray(entries), valueBytesArray(entries),
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
	return intact, nil
}
