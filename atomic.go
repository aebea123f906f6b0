package fastpgcache

import (
	"context"
	"time"
)

// Add stores value under key, as Set does, unless an entry is there already, and
// reports whether it did: of any number of concurrent callers exactly one. Errors
// are those of Set.
func (c *Cache) Add(ctx context.Context, key string, value any, ttl time.Duration) (added bool, err error) {
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
INSERT INTO {schema}.cache AS c (user_id, key, value, value_bytes, expires_at)
VALUES ({user}, $1, $2, $3, statement_timestamp() + $4::float8 * interval '1 microsecond')
ON CONFLICT (user_id, key) DO UPDATE
SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at
WHERE c.expires_at <= statement_timestamp()`

func (c *Cache) add(ctx context.Context, e entry) (bool, error) {
	c.enter(e.key)
	defer c.enter(e.key)
	value, valueBytes := e.value.arguments()
	n, err := c.exec(ctx, c.stmt.add, c.args(e.key, value, valueBytes, ttlArgument(e.micros))...)
	return n > 0, err
}

// Increment adds delta, which may be negative, to the number under key and returns
// the sum. A key that is not there starts from 0 and lives for ttl; one that is
// there keeps its TTL. The number is stored as text, as Set stores an int.
//
// The error matches ErrNotInteger, and nothing is changed, where the value is no
// 64-bit integer in its shortest decimal form ("5" and "-5", but not "+5", "05",
// "-0", " 5" or "5.0", the same as Redis has it) or the sum would not be one; a
// transaction goes on. Other errors are those of Set; after one of unknown outcome
// a second call may count twice.
func (c *Cache) Increment(ctx context.Context, key string, delta int64, ttl time.Duration) (sum int64, err error) {
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
INSERT INTO {schema}.cache AS c (user_id, key, value, expires_at)
VALUES ({user}, $1, $2::bigint::text, statement_timestamp() + $3::float8 * interval '1 microsecond')
ON CONFLICT (user_id, key) DO UPDATE
SET value = CASE WHEN c.expires_at <= statement_timestamp() THEN excluded.value
    ELSE (c.value::numeric + excluded.value::numeric)::text END,
  value_bytes = NULL,
  expires_at = CASE WHEN c.expires_at <= statement_timestamp() THEN excluded.expires_at ELSE c.expires_at END
WHERE c.expires_at <= statement_timestamp()
  OR CASE WHEN c.value ~ '^(0|-?[1-9][0-9]{0,18})$' THEN
    c.value::numeric BETWEEN -9223372036854775808 AND 9223372036854775807
    AND c.value::numeric + excluded.value::numeric BETWEEN -9223372036854775808 AND 9223372036854775807 END
RETURNING value`

func (c *Cache) increment(ctx context.Context, key string, delta, micros int64) (sum int64, err error) {
	c.enter(key)
	defer c.enter(key)
	found, err := c.row(ctx, c.stmt.increment, c.args(key, delta, ttlArgument(micros)), &sum)
	if err == nil && !found {
		err = ErrNotInteger
	}
	return sum, err
}

// Take removes key and returns what was there: to exactly one of any number of
// concurrent callers.
func (c *Cache) Take(ctx context.Context, key string) (v Value, found bool, err error) {
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
const takeSQL = `
WITH lease AS (DELETE FROM {schema}.cache_lease WHERE user_id = {user} AND key = $1 RETURNING key)
DELETE FROM {schema}.cache
WHERE user_id = {user} AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp())
  AND (SELECT true FROM lease) IS NOT FALSE
RETURNING value, value_bytes`

func (c *Cache) take(ctx context.Context, key string) (v Value, found bool, err error) {
	var value, valueBytes any
	found, err = c.row(ctx, c.stmt.take, c.args(key), &value, &valueBytes)
	if found {
		s, _ := fromColumns(value, valueBytes)
		v = s.value()
	}
	return v, found, err
}
