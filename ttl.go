package fastpgcache

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"time"
)

// NoExpiry is the TTL of an entry that stays until it is deleted.
const NoExpiry time.Duration = -1

// noTTL stands for NoExpiry among TTLs in microseconds.
const noTTL int64 = -1

// minTTL is the shortest TTL: what is below is a number that forgot its unit.
const minTTL = time.Millisecond

// ttls is the operations on an entry's end.
type ttls struct{ ttl, expire, persist, cleanup *statement }

func newTTLs(c *Cache) ttls {
	ss := c.statements
	return ttls{ttl: ss.one(ttlSQL), expire: ss.one(expireSQL), persist: ss.one(persistSQL), cleanup: ss.new(cleanupSQL)}
}

// storeTTL returns the TTL of a write that stores, in microseconds, the resolution
// of PostgreSQL's timestamps, rounded up.
func storeTTL(ttl time.Duration) (micros int64, err error) {
	switch {
	case ttl == 0 || ttl == NoExpiry:
		return noTTL, nil
	case ttl < 0:
		return 0, fmt.Errorf("%w: %v", ErrInvalidTTL, ttl)
	case ttl < minTTL:
		return 0, fmt.Errorf("%w: %v is under a millisecond: a number alone counts nanoseconds, so write 60*time.Second for a minute", ErrInvalidTTL, ttl)
	}
	micros = int64(ttl / time.Microsecond)
	if ttl%time.Microsecond > 0 {
		micros++
	}
	return micros, nil
}

func ttlArgument(micros int64) any {
	if micros == noTTL {
		return nil
	}
	return micros
}

const ttlSQL = `
SELECT CASE WHEN isfinite(expires_at)
  THEN (extract(epoch FROM expires_at - statement_timestamp()) * 1000000::numeric)::bigint END
FROM {schema}.cache
WHERE user_id = {user} AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp())
LIMIT 1`

// TTL returns how long key will live, and whether it is there. It is NoExpiry for a key
// that stays until it is deleted, and for others a microsecond at least.
func (c *Cache) TTL(ctx context.Context, key string) (ttl time.Duration, found bool, err error) {
	c = c.of(key)
	var micros *int64
	if err = checkKey(key); err == nil {
		switch _, left, says := c.recall(key); says {
		case present:
			return fromMicros(left), true, nil
		case absent:
			return 0, false, nil
		}
		micros, found, err = first(query(ctx, c, c.ttls.ttl, c.args(key), func(rows *sql.Rows) (micros *int64, err error) {
			return micros, rows.Scan(&micros)
		}))
		c.answered(key, found, err)
	}
	if err == nil {
		c.stats.lookup(found)
	}
	switch {
	case !found:
		return 0, false, c.fail(ctx, "ttl", err)
	case micros == nil:
		return NoExpiry, true, nil
	}
	return fromMicros(*micros), true, nil
}

// fromMicros is the TTL of an entry that has this long to live; noExpiry is NoExpiry.
func fromMicros(micros int64) time.Duration {
	switch {
	case micros == noExpiry:
		return NoExpiry
	case micros > math.MaxInt64/int64(time.Microsecond):
		return math.MaxInt64
	}
	return time.Duration(micros) * time.Microsecond
}

const expireSQL = `
WITH moved AS (
  UPDATE {schema}.cache
  SET expires_at = statement_timestamp() + $2::float8 * interval '1 microsecond', mark = txid_current()
  WHERE user_id = {user} AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp())
  RETURNING key),
change AS (INSERT INTO {schema}.cache_change (user_id, keys) SELECT {user}, ARRAY[key] FROM moved)
SELECT key FROM moved`

// Expire gives key a new TTL, from now on, and reports whether it is there.
// NoExpiry takes its TTL away, as Persist does. 0 is ErrInvalidTTL, since it could
// mean never or at once.
func (c *Cache) Expire(ctx context.Context, key string, ttl time.Duration) (found bool, err error) {
	c = c.of(key)
	found, err = c.expire(ctx, key, ttl)
	return found, c.fail(ctx, "expire", err)
}

