package fastpgcache

import (
	"sync/atomic"
	"time"
)

// Stats is what a Cache, with all that its WithTx returned, has done since it was
// made. Only calls that succeeded count, but for Errors.
type Stats struct {
	Hits    int64 // keys looked up by Get, GetMany, Exists, TTL, Take, GetOrSet and its kin, and found
	Misses  int64 // keys looked up, and not found
	Sets    int64 // entries written by Set, SetMany, Add, Increment, GetOrSet and its kin
	Deletes int64 // entries removed by Delete, DeleteMany, DeletePrefix, Take or Clear
	Loads   int64 // calls of the loaders of GetOrSet and its kin
	Evicted int64 // entries of any process that this one removed, so that they keep the limit on size

	Statements int64 // sent to the database
	Keys       int64 // that they looked up, wrote or removed; Keys / Statements shows how calls merge
	Errors     int64 // of the cache, returned or given to Config.OnError; not those of loaders
	Latency    Latency

	LastCleanup time.Time // when this cache last was through with a cleanup; zero: never

	FilterAnswers int64 // misses that were answered from memory, without a statement
	LocalHits     int64 // hits that were answered from memory, without a statement
	Local         LocalStats
}

// LocalStats is of the answers from memory that Config.MaxStaleness turns on.
type LocalStats struct {
	Hits      int64         // answered from kept values, as Stats.LocalHits
	Misses    int64         // answered from the filter, as Stats.FilterAnswers
	Values    int           // kept now, those that may not be answered any more among them
	Bytes     int64         // of memory that they take, about
	Evictions int64         // values that had to go for others
	CatchUps  int64         // readings of what others have changed
	Resets    int64         // times that all was forgotten, since something was in doubt
	Age       time.Duration // since the last catch-up; 0: at the moment nothing may be answered

	FalsePositives int64 // keys that the filter took to be there, and were not
	FilterLoads    int64 // readings of all keys
	FilterKeys     int   // held now, deleted ones among them
	FilterBytes    int   // of memory, held now
}

// counters are the live form of Stats.
type counters struct {
	hits, misses, sets, deletes, loads atomic.Int64
	evicted                            atomic.Int64
	statements, keys, errors           atomic.Int64
	lastCleanup                        atomic.Int64 // Unix time in microseconds; 0: never
	latency                            histogram
}

// lookup counts one key that was looked up.
func (c *counters) lookup(found bool) {
	if found {
		c.hits.Add(1)
	} else {
		c.misses.Add(1)
	}
}

// sent counts one run of s.
func (c *counters) sent(s *statement) {
	c.statements.Add(1)
	c.keys.Add(s.keys)
}

// Stats returns the counters as they are now. It asks nothing of the database.
func (c *Cache) Stats() Stats {
	n := &c.stats
	s := Stats{
		Hits:       n.hits.Load(),
		Misses:     n.misses.Load(),
		Sets:       n.sets.Load(),
		Deletes:    n.deletes.Load(),
		Loads:      n.loads.Load(),
		Evicted:    n.evicted.Load(),
		Statements: n.statements.Load(),
		Keys:       n.keys.Load(),
		Errors:     n.errors.Load(),
		Latency:    n.latency.load(),
	}
	if at := n.lastCleanup.Load(); at != 0 {
		s.LastCleanup = time.UnixMicro(at)
	}
	if c.local != nil {
		s.Local = c.local.stats()
		s.Local.CatchUps = c.feed.catchUps.Load()
		s.LocalHits, s.FilterAnswers = s.Local.Hits, s.Local.Misses
		s.Hits += s.LocalHits
		s.Misses += s.FilterAnswers
	}
	return s
}
