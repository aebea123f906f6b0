package fastpgcache

import (
	"context"
	"database/sql"
	"errors"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lib/pq"
)

// negative answers lookups of keys that are not there without a query, from a
// filter of the keys that are. What holds at any time:
//
//   - Every key that was there at generation.at is in its filter, or was deleted
//     since. So a key that is not in the filter was absent at some moment since at.
//   - A key that this process writes is in the filter, and in the one being loaded,
//     before its write is seen to have ended. See Cache.enter.
//   - No key ever leaves a filter: one that was deleted may be back, or its row be
//     revived, with nothing to tell us so. The garbage goes with the filter.
//
// It has no goroutine of its own. A lookup that the filter could not answer, and the
// database did, starts one that loads the filter or catches up with the database.
type negative struct {
	sinceStmt, pageStmt, beginEpochStmt *statement

	cache        *Cache
	maxStaleness time.Duration
	table        string // as to_regclass takes it

	// current is nil while there is no filter that may be asked. It is replaced,
	// under mu, only by whoever has busy; anyone may set it to nil.
	current atomic.Pointer[generation]

	busy     atomic.Bool // taken by the one goroutine that may load or catch up
	failures int         // of it, in a row; needs busy, as does what follows
	retryAt  time.Time   // nothing is done before
	loadAt   time.Time   // nothing is loaded before

	mu      sync.Mutex
	loading bool     // hashes are becoming a filter
	hashes  []uint64 // of keys read, or written by us, since loading began
	grown   int      // keys that the last filter took up after it was loaded

	answers, falsePositives, catchUps, rebuilds atomic.Int64
}

// generation is a filter as of a moment. Only its filter changes: it gains keys.
type generation struct {
	filter *CuckooFilter
	loaded int // keys it was made of
	token  string
	since  snapshot  // what it does not hold is later than this
	at     time.Time // before since was taken, by both our clocks

	answers, falsePositives int64 // of all filters until this one was loaded
}

// snapshot tells which transactions were seen to have ended: those below xmax, but
// for those running, a list of them as text.
type snapshot struct {
	xmax    int64
	running string
}

func newNegative(c *Cache) *negative {
	ss := c.statements
	return &negative{
		sinceStmt: ss.new(sinceSQL), pageStmt: ss.new(pageSQL), beginEpochStmt: ss.new(beginEpochSQL),
		cache:        c,
		maxStaleness: c.cfg.MaxStaleness,
		table:        pq.QuoteIdentifier(c.cfg.schema()) + ".cache",
	}
}

// absent reports whether key certainly was absent at some moment within the last
// MaxStaleness, and counts that as a miss. If not, the database is to be asked, and
// answered be called with its answer. It takes no lock and allocates nothing.
func (c *Cache) absent(key string) bool {
	n := c.negative
	if n == nil || c.tx != nil || c.ended() {
		return false
	}
	// The generation is read before its filter, which therefore holds whatever
	// at promises.
	g := n.current.Load()
	if g == nil || g.filter.lookupHash(hashOf(key)) || g.age() > n.maxStaleness {
		return false
	}
	n.answers.Add(1)
	return true
}

// age is how long ago at was, by the clock that says longer: one stands still while
// the machine sleeps, the other can be set back.
func (g *generation) age() time.Duration {
	now := time.Now()
	return max(now.Sub(g.at), time.Duration(now.UnixNano()-g.at.UnixNano()))
}

// answered ends a lookup that the filter left to the database.
func (c *Cache) answered(key string, found bool, err error) {
	n := c.negative
	if n == nil || c.tx != nil || err != nil {
		return
	}
	g := n.current.Load()
	if g != nil {
		if found {
			return
		}
		if g.filter.lookupHash(hashOf(key)) {
			n.falsePositives.Add(1)
			if !n.dropWasteful(g) {
				return
			}
		}
	}
	n.refresh()
}

