package fastpgcache

import (
	"context"
	"database/sql"
	"time"
)

// atomics is the operations on one key that look and write at once. They are not merged.
type atomics struct{ add, increment, take *statement }

func newAtomics(c *Cache) atomics {
	ss := c.statements
	return atomics{add: ss.one(addSQL), increment: ss.one(incrementSQL), take: ss.one(takeSQL)}
}

// Add stores value under key, as Set does, unless an entry is there already, and
// reports whether it did: of any number of concurrent callers exactly one. Errors
// are those of Set.
func (c *Cache) Add(ctx context.Context, key string, value any, ttl time.Duration) (added bool, err error) {
	c = c.of(key)
	e, err := newEntry(key, value, ttl)
	if err == nil {
		added, err = c.add(ctx, e)
	}
	if added {
		c.stats.sets.Add(1)
	}
	return added, c.fail(ctx, "add", err)
}

const addSQL = `
WITH added AS (
  INSERT INTO {schema}.cache AS c (user_id, key, value, value_bytes, expires_at, mark)
  VALUES ({user}, $1, $2, $3, statement_timestamp() + $4::float8 * interval '1 microsecond', txid_current())
  ON CONFLICT (user_id, key) DO UPDATE
  SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at, mark = excluded.mark
  WHERE c.expires_at <= statement_timestamp()
  RETURNING key, mark),
change AS (INSERT INTO {schema}.cache_change (user_id, keys) SELECT {user}, ARRAY[key] FROM added)
SELECT mark, date_part('epoch'::text, statement_timestamp()) FROM added`

func (c *Cache) add(ctx context.Context, e entry) (bool, error) {
	w := c.write(e.key)
	defer w.done()
	value, valueBytes := e.value.arguments()
	n, at, err := c.writes(ctx, c.atomics.add, c.args(e.key, value, valueBytes, ttlArgument(e.micros)))
	if err == nil && n > 0 {
		c.grew(ctx, e)
		w.stored(at, e)
	}
	return n > 0, err
}

// Increment adds delta, which may be negative, to the number under key and returns
// the sum. A key that is not there starts from 0 and lives for ttl; one that is
// there keeps its TTL. The number is stored as text, as Set stores an int.
//
// Where the value is no 64-bit integer in its shortest decimal form, or the sum would be
// none, the error matches ErrNotInteger and nothing is changed; a transaction goes on.
// "5" and "-5" are such integers, "+5", "05", "-0", " 5" and "5.0" are not, the same as in
// Redis. Other errors are those of Set. After one that leaves the outcome open, a second
// call may count twice.
func (c *Cache) Increment(ctx context.Context, key string, delta int64, ttl time.Duration) (sum int64, err error) {
	c = c.of(key)
	micros, err := storeTTL(ttl)
	if err == nil {
		err = checkKey(key)
	}
	if err == nil {
		sum, err = c.increment(ctx, key, delta, micros)
	}
	if err == nil {
		c.stats.sets.Add(1)
	}
	return sum, c.fail(ctx, "increment", err)
}

// The CASE keeps what is no number from the arithmetic, and numeric keeps what is
// no 64-bit number from an error that would abort the transaction.
const incrementSQL = `
WITH counted AS (
  INSERT INTO {schema}.cache AS c (user_id, key, value, expires_at, mark)
  VALUES ({user}, $1, $2::bigint::text, statement_timestamp() + $3::float8 * interval '1 microsecond', txid_current())
  ON CONFLICT (user_id, key) DO UPDATE
  SET value = CASE WHEN c.expires_at <= statement_timestamp() THEN excluded.value
      ELSE (c.value::numeric + excluded.value::numeric)::text END,
    value_bytes = NULL,
    expires_at = CASE WHEN c.expires_at <= statement_timestamp() THEN excluded.expires_at ELSE c.expires_at END,
    mark = excluded.mark
  WHERE c.expires_at <= statement_timestamp()
    OR CASE WHEN c.value ~ '^(0|-?[1-9][0-9]{0,18})$' THEN
      c.value::numeric BETWEEN '-9223372036854775808'::numeric AND '9223372036854775807'::numeric
      AND c.value::numeric + excluded.value::numeric BETWEEN '-9223372036854775808'::numeric AND '9223372036854775807'::numeric END
  RETURNING key, value),
change AS (INSERT INTO {schema}.cache_change (user_id, keys) SELECT {user}, ARRAY[key] FROM counted)
SELECT value FROM counted`

func (c *Cache) increment(ctx context.Context, key string, delta, micros int64) (int64, error) {
	w := c.write(key)
	defer w.done()
	sum, found, err := first(query(ctx, c, c.atomics.increment, c.args(key, delta, ttlArgument(micros)), func(rows *sql.Rows) (sum int64, err error) {
		return sum, rows.Scan(&sum)
	}))
	if err == nil && !found {
		err = ErrNotInteger
	}
	if err == nil {
		c.grew(ctx, entry{key: key})
	}
	return sum, err
}

// Take removes key and returns what was there: to exactly one of any number of
// concurrent callers.
func (c *Cache) Take(ctx context.Context, key string) (v Value, found bool, err error) {
	c = c.of(key)
	if err = checkKey(key); err == nil {
		v, found, err = c.take(ctx, key)
	}
	if err == nil {
		c.stats.lookup(found)
	}
	if found {
		c.stats.deletes.Add(1)
	}
	return v, found, c.fail(ctx, "take", err)
}

// The lease goes first, as it does where an entry is stored that was loaded: so the
// two do not wait for each other.
const takeSQL = `/*fastpgcache*/
WITH lease AS (DELETE FROM {schema}.cache_lease WHERE user_id = {user} AND key = $1 RETURNING key),
taken AS (
  DELETE FROM {schema}.cache
  WHERE user_id = {user} AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp() OR expires_at = '-infinity'::timestamptz)
    AND (SELECT true FROM lease) IS NOT FALSE
  RETURNING key, value, value_bytes, (expires_at <= statement_timestamp()) IS NOT TRUE AS live),
change AS (INSERT INTO {schema}.cache_change (user_id, keys) SELECT {user}, ARRAY[key] FROM taken WHERE live)
SELECT value, value_bytes FROM taken WHERE live`

func (c *Cache) take(ctx context.Context, key string) (v Value, found bool, err error) {
	w := c.write(key)
	defer w.done()
	return first(query(ctx, c, c.atomics.take, c.args(key), func(rows *sql.Rows) (Value, error) {
		var value, valueBytes any
		err := rows.Scan(&value, &valueBytes)
		v, _ := fromColumns(value, valueBytes)
		return v.value(), err
	}))
}
