package fastpgcache

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"iter"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/lib/pq"
)

// feed keeps local answers up to date with the table cache_change, where everybody who
// changes entries leaves their keys. It also keeps that table small. It has no goroutine of
// its own: lookups and writes start what is due.
type feed struct {
	cache                       *Cache
	local                       *local // nil: the feed is only trimmed
	read, page, begin, trimFeed *statement
	table, changes              string // as to_regclass takes them

	trimAt   atomic.Int64 // Unix time in nanoseconds
	catchUps atomic.Int64

	busy     atomic.Bool // taken by the one goroutine that reads the feed
	position position    // needs busy, as does what follows
	since    instant     // when the feed was last read
	failures int         // in a row
	retryAt  time.Time   // nothing is read before

	wanted  atomic.Bool // a filter is, once something may be answered
	loading atomic.Bool // taken by the one goroutine that loads the filter
	loadAt  time.Time   // needs loading: nothing is loaded before
}

func newFeed(c *Cache, l *local) *feed {
	ss := c.statements
	schema := pq.QuoteIdentifier(c.cfg.schema())
	f := &feed{
		cache: c, local: l,
		read: ss.new(newsSQL), page: ss.new(pageSQL), begin: ss.new(beginEpochSQL), trimFeed: ss.new(trimSQL),
		table: schema + ".cache", changes: schema + ".cache_change",
	}
	f.trimAt.Store(time.Now().Add(trimPause()).UnixNano())
	if l != nil {
		l.refresh, l.load = f.refresh, f.load
	}
	return f
}

// snapshot tells which transactions were seen to have ended: those below xmax, but for
// those that were running.
type snapshot struct {
	xmax    int64
	running []int64
}

// parseSnapshot reads PostgreSQL's text of a txid_snapshot: xmin:xmax:list.
func parseSnapshot(text string) (s snapshot, err error) {
	parts := strings.Split(text, ":")
	if len(parts) != 3 {
		return s, fmt.Errorf("snapshot %q", text)
	}
	if s.xmax, err = strconv.ParseInt(parts[1], 10, 64); err != nil || parts[2] == "" {
		return s, err
	}
	for xid := range strings.SplitSeq(parts[2], ",") {
		n, err := strconv.ParseInt(xid, 10, 64)
		if err != nil {
			return s, err
		}
		s.running = append(s.running, n)
	}
	return s, nil
}

// saw reports whether s sees what xid did, if it did not roll back.
func (s snapshot) saw(xid int64) bool {
	return xid < s.xmax && !slices.Contains(s.running, xid)
}

// list is the running transactions as newsSQL takes them.
func (s snapshot) list() string {
	var b []byte
	for i, xid := range s.running {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendInt(b, xid, 10)
	}
	return string(b)
}

// position is how far the feed was read.
type position struct {
	generation int64 // for which it was; 0: never
	token      string
	snapshot   snapshot
}

// nowhere is where nothing was read before: there are no news since.
func nowhere() position { return position{snapshot: snapshot{xmax: math.MaxInt64}} }

// news is what one reading of the feed brings.
type news struct {
	token    string // of the cache as it is; empty: the feed cannot be relied upon
	snapshot snapshot
	server   int64 // the server's clock, in microseconds
	trimmed  snapshot
	changes  iter.Seq2[string, int64] // since the position: each a key and the transaction that changed it
	all      bool                     // keys may have changed that are not among them
}

// follows reports whether n tells everything that happened since p. Rows of the feed that
// trimmed sees may be gone, so p must have seen whatever it sees.
func (n *news) follows(p position) bool {
	if n.all || n.token != p.token || n.snapshot.xmax < p.snapshot.xmax || p.snapshot.xmax < n.trimmed.xmax {
		return false
	}
	for _, xid := range p.snapshot.running {
		if n.trimmed.saw(xid) {
			return false
		}
	}
	return true
}