// dropWasteful drops the filter if it sends too many lookups to the database for
// nothing, and reports whether it did. That those lookups have also cost a fair part
// of what loading costs bounds the loss where a new filter will be no better, because
// what is asked for are expired entries.
func (n *negative) dropWasteful(g *generation) bool {
	falsePositives := n.falsePositives.Load() - g.falsePositives
	if falsePositives < int64(256+g.filter.Len()/16) || falsePositives < (n.answers.Load()-g.answers)/32 {
		return false
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.drop(g)
}

// drop takes g out of use, if it still is in use. n.mu is held.
func (n *negative) drop(g *generation) bool {
	if n.current.Load() != g {
		return false
	}
	n.grown = g.filter.Len() - g.loaded
	n.current.Store(nil)
	return true
}

// enter puts keys into the filter. Every write that may make a key visible, in a
// transaction too, calls it before it is sent, so that from its commit on the database
// is asked; and again when it has ended, since meanwhile a filter may have been loaded
// that knows neither of the first call nor of the commit. Who waits for the write hears
// of its end after the second call.
//
// The commit of a user's transaction comes after both: a filter loaded in between is
// wrong about its keys for MaxStaleness at most, as about another process's.
func (c *Cache) enter(keys ...string) {
	if c.negative == nil {
		return
	}
	for _, key := range keys {
		c.negative.enter(hashOf(key))
	}
}

func (n *negative) enter(hash uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.loading {
		n.hashes = append(n.hashes, hash)
	}
	if g := n.current.Load(); g != nil && !hold(g.filter, hash) {
		n.drop(g)
	}
}

// writing is a write on its way.
type writing struct {
	c    *Cache
	keys []string
}

func (c *Cache) write(keys ...string) writing {
	c.enter(keys...)
	return writing{c, keys}
}

func (c *Cache) writeAll() writing { return writing{c, nil} }

func (w writing) stored(at stamp, entries ...entry) {}

func (w writing) done() { w.c.enter(w.keys...) }

// hold reports whether filter holds hash now. What it has already, even by mistake,
// need not be in it twice, since nothing ever leaves it.
func hold(filter *CuckooFilter, hash uint64) bool {
	return filter.lookupHash(hash) || filter.insertHash(hash)
}

// refresh starts a load or a catch-up in the background, unless one runs, the last
// one failed a moment ago, or the filter is current again: a lookup that was begun
// before a catch-up may end after it.
func (n *negative) refresh() {
	if !n.busy.CompareAndSwap(false, true) {
		return
	}
	if g := n.current.Load(); g != nil && g.age() <= n.maxStaleness || time.Now().Before(n.retryAt) {
		n.busy.Store(false)
		return
	}
	n.cache.run(func() {
		defer n.busy.Store(false)
		ctx := n.cache.ctx
		err := n.update(ctx)
		if err == nil {
			n.failures = 0
			return
		}
		n.retryAt = time.Now().Add(100 * time.Millisecond << min(n.failures, 8)) // 26 s at most
		n.failures++
		if ctx.Err() == nil {
			n.cache.report("filter", err)
		}
	})
}

// update catches up or, where that is not possible, loads.
func (n *negative) update(ctx context.Context) error {
	if g := n.current.Load(); g != nil {
		if ok, err := n.catchUp(ctx, g); ok || err != nil {
			return err
		}
		n.mu.Lock()
		n.drop(g)
		n.mu.Unlock()
	}
	begin := time.Now()
	if begin.Before(n.loadAt) {
		return nil
	}
	err := n.load(ctx)
	n.loadAt = time.Now().Add(4 * time.Since(begin)) // at most a fifth of the time goes into loading
	return err
}

// Keys that were inserted since a snapshot: $1 is its xmax, $2 its running
// transactions. The first branch finds those of transactions that came later, up to
// this statement's own snapshot: rows of xids to come, from a restored copy, must not
// come each time. The second finds those of transactions that were running and
// have ended; for one that still runs its index entries are not even looked at. Each
// is one range of the index on (user_id, created_xid), which ORDER BY, LIMIT and, for a
// single transaction, BETWEEN hold the planner to, whatever it thinks of the table.
//
// The last row says what the next catch-up starts from, and tells a table that was
// emptied, replaced or restored from one that was not: no xid says that. A catch-up
// locks cache before cache_epoch, as Setup does.
const sinceSQL = `
SELECT key, created_xid, NULL, NULL FROM (
  SELECT key, created_xid FROM {schema}.cache
  WHERE user_id = {user} AND created_xid >= $1 AND created_xid < txid_snapshot_xmax(txid_current_snapshot())
  ORDER BY user_id, created_xid LIMIT 10000) later
UNION ALL
SELECT key, NULL, NULL, NULL FROM (
  SELECT c.key
  FROM (SELECT xid FROM unnest(string_to_array($2, ',')::bigint[]) x(xid)
    WHERE txid_visible_in_snapshot(xid, txid_current_snapshot()) OFFSET 0) ended,
  LATERAL (SELECT key FROM {schema}.cache
    WHERE user_id = {user} AND created_xid BETWEEN ended.xid AND ended.xid
    ORDER BY user_id, created_xid LIMIT 10000) c
  LIMIT 10000) ended
UNION ALL
SELECT NULL, txid_snapshot_xmax(txid_current_snapshot()),
  (SELECT id FROM {schema}.cache_epoch) || ' ' || to_regclass($3)::oid || ' ' || extract(epoch FROM pg_postmaster_start_time()),
  split_part(txid_current_snapshot()::text, ':', 3)`

// sinceKeys is the LIMIT of each branch of sinceSQL.
const sinceKeys = 10000

// news is what a catch-up brings, beside keys.
type news struct {
	token     sql.NullString // NULL without an epoch
	snapshot  snapshot
	later     int   // keys of the first branch
	lastLater int64 // the last transaction among them
	ended     int   // keys of the second branch
}

// since enters the keys inserted since s.
func (n *negative) since(ctx context.Context, s snapshot) (news, error) {
	var got news
	var key, running sql.NullString
	var xid sql.NullInt64
	_, err := query(ctx, n.cache, n.sinceStmt, n.cache.args(s.xmax, s.running, n.table), func(rows *sql.Rows) (none struct{}, _ error) {
		var token sql.NullString
		if err := rows.Scan(&key, &xid, &token, &running); err != nil {
			return none, err
		}
		switch {
		case !key.Valid:
			got.token, got.snapshot = token, snapshot{xid.Int64, running.String}
			return none, nil
		case xid.Valid:
			got.later++
			got.lastLater = xid.Int64
		default:
			got.ended++
		}
		n.enter(hashOf(key.String))
		return none, nil
	})
	return got, err
}

// catchUp makes g current as of now. It reports false if only a new filter can be.
func (n *negative) catchUp(ctx context.Context, g *generation) (ok bool, err error) {
	next := *g
	for {
		next.at = time.Now()
		got, err := n.since(ctx, next.since)
		if err != nil {
			return false, err
		}
		n.catchUps.Add(1)
		full := got.later >= sinceKeys
		switch {
		case !got.token.Valid || got.token.String != g.token,
			got.snapshot.xmax < next.since.xmax,
			got.ended >= sinceKeys,
			full && got.lastLater == next.since.xmax: // one transaction, of which there may be more
			return false, nil
		}
		next.since = got.snapshot
		if full {
			next.since.xmax = got.lastLater
			continue
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.current.Load() == g {
			n.current.Store(&next)
		}
		return true, nil
	}
}

const beginEpochSQL = `
INSERT INTO {schema}.cache_epoch (only_row) VALUES (true) ON CONFLICT DO NOTHING`

// Expired rows, too: a Set revives them without a new created_xid.
const pageSQL = `
SELECT key FROM {schema}.cache WHERE user_id = {user} AND key > $1 ORDER BY user_id, key LIMIT 5000`

// pageKeys is the LIMIT of pageSQL: a few milliseconds.
const pageKeys = 5000

// load makes a filter of all keys: each that was there at the snapshot, unless it was
// deleted before its page was read, and those that we write meanwhile.
func (n *negative) load(ctx context.Context) error {
	n.mu.Lock()
	n.loading = true
	n.mu.Unlock()
	defer func() {
		n.mu.Lock()
		n.loading, n.hashes = false, nil
		n.mu.Unlock()
	}()

	g := generation{at: time.Now()}
	nothing := snapshot{xmax: math.MaxInt64}
	got, err := n.since(ctx, nothing)
	if err == nil && !got.token.Valid {
		if _, err = n.cache.exec(ctx, n.beginEpochStmt, n.cache.args()...); err == nil {
			got, err = n.since(ctx, nothing)
		}
	}
	if err == nil && !got.token.Valid {
		err = errors.New("cache_epoch stays empty")
	}
	if err != nil {
		return err
	}
	g.token, g.since = got.token.String, got.snapshot

	var key string
	for rows := pageKeys; rows >= pageKeys; {
		rows = 0
		_, err := query(ctx, n.cache, n.pageStmt, n.cache.args(key), func(r *sql.Rows) (none struct{}, _ error) {
			rows++
			if err := r.Scan(&key); err != nil {
				return none, err
			}
			n.enter(hashOf(key))
			return none, nil
		})
		if err != nil {
			return err
		}
	}

	n.mu.Lock()
	hashes := n.hashes
	g.filter = NewCuckooFilter(len(hashes) + len(hashes)/16 + n.grown + 1024)
	n.mu.Unlock()
	fits := true
	for _, hash := range hashes { // meanwhile we may write more
		fits = fits && hold(g.filter, hash)
	}
	g.answers, g.falsePositives = n.answers.Load(), n.falsePositives.Load()
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, hash := range n.hashes[len(hashes):] {
		fits = fits && hold(g.filter, hash)
	}
	if !fits {
		return errors.New("the filter is full")
	}
	g.loaded = g.filter.Len()
	n.rebuilds.Add(1)
	n.current.Store(&g)
	return nil
}

func (n *negative) stats(s *Stats) {
	s.FilterAnswers = n.answers.Load()
	s.Misses += s.FilterAnswers
	s.FalsePositives = n.falsePositives.Load()
	s.CatchUps = n.catchUps.Load()
	s.Rebuilds = n.rebuilds.Load()
	if g := n.current.Load(); g != nil {
		s.FilterKeys = g.filter.Len()
		s.FilterBytes = 8 * len(g.filter.words)
	}
}
