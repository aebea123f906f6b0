package fastpgcache

import (
	"context"
	"database/sql"
	"fmt"
	"math"
	"time"
)

// single is the operations on one key that merge concurrent calls.
type single struct {
	set, get, aged, del, exists *statement

	sets    *coalescer[entry, stamp]
	gets    *coalescer[string, lookup]
	agings  *coalescer[aging, lookup]
	deletes *coalescer[string, bool]
	exist   *coalescer[string, bool]
}

func newSingle(c *Cache) single {
	ss := c.statements
	m := merger{c.ctx, c.run, budgetOf(c.db), causedByData}
	keySize := func(key string) int { return len(key) }
	return single{
		set:    ss.one(c.stamped(setSQL, setStampedSQL)),
		get:    ss.one(getSQL),
		aged:   ss.one(c.stamped(getAgedSQL, getStampedSQL)),
		del:    ss.one(deleteSQL),
		exists: ss.one(existsSQL),

		sets:    newCoalescer(m, c.setOne, c.setBatch, func(e entry) int { return len(e.key) + e.value.len() }),
		gets:    newCoalescer(m, c.getOne, c.getBatch, keySize),
		agings:  newCoalescer(m, c.getOneAged, c.getBatchAged, func(a aging) int { return len(a.key) }),
		deletes: newCoalescer(m, c.deleteOne, c.deleteBatch, keySize),
		exist:   newCoalescer(m, c.existsOne, c.existsBatch, keySize),
	}
}

// entry is what a write stores.
type entry struct {
	key    string
	value  stored
	micros int64 // the TTL, or noTTL
}

// newEntry checks and encodes what a caller wants stored.
func newEntry(key string, value any, ttl time.Duration) (entry, error) {
	if err := checkKey(key); err != nil {
		return entry{}, err
	}
	micros, err := storeTTL(ttl)
	if err != nil {
		return entry{}, err
	}
	v, err := encode(value)
	return entry{key, v, micros}, err
}

// stamp is when a statement wrote: its transaction, and the server's clock in seconds
// since 1970. The zero stamp is that of none.
type stamp struct {
	xid int64
	now float64
}

// stamped returns the second text where local answers need a stamp, else the first.
func (c *Cache) stamped(without, with string) string {
	if c.cfg.MaxStaleness > 0 {
		return with
	}
	return without
}

// writes runs a statement that gives one stamp for each row that it wrote, or one for
// all, and returns how many it gave. The stamp is read only where local answers need it.
func (c *Cache) writes(ctx context.Context, s *statement, args []any) (n int64, at stamp, err error) {
	if c.local == nil || c.tx != nil {
		n, err = c.exec(ctx, s, args...)
		return n, stamp{}, err
	}
	stamps, err := query(ctx, c, s, args, func(rows *sql.Rows) (at stamp, err error) {
		return at, rows.Scan(&at.xid, &at.now)
	})
	if len(stamps) > 0 {
		at = stamps[0]
	}
	return int64(len(stamps)), at, err
}

// Set stores value under key for ttl, and replaces what is there. With a ttl of 0 or
// NoExpiry it stays until it is deleted. A string, of whatever string type, []byte,
// json.RawMessage and Value are stored byte for byte, anything else as JSON.
//
// Errors match ErrInvalidKey, ErrInvalidTTL (also for less than a millisecond),
// ErrValueTooLarge (over 256 MiB) or ErrNotPermitted. After any other error, that of ctx
// included, the value may or may not have been stored.
func (c *Cache) Set(ctx context.Context, key string, value any, ttl time.Duration) error {
	c = c.of(key)
	e, err := newEntry(key, value, ttl)
	if err == nil {
		err = c.set(ctx, e)
	}
	if err == nil {
		c.stats.sets.Add(1)
	}
	return c.fail(ctx, "set", err)
}

// Every statement that changes entries tells so, in the same transaction, in
// cache_change. The mark keeps the triggers that do this for other people's SQL quiet.
const setSQL = `
WITH change AS (INSERT INTO {schema}.cache_change (user_id, keys) VALUES ({user}, ARRAY[$1::text]))
INSERT INTO {schema}.cache (user_id, key, value, value_bytes, expires_at, mark)
VALUES ({user}, $1, $2, $3, statement_timestamp() + $4::float8 * interval '1 microsecond', txid_current())
ON CONFLICT (user_id, key) DO UPDATE
SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at, mark = excluded.mark`

// setStampedSQL is setSQL where local answers need its stamp, which costs a tenth more.
const setStampedSQL = setSQL + `
RETURNING mark, date_part('epoch'::text, statement_timestamp())`

func (c *Cache) set(ctx context.Context, e entry) (err error) {
	if c.coalesces() {
		_, err = c.single.sets.do(ctx, e)
	} else {
		_, err = c.setOne(ctx, e)
	}
	return err
}