// take moves l on to n, which was asked for at the time at, from the position p, and
// returns the next position. Where n does not follow p, what is held is dropped, and a
// new generation begins as of n.
func (l *local) take(p position, at instant, n *news) position {
	next := position{p.generation, n.token, n.snapshot}
	m := l.kept.current.Load()
	if m != nil && m.generation == p.generation {
		if n.follows(p) {
			l.catchUp(moment{at, n.server, p.generation}, n.changes)
			return next
		}
		l.kept.reset()
	}
	if n.token == "" {
		return position{}
	}
	next.generation = l.kept.begin(at, n.server)
	return next
}

// refresh starts a catch-up in the background, unless one runs, or the last one failed a
// moment ago.
func (f *feed) refresh() {
	if f.busy.Load() || !f.busy.CompareAndSwap(false, true) {
		return
	}
	// A lookup may have begun before the last catch-up and come here after it.
	m := f.local.kept.current.Load()
	if m != nil && int64(f.local.now().since(m.at)) <= f.local.soon.Load() || time.Now().Before(f.retryAt) {
		f.busy.Store(false)
		return
	}
	f.cache.run(func() {
		defer f.busy.Store(false)
		err := f.catchUp(f.cache.ctx)
		if err == nil {
			f.failures = 0
			if f.wanted.Swap(false) {
				f.load()
			}
			return
		}
		f.retryAt = time.Now().Add(100 * time.Millisecond << min(f.failures, 8)) // 26 s at most
		f.failures++
		if f.cache.ctx.Err() == nil {
			f.cache.report("catch up", err)
		}
	})
}

var errNoFeed = errors.New("the triggers that feed cache_change are not as they must be (set up again; a schema that Citus keeps has none), or extra_float_digits is below 1: every lookup asks the database")

// catchUp reads the feed, and begins a new generation where it has to. f.busy is held.
func (f *feed) catchUp(ctx context.Context) error {
	at, p := f.local.now(), f.position
	if m := f.local.kept.current.Load(); m == nil || m.generation != p.generation {
		p = nowhere()
	}
	n, keys, err := f.news(ctx, p.snapshot)
	if err != nil {
		return err
	}
	f.catchUps.Add(1)
	f.pace(at.since(f.since), keys)
	f.position, f.since = f.local.take(p, at, n), at
	if n.token != "" {
		f.trim()
		return nil
	}
	if _, err = f.cache.exec(ctx, f.begin, f.cache.args()...); err != nil {
		return err
	}
	at = f.local.now()
	if n, _, err = f.news(ctx, nowhere().snapshot); err != nil {
		return err
	}
	if n.token == "" {
		return errNoFeed
	}
	f.position, f.since = f.local.take(nowhere(), at, n), at
	return nil
}

// newsKeys bounds the keys that one catch-up reads from each branch of newsSQL. Who is
// behind by more starts anew: that costs a few round trips, and what was kept.
const newsKeys = 50_000

// pace sets when the next catch-up is due, after one that brought the keys of a time: so that
// none comes near its bound.
func (f *feed) pace(took time.Duration, keys int) {
	due := min(f.local.latest(), max(2*time.Duration(f.local.soon.Load()), time.Millisecond))
	if keys > 0 {
		due = min(due, time.Duration(float64(took)*newsKeys/8/float64(keys)))
	}
	f.local.soon.Store(int64(due))
}

