package fastpgcache

import (
	"database/sql"
	"runtime"
	"sync"
	"weak"
)

// unlimitedPool stands for the size of a pool that has no limit.
const unlimitedPool = 16

// budget is how many of a pool's connections merged calls take, whatever their kinds:
// three quarters, and never the last one, so that the pool's owner can work while
// every statement hangs. It is shared by all caches on the pool.
//
// Of these places, three quarters are for whoever comes first. The rest is only for
// kinds that hold none: so a kind whose statements all hang leaves one to each of
// the others. No more fairness is needed, since a place that becomes free goes to
// the kind that has waited longest.
type budget struct {
	pool func() int // connections that it may have open, 0 for any number

	mu    sync.Mutex
	taken int
	line  []*share // kinds that were refused a place, first come first
}

// share is the part of a budget that one kind of calls has.
type share struct {
	budget *budget
	wake   func() // takes the places that it needs
	held   int    // under the budget's mu
	inLine bool   // under the budget's mu
}

// threeQuarters leaves at least one of n, but of one.
func threeQuarters(n int) int { return max(1, n-max(1, n/4)) }

// share returns the part of a new kind. wake is called, with no lock held, when a
// place that take refused may be free.
func (b *budget) share(wake func()) *share { return &share{budget: b, wake: wake} }

// take takes a place, if one is free. If not, wake will be called.
func (s *share) take() bool {
	b := s.budget
	pool := b.pool()
	if pool <= 0 {
		pool = unlimitedPool
	}
	all := threeQuarters(pool)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.taken < threeQuarters(all) || s.held == 0 && b.taken < all {
		b.taken++
		s.held++
		return true
	}
	if !s.inLine {
		s.inLine = true
		b.line = append(b.line, s)
	}
	return false
}

// give gives a place back and offers it to those in line. Each is asked once: one
// that needs none leaves the line, one that may not have it goes to its end.
func (s *share) give() {
	b := s.budget
	b.mu.Lock()
	b.taken--
	s.held--
	for range len(b.line) {
		if len(b.line) == 0 {
			break
		}
		next := b.line[0]
		b.line = b.line[1:]
		next.inLine = false
		b.mu.Unlock()
		next.wake()
		b.mu.Lock()
	}
	b.mu.Unlock()
}

// budgets are those in use. Caches find the one of their pool here, since two that
// were made over one pool know nothing of each other. A budget goes with the last
// cache that holds it.
var budgets struct {
	mu sync.Mutex
	of map[*sql.DB]weak.Pointer[budget]
}

// budgetOf returns the budget of db.
func budgetOf(db *sql.DB) *budget {
	budgets.mu.Lock()
	defer budgets.mu.Unlock()
	if b := budgets.of[db].Value(); b != nil {
		return b
	}
	if budgets.of == nil {
		budgets.of = map[*sql.DB]weak.Pointer[budget]{}
	}
	b := &budget{pool: func() int { return db.Stats().MaxOpenConnections }}
	budgets.of[db] = weak.Make(b)
	runtime.AddCleanup(b, forgetBudget, db)
	return b
}

// forgetBudget removes db's budget, unless it has another by now.
func forgetBudget(db *sql.DB) {
	budgets.mu.Lock()
	defer budgets.mu.Unlock()
	if budgets.of[db].Value() == nil {
		delete(budgets.of, db)
	}
}
