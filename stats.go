package fastpgcache

import (
	"sync/atomic"
	"time"
)

// Stats is what a Cache has done since it was made, in transactions of WithTx, too. All
// but Errors count calls that succeeded.
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

	FilterAnswers int64 // misses that were answered from memory: Local.Misses
	LocalHits     int64 // hits that were answered from memory: Local.Hits
	Local         LocalStats
}

// LocalStats is of the answers from memory that Config.MaxStaleness turns on.
type LocalStats struct {
	Hits      int64         // answered from kept values, without a statement; Stats.Hits has them, too
	Misses    int64         // answered from the filter, without a statement; Stats.Misses has them, too
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

// Stats returns the counters as they are now; shards' are added up. It asks nothing of the
// database.
func (c *Cache) Stats() Stats {
	s := c.counted()
	if c.shards != nil {
		for i, shard := range c.shards.caches {
			s.add(shard.counted(), i == 0)
		}
	}
	return s
}

func (c *Cache) counted() Stats {
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

// add adds what a shard has done. A time of all is that of the shard which is last: the
// oldest cleanup, and the greatest age.
func (s *Stats) add(more Stats, first bool) {
	s.Hits += more.Hits
	s.Misses += more.Misses
	s.Sets += more.Sets
	s.Deletes += more.Deletes
	s.Loads += more.Loads
	s.Evicted += more.Evicted
	s.Statements += more.Statements
	s.Keys += more.Keys
	s.Errors += more.Errors
	for i, n := range more.Latency.Counts {
		s.Latency.Counts[i] += n
	}
	s.Latency.Sum += more.Latency.Sum
	if first || more.LastCleanup.Before(s.LastCleanup) {
		s.LastCleanup = more.LastCleanup
	}
	s.FilterAnswers += more.FilterAnswers
	s.LocalHits += more.LocalHits
	s.Local.Hits += more.Local.Hits
	s.Local.Misses += more.Local.Misses
	s.Local.Values += more.Local.Values
	s.Local.Bytes += more.Local.Bytes
	s.Local.Evictions += more.Local.Evictions
	s.Local.CatchUps += more.Local.CatchUps
	s.Local.Resets += more.Local.Resets
	s.Local.Age = max(s.Local.Age, more.Local.Age)
	s.Local.FalsePositives += more.Local.FalsePositives
	s.Local.FilterLoads += more.Local.FilterLoads
	s.Local.FilterKeys += more.Local.FilterKeys
	s.Local.FilterBytes += more.Local.FilterBytes
}