// What changed since a snapshot: $1 is its xmax, $2 its running transactions. The first
// branch finds the rows of transactions that came later, up to this statement's own
// snapshot: rows of xids to come, from a restored copy, must not come each time. The
// second finds those of transactions that were running and have ended; for one that
// still runs the index is not even looked at. Each is one range of the index on (user_id,
// xid), which ORDER BY, LIMIT and, for a single transaction, BETWEEN hold the planner to,
// whatever it thinks of the table. LIMIT is a query, so that it is not planned for. A row
// without keys, or a NULL among them, comes as NULL. No key is longer than 1,024 bytes, but
// some that anybody may have put there.
//
// The last row says what the next catch-up starts from, and the token: the user's epoch,
// the tables as they are on disk, the triggers, and the server's run. It is NULL where
// there is no epoch, a trigger does not fire always, or times are rounded on their way to
// lib/pq, which takes them as text. No expression has operands that
// are converted: somebody might have made an operator that fits better.
const newsSQL = `
SELECT key, xid, NULL::text AS token, NULL::text AS snapshot, NULL::float8 AS now, NULL::text AS trimmed FROM (
  SELECT k.key, f.xid FROM {schema}.cache_change f LEFT JOIN LATERAL unnest(f.keys::text[]) k(key) ON true
  WHERE f.user_id = {user} AND f.xid >= $1::bigint AND f.xid < txid_snapshot_xmax(txid_current_snapshot())
    AND (octet_length(k.key) <= 1024) IS NOT FALSE
  ORDER BY f.user_id, f.xid LIMIT (SELECT 50000)) later
UNION ALL
SELECT key, xid, NULL, NULL, NULL, NULL FROM (
  SELECT c.key, c.xid
  FROM (SELECT xid FROM unnest(string_to_array($2::text, ','::text)::bigint[]) x(xid)
    WHERE txid_visible_in_snapshot(xid, txid_current_snapshot()) OFFSET 0) ended,
  LATERAL (
    SELECT k.key, f.xid FROM {schema}.cache_change f LEFT JOIN LATERAL unnest(f.keys::text[]) k(key) ON true
    WHERE f.user_id = {user} AND f.xid BETWEEN ended.xid AND ended.xid
      AND (octet_length(k.key) <= 1024) IS NOT FALSE
    ORDER BY f.user_id, f.xid LIMIT (SELECT 50000)) c
  LIMIT (SELECT 50000)) ended
UNION ALL
SELECT NULL, NULL,
  e.id::text || ' '::text || to_regclass($3::text)::oid::text || ' '::text || pg_relation_filenode(to_regclass($3::text))::text
    || ' '::text || to_regclass($4::text)::oid::text || ' '::text || pg_relation_filenode(to_regclass($4::text))::text
    || ' '::text || date_part('epoch'::text, pg_postmaster_start_time())::text
    || (SELECT string_agg(' '::text || t.oid::text || ' '::text || t.xmin::text, ''::text ORDER BY t.tgname)
      FROM pg_catalog.pg_trigger t
      WHERE t.tgrelid = to_regclass($3::text)::oid AND t.tgenabled = 'A'::"char"
        AND t.tgname = ANY ('{cache_changed_insert,cache_changed_update,cache_moved,cache_deleted}'::name[])
      HAVING count(*) = 4::bigint AND current_setting('extra_float_digits'::text) = ANY ('{1,2,3}'::text[])),
  txid_current_snapshot()::text, date_part('epoch'::text, statement_timestamp()), e.trimmed::text
FROM (SELECT) one LEFT JOIN {schema}.cache_epoch e ON e.user_id = {user}`

// newsRow is a row of newsSQL.
type newsRow struct {
	key, token, snapshot, trimmed sql.NullString
	xid                           sql.NullInt64
	now                           sql.NullFloat64
}

// news reads what changed since s, and how many keys that are.
func (f *feed) news(ctx context.Context, s snapshot) (*news, int, error) {
	c := f.cache
	rows, err := query(ctx, c, f.read, c.args(s.xmax, s.list(), f.table, f.changes), func(rows *sql.Rows) (r newsRow, err error) {
		return r, rows.Scan(&r.key, &r.xid, &r.token, &r.snapshot, &r.now, &r.trimmed)
	})
	if err != nil {
		return nil, 0, err
	}
	i := slices.IndexFunc(rows, func(r newsRow) bool { return r.snapshot.Valid })
	if i < 0 {
		return nil, 0, errors.New("no snapshot came")
	}
	last := rows[i]
	changes := slices.Delete(rows, i, i+1)
	n := &news{token: last.token.String, server: micros(last.now.Float64), all: len(changes) >= newsKeys}
	for _, r := range changes {
		n.all = n.all || !r.key.Valid
	}
	n.changes = func(yield func(string, int64) bool) {
		for _, r := range changes {
			if !yield(r.key.String, r.xid.Int64) {
				return
			}
		}
	}
	if n.snapshot, err = parseSnapshot(last.snapshot.String); err == nil && last.trimmed.Valid {
		n.trimmed, err = parseSnapshot(last.trimmed.String)
	}
	return n, len(changes), err
}

