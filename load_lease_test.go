package fastpgcache

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

func TestGetOrSetLeavesNoLease(t *testing.T) {
	ctx := t.Context()
	dsn, admin := setUp(t)
	c := openCache(t, dsn, Config{})
	failure := errors.New("no")
	if err := c.GetOrSet(ctx, "good", nil, 0, returns(1)); err != nil {
		t.Fatal(err)
	}
	if err := c.GetOrSet(ctx, "bad", nil, 0, func(context.Context) (any, error) { return nil, failure }); !errors.Is(err, failure) {
		t.Fatal(err)
	}
	if err := c.GetOrSet(ctx, "worse", nil, 0, returns(make(chan int))); err == nil {
		t.Fatal("a channel was stored")
	}
	db := openDB(t, admin)
	eventually(t, "no lease", func() bool {
		var n int
		if err := db.QueryRow(`SELECT count(*) FROM cache_lease`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n == 0
	})
	wantNoEntry(t, c, "bad")
	wantNoEntry(t, c, "worse")
}

func TestGetOrSetHoldsNoConnectionWhileLoading(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	c.DB().SetMaxOpenConns(1)
	g := newGate()
	answer := ask(ctx, c, "k", g.load)
	<-g.runs
	eventually(t, "no connection in use", func() bool { return c.DB().Stats().InUse == 0 })
	if err := c.Set(ctx, "other", 1, 0); err != nil {
		t.Error(err)
	}
	g.value <- "loaded"
	wantAnswer(t, answer, "loaded")
}

func TestGetOrSetTakesOverALeaseThatRanOut(t *testing.T) {
	ctx := t.Context()
	dsn, admin := setUp(t)
	paused, other := openCache(t, dsn, Config{}), openCache(t, dsn, Config{})
	g := newGate()
	first := ask(ctx, paused, "k", g.load)
	<-g.runs
	second := ask(ctx, other, "k", returns("taken over"))
	eventually(t, "the other waits", func() bool { return waiting(other, "k") == 1 })
	execAdmin(t, admin, `UPDATE cache_lease SET expires_at = statement_timestamp()`)
	wantAnswer(t, second, "taken over")

	// Its first holder comes back too late, and knows it.
	g.value <- "out of date"
	wantAnswer(t, first, "taken over")
	wantEntry(t, other, "k", "taken over")

	// The same when the new holder is not done yet.
	if _, err := other.Delete(ctx, "k"); err != nil {
		t.Fatal(err)
	}
	g2 := newGate()
	first = ask(ctx, paused, "k", g.load)
	<-g.runs
	second = ask(ctx, other, "k", g2.load)
	eventually(t, "the other waits", func() bool { return waiting(other, "k") == 1 })
	execAdmin(t, admin, `UPDATE cache_lease SET expires_at = statement_timestamp()`)
	<-g2.runs
	g.value <- "out of date"
	wantAnswer(t, first, "out of date") // for this caller alone
	wantNoEntry(t, other, "k")
	g2.value <- "taken over"
	wantAnswer(t, second, "taken over")
	wantEntry(t, other, "k", "taken over")
}

// A lease that ends later than any lease can stops nobody: the clock was set back.
func TestGetOrSetTakesOverALeaseFromTheFuture(t *testing.T) {
	dsn, admin := setUp(t)
	c := openCache(t, dsn, Config{})
	db := openDB(t, pgtest.WithUser(admin, roleOf(t, dsn)))
	for _, until := range []string{"now() + interval '1 hour'", "'infinity'", "now() + interval '15 seconds'"} {
		if _, err := db.Exec(`INSERT INTO cache_lease (key, holder, expires_at) VALUES ($1, 'dead', `+until+`)`, until); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		wantAnswer(t, ask(t.Context(), c, until, returns("loaded")), "loaded")
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("%s: waited %v for a lease that is over", until, took)
		}
		wantEntry(t, c, until, "loaded")
	}
}

func roleOf(t *testing.T, dsn string) (role string) {
	t.Helper()
	if err := openDB(t, dsn).QueryRow(`SELECT current_user`).Scan(&role); err != nil {
		t.Fatal(err)
	}
	return role
}

// A renewal never takes the lease from the store that follows it.
func TestGetOrSetStoresThroughRenewals(t *testing.T) {
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	c.loads.leaseFor = 90 * time.Millisecond
	const loads = 60
	for i := range loads {
		if err := c.GetOrSet(t.Context(), fmt.Sprint(i), nil, 0, func(context.Context) (any, error) {
			time.Sleep(27*time.Millisecond + time.Duration(i)*150*time.Microsecond) // a renewal is under way
			return i, nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	if got := c.Stats().Sets; got != loads {
		t.Errorf("%d of %d loads were stored", got, loads)
	}
}

func TestGetOrSetKeepsItsLeaseWhileLoading(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	slow, other := openCache(t, dsn, Config{}), openCache(t, dsn, Config{})
	slow.loads.leaseFor = 200 * time.Millisecond
	g := newGate()
	first := ask(ctx, slow, "k", g.load)
	<-g.runs
	second := ask(ctx, other, "k", returns("too early"))
	time.Sleep(3 * slow.loads.leaseFor)
	g.value <- "loaded"
	wantAnswer(t, first, "loaded")
	wantAnswer(t, second, "loaded")

	// Not for a loader that nobody waits for.
	if _, err := other.Delete(ctx, "k"); err != nil {
		t.Fatal(err)
	}
	ctx, leave := context.WithCancel(ctx)
	first = ask(ctx, slow, "k", g.load)
	<-g.runs
	leave()
	<-first
	wantAnswer(t, ask(t.Context(), other, "k", returns("taken over")), "taken over")
	g.value <- "abandoned"
	if err := slow.Close(); err != nil { // it awaits the loader
		t.Error(err)
	}
	wantEntry(t, other, "k", "taken over")
}
