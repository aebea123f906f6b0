package fastpgcache

import (
	"context"
	"database/sql"
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// quota keeps the user's entries within the limit that the owner of the cache has set, if
// there is one. A process that writes tells all others how much, in cache_epoch, and who
// finds that it may be too much begins the next walk. A process that reads notes what, and
// touches it, so that it stays. All of it happens in the background, in a goroutine that
// runs while the cache is in use.
type quota struct {
	cache            *Cache
	tell, fit, touch *statement

	reads   atomic.Pointer[reads] // nil: nothing is noted
	written atomic.Int64          // bytes, since that was told
	later   atomic.Int64          // bytes of callers' transactions, which may not be committed yet
	rate    atomic.Int64          // bytes a second that may be written, where walks do not keep up; 0: any
	enough  atomic.Int64          // written, to be told at once
	now     chan struct{}         // has one when there is enough

	busy    atomic.Bool // the cache was used lately
	running atomic.Bool // the goroutine runs
	walking atomic.Bool // taken by the one goroutine that walks
	failing atomic.Bool // the last bite failed

	mu   sync.Mutex
	free time.Time // when what was written until now is within the rate; guarded by mu

	// Of the goroutine.
	since   int64     // the last walk that was heard of
	quiet   int       // rounds in which nothing was written
	touchAt time.Time // nothing is touched before
}

// How often a process looks what there is to do, and how it shares the work.
const (
	quotaFirst   = 2 * time.Second        // after the first use
	quotaRound   = 250 * time.Millisecond // where there is a limit
	quotaLimit   = 5 * time.Second        // where there is none: is there one now?
	quotaPause   = 20 * time.Millisecond  // at least, between two rounds
	quotaIdle    = 20                     // rounds without use, after which it ends
	quotaQuiet   = 4                      // rounds without writes, after which it is at rest
	quotaTimeout = 10 * time.Second
	quotaWait    = time.Second // that a statement waits at most
	quotaRate    = 1 << 20     // bytes a second that a process may always write
	quotaUnknown = 1 << 20     // bytes written, after which it must be known whether there is a limit
	touchShare   = 20          // touching takes a 20th of the time
)

func newQuota(c *Cache) *quota {
	ss := c.statements
	q := &quota{cache: c, tell: ss.new(tellSQL), fit: ss.new(fitSQL), touch: ss.new(touchSQL), now: make(chan struct{}, 1)}
	q.enough.Store(quotaUnknown)
	q.busy.Store(c.cfg.Citus) // as if it had begun: there is no limit to keep
	return q
}

// used tells that the cache is in use. It is cheap.
func (q *quota) used() {
	if !q.busy.Load() {
		q.busy.Store(true)
		if q.running.CompareAndSwap(false, true) {
			q.cache.run(q.watch)
		}
	}
}

// wrote tells that entries were written which take about that much, and waits a moment
// where the walks do not keep up.
func (q *quota) wrote(ctx context.Context, bytes int64) {
	q.used()
	if q.written.Add(bytes) > q.enough.Load() {
		q.hurry()
	}
	if rate := q.rate.Load(); rate > 0 {
		sleep(ctx, q.turn(time.Now(), time.Duration(float64(bytes)/float64(rate)*1e9)))
	}
}

// turn is how long to wait for a turn that takes so long, behind those who came before.
func (q *quota) turn(now time.Time, takes time.Duration) time.Duration {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.free.Before(now) {
		q.free = now
	}
	if q.free = q.free.Add(takes); q.free.Sub(now) > quotaWait {
		q.free = now.Add(quotaWait)
	}
	return q.free.Sub(now)
}

// rowBytes is what an entry takes beside its key and value, as cache_fit counts it.
const rowBytes = 128

// grew tells the quota of entries that were stored. In a transaction they are not there yet.
func (c *Cache) grew(ctx context.Context, entries ...entry) {
	if c.shards != nil {
		for _, e := range entries {
			c.of(e.key).grew(ctx, e)
		}
		return
	}
	var bytes int64
	for i := range entries {
		bytes += int64(len(entries[i].key)+entries[i].value.len()) + rowBytes
	}
	switch {
	case c.tx == nil:
		c.quota.wrote(ctx, bytes)
	case c.tx.grown != nil:
		c.tx.grown[c.quota] += bytes
	default:
		c.quota.later.Add(bytes)
		c.quota.used()
	}
}

// wasRead tells the quota that key was read.
func (c *Cache) wasRead(key string) {
	if c.tx == nil {
		c.of(key).quota.read(key)
	}
}

func (q *quota) hurry() {
	select {
	case q.now <- struct{}{}:
	default:
	}
}

// read notes that key was read. It is cheap, and next to nothing without a limit.
func (q *quota) read(key string) {
	q.used()
	if r := q.reads.Load(); r != nil {
		r.note(key)
	}
}

// watch does a round now and then, until the cache has not been used for a while.
func (q *quota) watch() {
	ctx := q.cache.ctx
	for pause, idle := quotaFirst, 0; ; {
		timer := time.NewTimer(pause + rand.N(pause/4))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-q.now:
			timer.Stop()
			if !sleep(ctx, quotaPause) {
				return
			}
		case <-timer.C:
		}
		if idle++; q.busy.Swap(false) {
			idle = 0
		}
		if idle >= quotaIdle {
			q.running.Store(false)
			if !q.busy.Load() || !q.running.CompareAndSwap(false, true) {
				return
			}
		}
		pause = q.round(ctx)
	}
}