// micros makes whole microseconds of PostgreSQL's seconds, which it rounds to them. Beyond
// what an int64 holds, as infinity, it is the first or the last one.
func micros(seconds float64) int64 {
	switch m := math.Round(seconds * 1e6); {
	case m >= math.MaxInt64:
		return math.MaxInt64
	case m <= math.MinInt64:
		return math.MinInt64
	default:
		return int64(m)
	}
}

const beginEpochSQL = `
SELECT {schema}.cache_begin({user}::text)`

// Expired rows, too: a Set revives them, and nobody would hear of their keys before.
const pageSQL = `
SELECT key FROM {schema}.cache WHERE user_id = {user} AND key > $1 ORDER BY user_id, key LIMIT (SELECT 5000)`

// pageKeys is the LIMIT of pageSQL: a few milliseconds.
const pageKeys = 5000

// load starts to load the filter in the background, unless that goes on, failed, or took
// a good part of the time lately.
func (f *feed) load() {
	if f.loading.Load() || !f.loading.CompareAndSwap(false, true) {
		return
	}
	begin, m := time.Now(), f.local.kept.current.Load()
	if m == nil {
		f.wanted.Store(true)
	}
	if m == nil || begin.Before(f.loadAt) {
		f.loading.Store(false)
		return
	}
	f.cache.run(func() {
		defer f.loading.Store(false)
		ctx := f.cache.ctx
		_, answers := f.local.counts()
		err := f.local.misses.load(m.generation, answers, func() error { return f.loadPages(ctx) })
		f.loadAt = time.Now().Add(4 * time.Since(begin)) // at most a fifth of the time goes into loading
		if err != nil {
			f.loadAt = f.loadAt.Add(time.Second)
			if ctx.Err() == nil {
				f.cache.report("filter", err)
			}
		}
	})
}

func (f *feed) loadPages(ctx context.Context) error {
	for after := ""; ; {
		page, err := query(ctx, f.cache, f.page, f.cache.args(after), scanKey)
		if err != nil {
			return err
		}
		for _, after = range page {
			f.local.misses.enter(hashOf(after))
		}
		if len(page) < pageKeys {
			return nil
		}
	}
}

// How often and how much a process trims. That some writes trim at once keeps the feed of
// processes small that do not live for long.
const (
	trimEvery    = 4 * time.Second
	trimRows     = 2000
	trimTimeout  = 10 * time.Second
	trimOneIn    = 256
	maxTrimBites = 100
)

func trimPause() time.Duration { return trimEvery/2 + rand.N(trimEvery) }

const trimSQL = `
SELECT {schema}.cache_trim({user}::text, 2000)`

// trim removes, in the background, what everybody has had the time to read, now and then.
func (f *feed) trim() {
	if f.cache.cfg.Citus {
		return // there is none
	}
	now, due := time.Now().UnixNano(), f.trimAt.Load()
	if due-now > int64(2*trimEvery) { // the clock was set back
		due = now
	}
	// A unit test that names each statement, with go-sqlmock, must not meet this one.
	early := !f.cache.cfg.DisableCoalescing && rand.N(trimOneIn) == 0
	if now < due && !early || !f.trimAt.CompareAndSwap(f.trimAt.Load(), now+int64(trimPause())) {
		return
	}
	f.cache.run(func() {
		ctx, cancel := context.WithTimeout(f.cache.ctx, trimTimeout)
		defer cancel()
		for range maxTrimBites {
			removed, _, err := first(query(ctx, f.cache, f.trimFeed, f.cache.args(), func(rows *sql.Rows) (removed sql.NullInt64, err error) {
				return removed, rows.Scan(&removed)
			}))
			if err != nil && ctx.Err() == nil {
				f.cache.report("trim", err)
			}
			if err != nil || removed.Int64 < trimRows {
				return
			}
		}
	})
}
