package main

import (
	"math"
	"math/rand/v2"
)

// rule is what migrations.sql and the package do, in memory: entries have an age, in
// transactions; those that are read are noted and, now and then, the old ones of them
// touched; walks sum up by age what is there, and evict the oldest.
type rule struct {
	limit   int // entries
	queues  int // 2, with probation, as it is; or 1
	round   int // accesses between two rounds
	entries map[uint64]*ruleEntry

	xid       int64
	sinceWalk int
	accesses  int
	half      int64
	seen      []uint64
	pending   []uint64

	touches, sent int
	sum, samples  int // of the number of entries
}

type ruleEntry struct {
	birth int64
	read  bool
}

const (
	seenBits   = 1 << 18
	maxPending = 1000
	perOctave  = 2
)

func newRule(limit, queues, round int) *rule {
	return &rule{limit: limit, queues: queues, round: round, entries: map[uint64]*ruleEntry{}, seen: make([]uint64, seenBits/64)}
}

func (r *rule) access(key uint64) bool {
	r.accesses++
	if r.accesses%r.round == 0 {
		r.turn()
	}
	if e := r.entries[key]; e != nil {
		r.note(key)
		return true
	}
	r.xid++
	r.entries[key] = &ruleEntry{birth: r.xid}
	if r.sinceWalk++; r.sinceWalk%max(1, r.limit/32) == 0 {
		r.turn()
	}
	return false
}

func (r *rule) note(key uint64) {
	h := (key * 0x9E3779B97F4A7C15) >> 20 % seenBits
	if r.seen[h/64]>>(h%64)&1 == 1 || len(r.pending) == maxPending || len(r.entries) < r.limit/4 {
		return
	}
	r.seen[h/64] |= 1 << (h % 64)
	r.pending = append(r.pending, key)
}

func (r *rule) turn() {
	r.sum += len(r.entries)
	r.samples++
	r.xid++
	r.sent += len(r.pending)
	for _, key := range r.pending {
		e := r.entries[key]
		switch {
		case e == nil:
		case r.queues == 2 && !e.read, e.birth < r.half:
			e.read, e.birth = true, r.xid
			r.touches++
		}
	}
	r.pending = r.pending[:0]
	if len(r.entries) > r.limit+3*r.limit/16 {
		r.walk()
	}
}

func bucket(age int64) int {
	if age <= 0 {
		return 0
	}
	return 1 + int(math.Log(float64(age))*perOctave/math.Ln2)
}

// sums counts by age those of one queue.
func (r *rule) sums(read bool) (sums [32 * perOctave]int, total int) {
	for _, e := range r.entries {
		if r.queues == 1 || e.read == read {
			sums[bucket(r.xid-e.birth)]++
			total++
		}
	}
	return sums, total
}

func (r *rule) walk() {
	r.xid++
	excess := len(r.entries) - (r.limit - r.limit/16)
	if r.queues == 2 {
		sums, total := r.sums(false)
		fromProbation := min(excess, max(0, total-r.limit*3/10))
		r.evict(sums[:], false, fromProbation)
		excess -= fromProbation
	}
	sums, _ := r.sums(true)
	r.evict(sums[:], true, excess)
	sums, total := r.sums(true)
	r.half = 0
	for b, n := len(sums)-1, 0; b > 0; b-- {
		if n += sums[b]; n >= total/2 {
			r.half = r.xid - int64(math.Exp(float64(b-1)*math.Ln2/perOctave))
			break
		}
	}
	r.sinceWalk = 0
	clear(r.seen)
}

// evict removes the oldest of a queue: of the youngest bucket that has victims, a share.
func (r *rule) evict(sums []int, read bool, excess int) {
	if excess <= 0 {
		return
	}
	last := len(sums) - 1
	for last > 0 && sums[last] < excess {
		excess -= sums[last]
		last--
	}
	share := float64(excess) / float64(max(1, sums[last]))
	for key, e := range r.entries {
		if r.queues == 2 && e.read != read {
			continue
		}
		if b := bucket(r.xid - e.birth); b > last || b == last && rand.Float64() < share {
			delete(r.entries, key)
		}
	}
}