// round does what is due, and returns when to come again.
func (q *quota) round(ctx context.Context) time.Duration {
	ctx, cancel := context.WithTimeout(ctx, quotaTimeout)
	defer cancel()
	q.touchNoted(ctx)
	n := q.written.Swap(0)
	b, _, err := first(query(ctx, q.cache, q.tell, q.cache.args(n), func(rows *sql.Rows) (b balance, err error) {
		return b, rows.Scan(&b.limit, &b.bytes, &b.written, &b.growth, &b.since, &b.told)
	}))
	switch {
	case err != nil:
		q.written.Add(n)
		q.rate.Store(0)
		q.report(ctx, "limit", err)
		return quotaLimit
	case !b.limit.Valid:
		q.reads.Store(nil)
		q.later.Store(0)
		q.rate.Store(0)
		q.enough.Store(math.MaxInt64)
		return quotaLimit
	case !b.told: // somebody had the row, or there is none yet
		q.written.Add(n)
		b.written.Int64 += n
	}
	q.enough.Store(q.written.Load() + b.limit.Int64/32)
	q.rate.Store(b.rate())
	if q.failing.Load() {
		q.rate.Store(0) // waiting would not help
	}
	q.heard(b)
	if q.quiet++; n > 0 {
		q.quiet = 0
	}
	q.written.Add(q.later.Swap(0)) // for the next round
	if b.due(q.quiet >= quotaQuiet) && q.walking.CompareAndSwap(false, true) {
		q.cache.run(q.walk)
	}
	return quotaRound
}

// heard takes up what there is: only where it fills a quarter of the limit reads matter.
func (q *quota) heard(b balance) {
	r := q.reads.Load()
	switch {
	case b.bytes.Int64+b.written.Int64 <= b.limit.Int64/4:
		q.reads.Store(nil)
	case r == nil:
		q.reads.Store(&reads{})
	case q.since != b.since.Int64:
		r.forget()
	}
	q.since = b.since.Int64
}

// balance is what is known of the user's entries.
type balance struct {
	limit   sql.NullInt64   // NULL: none
	bytes   sql.NullInt64   // that there were when a walk came to its end; NULL: none has yet
	written sql.NullInt64   // bytes, by all processes, since that one began
	growth  sql.NullFloat64 // the part of them that does not replace what was there, as it was before; NULL: unknown
	since   sql.NullInt64   // of that walk
	told    bool
}

// over is how much more there is than the limit, as a part of it, if that much of what was
// written did not replace what was there.
func (b balance) over(growth float64) float64 {
	return (float64(b.bytes.Int64)+growth*float64(b.written.Int64))/float64(b.limit.Int64) - 1
}

func (b balance) grows() float64 {
	if !b.growth.Valid {
		return 1
	}
	return b.growth.Float64
}

// due reports whether a walk is. Where writes go on, the walks are to be few.
func (b balance) due(rest bool) bool {
	return !b.bytes.Valid || b.over(max(b.grows(), 0.5)) > 3./16 || rest && b.over(1) > 1./32
}