func (c *Cache) expire(ctx context.Context, key string, ttl time.Duration) (bool, error) {
	if err := checkKey(key); err != nil {
		return false, err
	}
	if ttl == 0 {
		return false, fmt.Errorf("%w: 0", ErrInvalidTTL)
	}
	micros, err := storeTTL(ttl)
	if err != nil {
		return false, err
	}
	w := c.write(key)
	defer w.done()
	n, err := c.exec(ctx, c.ttls.expire, c.args(key, ttlArgument(micros))...)
	return n > 0, err
}

const persistSQL = `
WITH moved AS (
  UPDATE {schema}.cache SET expires_at = NULL, mark = txid_current()
  WHERE user_id = {user} AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp())
  RETURNING key),
change AS (INSERT INTO {schema}.cache_change (user_id, keys) SELECT {user}, ARRAY[key] FROM moved)
SELECT key FROM moved`

// Persist takes key's TTL away, so that it stays until it is deleted, and reports
// whether it is there.
func (c *Cache) Persist(ctx context.Context, key string) (found bool, err error) {
	c = c.of(key)
	var n int64
	if err = checkKey(key); err == nil {
		w := c.write(key)
		defer w.done()
		n, err = c.exec(ctx, c.ttls.persist, c.args(key)...)
	}
	return n > 0, c.fail(ctx, "persist", err)
}

const cleanupSQL = `
SELECT removed, evicted, next_position FROM {schema}.cache_walk($1::text, $2::float8 * interval '1 microsecond')`

// Cleanup removes expired entries, and returns how many there were. A confined login
// removes its own, the owner and the service role everybody's. It works in bites, each a
// short transaction, and passes over locked rows: it holds nobody up, and any number of
// processes may do it at once. When it fails, removed counts what was removed until then.
// Inside a transaction it is an error, since it would keep its locks until the end.
func (c *Cache) Cleanup(ctx context.Context) (removed int, err error) {
	if c.tx != nil {
		return 0, c.fail(ctx, "cleanup", errors.New("not in a transaction"))
	}
	counts, err := everywhere(ctx, c, func(c *Cache) (int, error) { return c.cleanup(ctx, nil) })
	return sum(counts), c.fail(ctx, "cleanup", err)
}

// bite is a step of a cleanup.
type bite struct {
	removed *int // nil: it is not this process' turn
	evicted *int64
	next    *string // where to go on; nil: this was the last
}

// cleanup with every, in microseconds, takes part in the work that processes share:
// it does nothing, or stops, where another is at it or was through less than every
// ago.
func (c *Cache) cleanup(ctx context.Context, every any) (removed int, err error) {
	for position := new(string); position != nil; {
		b, _, err := first(query(ctx, c, c.ttls.cleanup, []any{*position, every}, func(rows *sql.Rows) (b bite, err error) {
			return b, rows.Scan(&b.removed, &b.evicted, &b.next)
		}))
		if err != nil {
			return removed, err
		}
		if b.removed == nil {
			return removed, nil
		}
		removed += *b.removed
		c.stats.evicted.Add(*b.evicted)
		position = b.next
	}
	c.stats.lastCleanup.Store(time.Now().UnixMicro())
	return removed, nil
}

// cleanUp does the background cleanup. Its pauses are jittered so that processes
// do not come all at once, and never shorter than the interval, since a turn that
// comes early is skipped; only the first is, so that processes which do not live
// that long have their turn, too.
func (c *Cache) cleanUp() {
	interval := c.cfg.CleanupInterval
	for pause := rand.N(interval); sleep(c.ctx, pause); pause = interval + rand.N(interval/8+1) {
		if _, err := c.cleanup(c.ctx, interval.Microseconds()); err != nil && c.ctx.Err() == nil {
			c.report("cleanup", err)
		}
	}
}