func (c *Cache) setOne(ctx context.Context, e entry) (stamp, error) {
	w := c.write(e.key)
	defer w.done()
	value, valueBytes := e.value.arguments()
	_, at, err := c.writes(ctx, c.single.set, c.args(e.key, value, valueBytes, ttlArgument(e.micros)))
	if err == nil {
		c.grew(ctx, e)
		w.stored(at, e)
	}
	return at, err
}

// lookup is what looking up a key gives.
type lookup struct {
	value stored
	found bool
	large bool // there, but to be fetched by a statement of its own
	kept  bool // this is an answer from memory, and counted

	// Of an aged lookup that found something: the server's clock, in seconds since 1970, or
	// 0 where only the difference was asked for.
	expires float64 // +Inf: never, or so late that nobody has asked for it
	now     float64
}

// Get looks key up and fills dest, if it is there. What dest points to says how:
//
//   - string, of whatever string type, []byte, json.RawMessage, Value: the stored bytes
//   - any: the parsed JSON, or the text where it is no JSON
//   - anything else: by json.Unmarshal
//
// With a nil dest it only tells whether the key is there. A miss is not an error and
// leaves dest alone. Found with an error means a value that does not decode.
func (c *Cache) Get(ctx context.Context, key string, dest any) (found bool, err error) {
	c = c.of(key)
	if err = checkKey(key); err == nil {
		err = checkDest(dest)
	}
	var v stored
	if err == nil {
		switch kept, _, says := c.recall(key); says {
		case present:
			v, found = stored{text: kept.text, isText: true}, true
		case absent:
			return false, nil
		default:
			v, found, err = c.get(ctx, key)
			if err == nil {
				c.stats.lookup(found)
			}
		}
	}
	if found && err == nil {
		c.wasRead(key)
		if err = v.decode(dest); err != nil {
			err = fmt.Errorf("key %s: %w", shorten(key), err)
		}
	}
	return found, c.fail(ctx, "get", err)
}

// LIMIT 1 gives the planner the one-row estimate that it loses where text is compared
// with current_user, a name.
const getSQL = `
SELECT value, value_bytes FROM {schema}.cache
WHERE user_id = {user} AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp())
LIMIT 1`

// get asks the database for key.
func (c *Cache) get(ctx context.Context, key string) (v stored, found bool, err error) {
	if c.local != nil && c.tx == nil {
		hit, err := c.getAged(ctx, aging{key: key})
		return hit.value, hit.found, err
	}
	if c.coalesces() {
		hit, err := c.single.gets.do(ctx, key)
		if err == nil && hit.large {
			hit, err = c.single.gets.alone(ctx, key)
		}
		return hit.value, hit.found, err
	}
	hit, err := c.getOne(ctx, key)
	return hit.value, hit.found, err
}

func (c *Cache) getOne(ctx context.Context, key string) (lookup, error) {
	hit, _, err := first(query(ctx, c, c.single.get, c.args(key), func(rows *sql.Rows) (lookup, error) {
		var value, valueBytes any
		err := rows.Scan(&value, &valueBytes)
		v, _ := fromColumns(value, valueBytes)
		return lookup{value: v, found: true}, err
	}))
	return hit, err
}

// How many seconds are left is told where it is at most $2 microseconds: telling it costs
// more than the rest of a column does.
const getAgedSQL = `
SELECT value, value_bytes,
  CASE WHEN expires_at <= statement_timestamp() + $2::float8 * interval '1 microsecond'
    THEN date_part('epoch'::text, expires_at - statement_timestamp()) END
FROM {schema}.cache
WHERE user_id = {user} AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp())
LIMIT 1`

// getStampedSQL is getAgedSQL where local answers need the server's clock, too.
const getStampedSQL = `
SELECT value, value_bytes,
  coalesce(date_part('epoch'::text, expires_at), 'Infinity'::float8), date_part('epoch'::text, statement_timestamp())
FROM {schema}.cache
WHERE user_id = {user} AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp())
LIMIT 1`

// find looks key up, in memory first.
func (c *Cache) find(ctx context.Context, key string) (lookup, error) {
	if hit := c.recalled(key); hit.kept {
		return hit, nil
	}
	v, found, err := c.get(ctx, key)
	return lookup{value: v, found: found}, err
}

// aging asks for a key, and for the end of its life where that comes within late
// microseconds. For local answers it always does.
type aging struct {
	key  string
	late int64
}

// findAged is find, and tells the end of the key's life, too.
func (c *Cache) findAged(ctx context.Context, a aging) (lookup, error) {
	if hit := c.recalled(a.key); hit.kept {
		return hit, nil
	}
	return c.getAged(ctx, a)
}

// recalled is what memory answers for key; kept is false where it does not.
func (c *Cache) recalled(key string) lookup {
	v, left, says := c.recall(key)
	hit := lookup{kept: says != unknown}
	if says == present {
		hit.value, hit.found, hit.expires = stored{text: v.text, isText: true}, true, math.Inf(1)
		if left != noExpiry {
			hit.now, hit.expires = float64(v.expires-left)/1e6, float64(v.expires)/1e6
		}
	}
	return hit
}

