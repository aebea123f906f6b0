package fastpgcache

import (
	"database/sql"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestTheBudgetLeavesTheOwnerAFairPart(t *testing.T) {
	for conns, want := range map[int]int{0: 12, 1: 1, 2: 1, 3: 2, 4: 3, 8: 6, 10: 8, 16: 12, 100: 75} {
		b := poolOf(conns)
		got := 0
		for range 200 { // kinds, each as greedy as may be
			for s := b.share(func() {}); s.take(); {
				got++
			}
		}
		if got != want {
			t.Errorf("a pool of %d: %d places, want %d", conns, got, want)
		}
	}
}

func TestAGreedyKindLeavesAPlaceToOthers(t *testing.T) {
	for conns, want := range map[int][]int{2: {1, 0}, 3: {1, 1}, 4: {2, 1}, 10: {6, 1, 1}, 16: {9, 1, 1, 1}} {
		b := poolOf(conns)
		for i, want := range want {
			got := 0
			for s := b.share(func() {}); s.take(); {
				got++
			}
			if got != want {
				t.Errorf("a pool of %d: kind %d has %d places, want %d", conns, i, got, want)
			}
		}
	}
}

func TestAPlaceGoesToWhoWaitedLongest(t *testing.T) {
	b := poolOf(2) // one place
	var order []string
	kind := func(name string) *share {
		var s *share
		s = b.share(func() {
			if s.take() {
				order = append(order, name)
			}
		})
		return s
	}
	first, second, third := kind("first"), kind("second"), kind("third")
	first.take()
	second.take()
	third.take()
	second.take() // a second time is no second place in the line
	first.give()
	first.take()
	second.give()
	third.give()
	first.give()
	if got, want := strings.Join(order, " "), "second third first"; got != want {
		t.Errorf("places went to %s, want %s", got, want)
	}
	if b.taken != 0 || len(b.line) != 0 {
		t.Errorf("%d places taken, %d in line at the end, want none", b.taken, len(b.line))
	}
}

func TestWhoNeedsNoPlaceAnyMorePassesItOn(t *testing.T) {
	b := poolOf(2)
	holder := b.share(func() {})
	idle := b.share(func() {})
	got := false
	var last *share
	last = b.share(func() { got = last.take() })
	for _, s := range []*share{holder, idle, last} {
		s.take()
	}
	holder.give()
	if !got {
		t.Error("the place went to nobody, want the last in line")
	}
}

func TestThePoolMayChange(t *testing.T) {
	conns := 1
	b := &budget{pool: func() int { return conns }}
	s, other := b.share(func() {}), b.share(func() {})
	if !s.take() || other.take() {
		t.Fatal("want the one place taken, and no other")
	}
	conns = 10
	for range 2 {
		if !other.take() {
			t.Error("want more places in a larger pool")
		}
	}
	conns = 4
	s.give()
	if s.take(); b.taken != 3 {
		t.Errorf("%d places taken, want 3 in a smaller pool", b.taken)
	}
}

func TestCachesOverOnePoolShareABudget(t *testing.T) {
	a, other := openNowhere(t, Config{}), openNowhere(t, Config{})
	b, err := New(a.DB(), Config{Schema: "another"})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if a.single.gets.budget != b.single.sets.budget {
		t.Error("two budgets of one pool")
	}
	if a.single.gets.budget == other.single.gets.budget {
		t.Error("one budget of two pools")
	}
	a.DB().SetMaxOpenConns(7)
	if got := b.single.sets.budget.pool(); got != 7 {
		t.Errorf("the pool has %d connections, want 7", got)
	}
}

// A program that opens and drops pools keeps none of them.
func TestABudgetGoesWithItsCaches(t *testing.T) {
	before := budgetCount()
	for range 10 {
		c, err := Open("host=nowhere", Config{})
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	for range 100 {
		runtime.GC()
		if budgetCount() <= before {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d budgets, want the %d of before", budgetCount(), before)
}

func budgetCount() int {
	budgets.mu.Lock()
	defer budgets.mu.Unlock()
	return len(budgets.of)
}

// openNowhere returns a cache that has no database.
func openNowhere(t *testing.T, cfg Config) *Cache {
	t.Helper()
	c, err := Open("host=nowhere", cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// However many kinds of calls hang, and however often they are tried.
func TestKindsThatHangLeaveConnectionsAndEachOtherAPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := poolOf(16)
		hangs := []*recorder{{}, {}, {}}
		var outcomes []<-chan error
		for _, r := range hangs {
			c := over(t.Context(), b, r)
			for i := range 100 {
				outcomes = append(outcomes, start(t.Context(), c, fmt.Sprint(i)))
				time.Sleep(slowAfter / 2)
				synctest.Wait()
			}
		}
		if b.taken > 11 {
			t.Errorf("three kinds that hang take %d of 16 connections, want at most 11", b.taken)
		}
		works := &recorder{}
		c := over(t.Context(), b, works)
		close(works.answer)
		for i := range 10 {
			if err := <-start(t.Context(), c, fmt.Sprint(i)); err != nil {
				t.Error(err)
			}
		}
		for _, r := range hangs {
			close(r.answer)
		}
		for _, o := range outcomes {
			if err := <-o; err != nil {
				t.Error(err)
			}
		}
		synctest.Wait()
		if b.taken != 0 {
			t.Errorf("%d places taken after all ended", b.taken)
		}
	})
}

func TestAPoolOfTwoServesEveryKind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := poolOf(2)
		var outcomes []<-chan error
		var rs []*recorder
		for range 4 {
			r := &recorder{}
			c := over(t.Context(), b, r)
			rs = append(rs, r)
			for i := range 3 {
				outcomes = append(outcomes, start(t.Context(), c, fmt.Sprint(i)))
			}
		}
		if b.taken != 1 {
			t.Errorf("%d places taken, want 1", b.taken)
		}
		for _, r := range rs {
			close(r.answer)
		}
		for _, o := range outcomes {
			if err := <-o; err != nil {
				t.Error(err)
			}
		}
	})
}

