package fastpgcache

import (
	"context"
	"time"
)

// Add stores value under key, as Set does, unless an entry is there already, and
// reports whether it did: of any number of concurrent callers exactly one. Errors
// are those of Set.
func (c *Cache) Add(ctx context.Context, key string, value any, ttl time.Duration) (added bool, err error) {
	const op = "add"
	if err := checkKey(key); err != nil {
		return false, c.fail(ctx, op, err)
	}
	micros, err := storeTTL(ttl)
	if err != nil {
		return false, c.fail(ctx, op, err)
	}
	v, err := encode(value)
	if err != nil {
		return false, c.fail(ctx, op, err)
	}
	added, err = c.add(ctx, key, v, micros)
	if added {
		c.stats.sets.Add(1)
	}
	return added, err
}

const addSQL = `
INSERT INTO {schema}.cache AS c (user_id, key, value, value_bytes, expires_at)
VALUES ({user}, $1, $2, $3, statement_timestamp() + $4::bigint * interval '1 microsecond')
ON CONFLICT (user_id, key) DO UPDATE
SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at
WHERE c.expires_at <= statement_timestamp()`

func (c *Cache) add(ctx context.Context, key string, v encoded, micros any) (bool, error) {
	value, valueBytes := v.columns()
	n, err := c.exec(ctx, c.stmt.add, c.args(key, value, valueBytes, micros)...)
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
func (c *Cache) Increment(ctx context.Context, key string, delta int64, ttl time.Duration) (int64, error) {
	const op = "increment"
	if err := checkKey(key); err != nil {
		return 0, c.fail(ctx, op, err)
	}
	micros, err := storeTTL(ttl)
	if err != nil {
		return 0, c.fail(ctx, op, err)
	}
	sum, done, err := c.increment(ctx, key, delta, micros)
	if err != nil {
		return 0, err
	}
	if !done {
		return 0, c.fail(ctx, op, ErrNotInteger)
	}
	c.stats.sets.Add(1)
	return sum, nil
}

// The CASE keeps what is no number from the arithmetic, and numeric keeps what is
// no 64-bit number from an error that would abort the transaction.
const incrementSQL = `
INSERT INTO {schema}.cache AS c (user_id, key, value, expires_at)
VALUES ({user}, $1, $2::bigint::text, statement_timestamp() + $3::bigint * interval '1 microsecond')
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

// increment reports done only if there was a number to add to.
func (c *Cache) increment(ctx context.Context, key string, delta int64, micros any) (sum int64, done bool, err error) {
	done, err = c.row(ctx, c.stmt.increment, c.args(key, delta, micros), &sum)
	return sum, done, err
}

// Take removes key and returns what was there: to exactly one of any number of
// concurrent callers.
func (c *Cache) Take(ctx context.Context, key string) (v Value, found bool, err error) {
	if err := checkKey(key); err != nil {
		return nil, false, c.fail(ctx, "take", err)
	}
	v, found, err = c.take(ctx, key)
	if err != nil {
		return nil, false, err
	}
	c.stats.lookup(found)
	if found {
		c.stats.deletes.Add(1)
	}
	return v, found, nil
}

const takeSQL = `
WITH lease AS (DELETE FROM {schema}.cache_lease WHERE user_id = {user} AND key = $1)
DELETE FROM {schema}.cache
WHERE user_id = {user} AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp())
RETURNING value, value_bytes`

func (c *Cache) take(ctx context.Context, key string) (v Value, found bool, err error) {
	var value, valueBytes []byte
	found, err = c.row(ctx, c.stmt.take, c.args(key), &value, &valueBytes)
	if value == nil {
		value = valueBytes
	}
	return value, found, err
}