// getAged asks the database.
func (c *Cache) getAged(ctx context.Context, a aging) (hit lookup, err error) {
	if c.coalesces() {
		hit, err = c.single.agings.do(ctx, a)
		if err == nil && hit.large {
			hit, err = c.single.agings.alone(ctx, a)
		}
	} else {
		hit, err = c.getOneAged(ctx, a)
	}
	c.answered(a.key, hit.found, err)
	return hit, err
}

// until is the end of a life that has so many seconds left, where now is 0. A driver's own
// float64 needs none of the frames with which database/sql would have the stack grow.
func until(left any) (float64, error) {
	switch left := left.(type) {
	case nil:
		return math.Inf(1), nil
	case float64:
		return left, nil
	}
	var seconds sql.Null[float64]
	err := seconds.Scan(left)
	return seconds.V, err
}

func (c *Cache) getOneAged(ctx context.Context, a aging) (lookup, error) {
	tickets := c.tickets(a.key)
	args := []any{a.key}
	if c.local == nil {
		args = append(args, a.late)
	}
	hit, found, err := first(query(ctx, c, c.single.aged, c.args(args...), func(rows *sql.Rows) (_ lookup, err error) {
		hit := lookup{found: true}
		var value, valueBytes, left any
		if c.local != nil {
			err = rows.Scan(&value, &valueBytes, &hit.expires, &hit.now)
		} else if err = rows.Scan(&value, &valueBytes, &left); err == nil {
			hit.expires, err = until(left)
		}
		hit.value, _ = fromColumns(value, valueBytes)
		return hit, err
	}))
	if found && tickets != nil {
		c.keep(a.key, tickets[0], hit)
	}
	return hit, err
}

// Delete removes key and reports whether it was there.
func (c *Cache) Delete(ctx context.Context, key string) (deleted bool, err error) {
	c = c.of(key)
	if err = checkKey(key); err == nil {
		deleted, err = c.delete(ctx, key)
	}
	if deleted {
		c.stats.deletes.Add(1)
	}
	return deleted, c.fail(ctx, "delete", err)
}

// A row that ended at -infinity is a remembered absence, and goes, too. The comment keeps
// the trigger quiet that feeds cache_change for other people's SQL.
//
// What GetOrSet is loading must not be stored behind a Delete, and is not once its
// lease is gone. A lease that the statement sees, but no longer finds, has ended with
// the storing of an entry that it may not see: it has to run again.
const deleteSQL = `/*fastpgcache*/
WITH lease AS (DELETE FROM {schema}.cache_lease WHERE user_id = {user} AND key = $1 RETURNING key),
deleted AS (
  DELETE FROM {schema}.cache
  WHERE user_id = {user} AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp() OR expires_at = '-infinity'::timestamptz)
  RETURNING key, (expires_at <= statement_timestamp()) IS NOT TRUE AS live),
change AS (INSERT INTO {schema}.cache_change (user_id, keys) SELECT {user}, ARRAY[key] FROM deleted WHERE live)
SELECT EXISTS (SELECT FROM {schema}.cache_lease WHERE user_id = {user} AND key = $1)
    AND NOT EXISTS (SELECT FROM lease) AS again,
  EXISTS (SELECT FROM deleted WHERE live) AS deleted`

func (c *Cache) delete(ctx context.Context, key string) (bool, error) {
	if c.coalesces() {
		return c.single.deletes.do(ctx, key)
	}
	return c.deleteOne(ctx, key)
}

func (c *Cache) deleteOne(ctx context.Context, key string) (deleted bool, err error) {
	w := c.write(key)
	defer w.done()
	for range 2 {
		got, _, err := first(query(ctx, c, c.single.del, c.args(key), func(rows *sql.Rows) (got struct{ again, deleted bool }, err error) {
			return got, rows.Scan(&got.again, &got.deleted)
		}))
		deleted = deleted || got.deleted
		if err != nil || !got.again {
			return deleted, err
		}
	}
	return deleted, nil
}

// Exists reports whether key is there.
func (c *Cache) Exists(ctx context.Context, key string) (exists bool, err error) {
	c = c.of(key)
	if err = checkKey(key); err == nil {
		if _, _, says := c.recall(key); says != unknown {
			return says == present, nil
		}
		exists, err = c.exists(ctx, key)
		c.answered(key, exists, err)
	}
	if err == nil {
		c.stats.lookup(exists)
	}
	return exists, c.fail(ctx, "exists", err)
}

const existsSQL = `
SELECT EXISTS (SELECT FROM {schema}.cache
WHERE user_id = {user} AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp()))`

func (c *Cache) exists(ctx context.Context, key string) (bool, error) {
	if c.coalesces() {
		return c.single.exist.do(ctx, key)
	}
	return c.existsOne(ctx, key)
}

func (c *Cache) existsOne(ctx context.Context, key string) (bool, error) {
	exists, _, err := first(query(ctx, c, c.single.exists, c.args(key), func(rows *sql.Rows) (exists bool, err error) {
		return exists, rows.Scan(&exists)
	}))
	return exists, err
}