// rate is how many bytes a second a process may write, so that the walks keep up; 0 for any
// number, up to a quarter over the limit. Towards a half it becomes small.
func (b balance) rate() int64 {
	over := b.over(b.grows())
	if over <= 0.25 {
		return 0
	}
	return quotaRate + int64(float64(b.limit.Int64)*max(0.5-over, 0))
}

// $1 is added to what was written, unless somebody has the row at the moment.
const tellSQL = `
WITH mine AS MATERIALIZED (
  SELECT ctid AS tid FROM {schema}.cache_epoch WHERE user_id = {user} AND $1::bigint > 0::bigint LIMIT 1 FOR UPDATE SKIP LOCKED),
told AS (
  UPDATE {schema}.cache_epoch e SET written = e.written + $1::bigint FROM mine WHERE e.ctid = mine.tid RETURNING e.written)
SELECT l.max_bytes, e.bytes, coalesce(told.written, e.written) + CASE WHEN e.sizing IS NULL OR e.begun IS NULL THEN 0::bigint ELSE e.begun END, e.growth::float8, e.since, told.written IS NOT NULL
FROM (SELECT) one
LEFT JOIN (SELECT max_bytes FROM {schema}.cache_limit WHERE user_id = {user} OR user_id = ''::text ORDER BY user_id DESC LIMIT 1) l ON true
LEFT JOIN {schema}.cache_epoch e ON e.user_id = {user}
LEFT JOIN told ON true`

const fitSQL = `
SELECT removed, evicted, next_bite FROM {schema}.cache_fit({user}::text, $1::integer)`

// walk brings the user's entries within the limit, bite by bite, unless another process
// is at it.
func (q *quota) walk() {
	defer q.walking.Store(false)
	c := q.cache
	for next := (sql.NullInt64{Valid: true}); next.Valid; {
		ctx, cancel := context.WithTimeout(c.ctx, quotaTimeout)
		b, _, err := first(query(ctx, c, q.fit, c.args(next.Int64), func(rows *sql.Rows) (b struct{ removed, evicted, next sql.NullInt64 }, err error) {
			return b, rows.Scan(&b.removed, &b.evicted, &b.next)
		}))
		q.failing.Store(err != nil)
		if err != nil {
			q.report(ctx, "evict", err)
		}
		cancel()
		if err != nil {
			return
		}
		c.stats.evicted.Add(b.evicted.Int64)
		if next = b.next; !next.Valid && b.removed.Valid {
			q.hurry() // to hear what there is now
		}
	}
}

// report gives an error to the user, unless time is up: then the next round tries again.
func (q *quota) report(ctx context.Context, op string, err error) {
	if ctx.Err() == nil {
		q.cache.report(op, err)
	}
}

// A touch makes a key young again that was read for the first time, or is of the older
// half. It changes nothing but the mark, so the feed does not hear of it, and no index. It
// passes over rows that somebody has locked, and those whose load looks whether they change.
const touchSQL = `
WITH old AS MATERIALIZED (
  SELECT c.tid FROM unnest((SELECT $1::text[])) k(key), LATERAL (
    SELECT ctid AS tid FROM {schema}.cache
    WHERE user_id = {user} AND key = k.key AND (expires_at IS NULL OR expires_at > statement_timestamp())
      AND (mark IS DISTINCT FROM 0::bigint OR age(xmin) < 0
        OR age(xmin)::bigint > (SELECT txid_snapshot_xmax(txid_current_snapshot()) - half FROM {schema}.cache_epoch WHERE user_id = {user}))
      AND NOT EXISTS (SELECT FROM {schema}.cache_lease l WHERE l.user_id = {user} AND l.key = k.key AND l.expires_at > statement_timestamp())
    LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED) c LIMIT (SELECT 1000))
UPDATE {schema}.cache c SET mark = 0::bigint FROM old WHERE c.ctid = old.tid`

// touchNoted touches what was noted.
func (q *quota) touchNoted(ctx context.Context) {
	r := q.reads.Load()
	if r == nil || time.Now().Before(q.touchAt) {
		return
	}
	keys := r.take()
	if len(keys) == 0 {
		return
	}
	c := q.cache
	c.stats.keys.Add(int64(len(keys)))
	begin := time.Now()
	if _, err := c.exec(ctx, q.touch, c.args(textArray(keys))...); err != nil {
		q.report(ctx, "touch", err)
	}
	q.touchAt = time.Now().Add((touchShare - 1) * time.Since(begin))
}