func TestALockedTableLeavesTheOwnerHisConnections(t *testing.T) {
	for _, conns := range []int{2, 10} {
		c, dsn := openSetUp(t, Config{})
		c.DB().SetMaxOpenConns(conns)
		ctx := t.Context()
		stranger, err := sql.Open("postgres", dsn)
		if err != nil {
			t.Fatal(err)
		}
		defer stranger.Close()
		tx, err := stranger.Begin()
		if err != nil {
			t.Fatal(err)
		}
		defer tx.Rollback()
		if _, err := tx.Exec("LOCK TABLE cache"); err != nil {
			t.Fatal(err)
		}
		var ended []chan error
		call := func(f func(key string) error) {
			done := make(chan error, 1)
			key := fmt.Sprint(len(ended))
			go func() { done <- f(key) }()
			ended = append(ended, done)
		}
		for range 20 {
			call(func(key string) error { return c.Set(ctx, key, "v", 0) })
			call(func(key string) error { _, err := c.Get(ctx, key, nil); return err })
			call(func(key string) error { _, err := c.Delete(ctx, key); return err })
			call(func(key string) error { _, err := c.Exists(ctx, key); return err })
			call(func(key string) error { return c.Set(ctx, key, strings.Repeat("x", 2*maxCallBytes), 0) })
			time.Sleep(slowAfter / 2)
		}
		if got, want := c.DB().Stats().InUse, threeQuarters(conns); got > want {
			t.Errorf("%d of %d connections in use, want at most %d", got, conns, want)
		}
		if err := c.DB().PingContext(ctx); err != nil {
			t.Error(err)
		}
		tx.Rollback()
		var errs []error
		for _, done := range ended {
			errs = append(errs, <-done)
		}
		if err := errors.Join(errs...); err != nil {
			t.Error(err)
		}
	}
}
