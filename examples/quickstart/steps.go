package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

// The steps of the tour. Each is shown as it stands here, but for what it tells by t.

// Session is what the first step stores.
type Session struct {
	User string
	Cart int
}

func setAndGet(ctx context.Context, cache *fastpgcache.Cache, t *tour) error {
	sessions := fastpgcache.NewTyped[Session](cache, "session:")
	err := sessions.Set(ctx, "42", Session{User: "anna", Cart: 3}, 30*time.Minute)
	if err != nil {
		return err
	}
	session, found, err := sessions.Get(ctx, "42")
	if err != nil {
		return err
	}
	t.say("found is %t: it is %s's session, with %d things in the cart.", found, session.User, session.Cart)
	_, found, err = sessions.Get(ctx, "43")
	t.say("Of session 43, found is %t and the error %v: a miss is no error.", found, err)
	return err
}

func ttl(ctx context.Context, cache *fastpgcache.Cache, t *tour) error {
	ttl, _, err := cache.TTL(ctx, "session:42")
	if err != nil {
		return err
	}
	t.say("Session 42 has another %v to live.", ttl.Round(time.Second))
	// The server's clock alone decides, to the microsecond, cleaned up or not.
	err = cache.Set(ctx, "blink", "of an eye", 50*time.Millisecond)
	if err != nil {
		return err
	}
	time.Sleep(60 * time.Millisecond)
	found, err := cache.Exists(ctx, "blink")
	t.say("What lives for 50 ms is there after 60 ms: %t.", found)
	return err
}

func merged(ctx context.Context, cache *fastpgcache.Cache, t *tour) error {
	unmerged, err := fastpgcache.New(cache.DB(), fastpgcache.Config{Schema: t.schema, DisableCoalescing: true})
	if err != nil {
		return err
	}
	defer unmerged.Close()
	for _, c := range []*fastpgcache.Cache{unmerged, cache} {
		// 256 goroutines, each with one Get after the other.
		load, stop := context.WithTimeout(ctx, t.load)
		var callers sync.WaitGroup
		for range 256 {
			callers.Go(func() {
				var item string
				for load.Err() == nil {
					c.Get(load, fmt.Sprint("item:", rand.IntN(1000)), &item)
				}
			})
		}
		t.watch(c, c == unmerged, load)
		callers.Wait()
		stop()
	}
	return nil
}

func local(ctx context.Context, cache *fastpgcache.Cache, t *tour) error {
	near, err := fastpgcache.New(cache.DB(), fastpgcache.Config{Schema: t.schema, MaxStaleness: 100 * time.Millisecond})
	if err != nil {
		return err
	}
	defer near.Close()
	var price string
	start, before := time.Now(), near.Stats().Statements
	for range 1_000_000 {
		if _, err := near.Get(ctx, "price:tea", &price); err != nil {
			return err
		}
	}
	took := time.Since(start)
	t.say("A million Gets took %v, %v each, and %d statements.", took.Round(time.Millisecond), (took / 1_000_000).Round(time.Nanosecond), near.Stats().Statements-before)

	// Another process sets another price.
	err = cache.Set(ctx, "price:tea", "3.80", fastpgcache.NoExpiry)
	for start = time.Now(); err == nil && price != "3.80"; {
		_, err = near.Get(ctx, "price:tea", &price)
	}
	t.say("The new price was seen after %v. The promise is 100 ms at most.", time.Since(start).Round(time.Millisecond))
	return err
}

func refresh(ctx context.Context, cache *fastpgcache.Cache, t *tour) error {
	failures := make(chan error, 10)
	cache, err := fastpgcache.New(cache.DB(), fastpgcache.Config{Schema: t.schema, OnError: func(err error) { failures <- err }})
	if err != nil {
		return err
	}
	defer cache.Close()
	products := fastpgcache.NewTyped[string](cache, "product:")
	var down atomic.Bool
	load := func(context.Context) (string, error) {
		if down.Load() {
			return "", errors.New("the shop's database is down")
		}
		return "a teapot", nil
	}
	// Fresh for 50 ms, then loaded anew in the background; kept for a day.
	product, err := products.GetOrRefresh(ctx, "7", 50*time.Millisecond, 24*time.Hour, load)
	if err != nil {
		return err
	}
	t.say("Product 7 is %s. Nobody had it: this call waited for load.", product)
	down.Store(true)
	time.Sleep(100 * time.Millisecond)
	product, err = products.GetOrRefresh(ctx, "7", 50*time.Millisecond, 24*time.Hour, load)
	if err != nil {
		return err
	}
	t.say("With what it is loaded from down, it still is %s, at once and for up to a day.", product)
	t.say("OnError heard: %v", <-failures)
	return nil
}

func transaction(ctx context.Context, cache *fastpgcache.Cache, t *tour) error {
	tx, err := cache.DB().BeginTx(ctx, nil) // any transaction on the same database
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if _, err := tx.ExecContext(ctx, "UPDATE product SET price = 21.90 WHERE id = 7"); err != nil {
		return err
	}
	if _, err := cache.WithTx(tx).Delete(ctx, "product:7"); err != nil {
		return err
	}
	before, err := cache.Exists(ctx, "product:7")
	if err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return err
	}
	after, err := cache.Exists(ctx, "product:7")
	t.say("The cached product was there before the commit: %t; after it: %t.", before, after)
	t.say("The row and its cache changed together, or neither would have.")
	return err
}

func twoUsers(ctx context.Context, alice *fastpgcache.Cache, t *tour) error {
	if err := alice.Set(ctx, "secret", "alice's", time.Hour); err != nil {
		return err
	}
	bob := t.bob // logs in as another role
	found, err := bob.Get(ctx, "secret", nil)
	if err != nil {
		return err
	}
	t.say("Bob finds Alice's secret: %t.", found)
	var rows int
	if err := bob.DB().QueryRowContext(ctx, "SELECT count(*) FROM cache").Scan(&rows); err != nil {
		return err
	}
	t.say("In SQL he counts %d rows: PostgreSQL's row-level security hides hers.", rows)
	liar, err := fastpgcache.New(bob.DB(), fastpgcache.Config{Schema: t.schema, User: t.aliceRole})
	if err != nil {
		return err
	}
	err = liar.Set(ctx, "secret", "bob's", time.Hour)
	t.say("If he says that he is Alice: ErrNotPermitted %t.", errors.Is(err, fastpgcache.ErrNotPermitted))
	return liar.Close()
}

func crash(ctx context.Context, cache *fastpgcache.Cache, t *tour) error {
	load := func(context.Context) (any, error) { return "from the source", nil }
	if err := t.server.Kill(); err != nil { // SIGKILL, as when memory runs out
		return err
	}
	var value string
	err := cache.GetOrSet(ctx, "session:42", &value, time.Hour, load)
	t.say("PostgreSQL is down: GetOrSet gives %q, error %v.", value, err)
	if err := t.server.StartAgain(ctx); err != nil {
		return err
	}
	found, err := cache.Exists(ctx, "session:42")
	if err != nil {
		return err
	}
	t.say("It is up again, and the cache is empty, as UNLOGGED tables are after a crash: found %t.", found)
	err = cache.GetOrSet(ctx, "session:42", &value, time.Hour, load)
	if err != nil {
		return err
	}
	found, err = cache.Exists(ctx, "session:42")
	t.say("Nothing needs to be done: the next GetOrSet fills it, found %t.", found)
	return err
}
