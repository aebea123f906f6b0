package conformance

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

// age makes what is under key live for left only.
func age(t *testing.T, c *fastpgcache.Cache, key string, left time.Duration) {
	t.Helper()
	if found, err := c.Expire(bounded(t), key, left); err != nil || !found {
		t.Fatalf("expire: got %t, %v", found, err)
	}
}

func wantRefreshed(t *testing.T, c *fastpgcache.Cache, key, want string) {
	t.Helper()
	await(t, key+" is "+want, func() bool {
		var got string
		_, err := c.Get(bounded(t), key, &got)
		return err == nil && got == want
	})
}

func testRefresh(s *suite, t *testing.T) {
	c, ctx := s.cache(t), bounded(t)
	mustSet(t, c, "k", "old", time.Hour)
	var got string
	if err := c.GetOrRefresh(ctx, "k", &got, time.Minute, time.Hour, never); err != nil || got != "old" {
		t.Errorf("fresh: got %q, %v", got, err)
	}
	age(t, c, "k", 59*time.Minute-time.Second)
	var loads atomic.Int64
	loaded := make(chan struct{})
	load := func(context.Context) (any, error) {
		loads.Add(1)
		<-loaded
		return "new", nil
	}
	atOnce(func(int) {
		for range 3 {
			var got string
			if err := c.GetOrRefresh(ctx, "k", &got, time.Minute, time.Hour, load); err != nil || got != "old" {
				t.Errorf("stale: got %q, %v", got, err)
			}
		}
	})
	close(loaded)
	wantRefreshed(t, c, "k", "new")
	if n := loads.Load(); n != 1 {
		t.Errorf("got %d loads, want 1", n)
	}
	wantTTL(t, c, "k", time.Hour)

	// What is not there is waited for, and an entry without a TTL is always fresh.
	if err := c.GetOrRefresh(ctx, "missing", &got, time.Minute, time.Hour, load); err != nil || got != "new" {
		t.Errorf("missing: got %q, %v", got, err)
	}
	mustSet(t, c, "for ever", "old", 0)
	if err := c.GetOrRefresh(ctx, "for ever", &got, time.Nanosecond, time.Hour, never); err != nil || got != "old" {
		t.Errorf("without a TTL: got %q, %v", got, err)
	}
	for _, d := range [][2]time.Duration{{0, time.Hour}, {-1, time.Hour}, {time.Hour + 1, time.Hour}, {time.Minute, 0}, {time.Minute, fastpgcache.NoExpiry}} {
		wantError(t, "get or refresh", c.GetOrRefresh(ctx, "k", nil, d[0], d[1], never), fastpgcache.ErrInvalidTTL)
	}
}

func testFailedRefresh(s *suite, t *testing.T) {
	var reported atomic.Int64
	c := s.cache(t, func(cfg *fastpgcache.Config) {
		cfg.OnError = func(err error) {
			reported.Add(1)
			wantError(t, "get or refresh", err, errLoader)
		}
	})
	mustSet(t, c, "k", "old", time.Minute)
	var loads atomic.Int64
	var works atomic.Bool
	load := func(context.Context) (any, error) {
		loads.Add(1)
		if works.Load() {
			return "new", nil
		}
		return nil, errLoader
	}
	ask := func() (got string) {
		if err := c.GetOrRefresh(bounded(t), "k", &got, time.Minute, time.Hour, load); err != nil {
			t.Error(err)
		}
		return got
	}
	await(t, "three failures", func() bool {
		if got := ask(); got != "old" {
			t.Errorf("got %q", got)
		}
		return reported.Load() >= 3
	})
	begin := time.Now()
	for range 100 {
		ask()
	}
	// After three failures the next try waits for 400 ms at least.
	if n, most := loads.Load(), 4+time.Since(begin)/(400*time.Millisecond); n > int64(most) {
		t.Errorf("got %d loads one after the other, want the later ones to wait", n)
	}
	works.Store(true)
	await(t, "it works again", func() bool { return ask() == "new" })

	// A panic is no end of the program.
	mustSet(t, c, "panics", "old", time.Minute)
	before := reported.Load()
	var got string
	if err := c.GetOrRefresh(bounded(t), "panics", &got, time.Minute, time.Hour, func(context.Context) (any, error) { panic(errLoader) }); err != nil || got != "old" {
		t.Errorf("got %q, %v", got, err)
	}
	await(t, "the panic is reported", func() bool { return reported.Load() > before })
}

func testRefreshLoses(s *suite, t *testing.T) {
	c, ctx := s.cache(t), bounded(t)
	for name, write := range map[string]func(key string) error{
		"set":    func(key string) error { return c.Set(ctx, key, "set", time.Hour) },
		"delete": func(key string) error { _, err := c.Delete(ctx, key); return err },
	} {
		mustSet(t, c, name, "old", time.Minute)
		begun, loaded := make(chan struct{}), make(chan struct{})
		before := c.Stats().Sets
		err := c.GetOrRefresh(ctx, name, nil, time.Minute, time.Hour, func(context.Context) (any, error) {
			close(begun)
			<-loaded
			return "refreshed", nil
		})
		if err != nil {
			t.Error(err)
		}
		<-begun
		if err := write(name); err != nil {
			t.Error(err)
		}
		close(loaded)
		await(t, "no lease", func() bool { return s.leases(t, c) == 0 })
		var got string
		found, err := c.Get(ctx, name, &got)
		if err != nil || found != (name == "set") || got == "refreshed" {
			t.Errorf("%s: got %q, %t, %v", name, got, found, err)
		}
		_ = before
	}
}

// leases is how many leases c's user has.
func (s *suite) leases(t *testing.T, c *fastpgcache.Cache) int {
	t.Helper()
	return one[int](t, s.admin, `SELECT count(*) FROM `+s.union(`SELECT 1 AS one FROM {schema}.cache_lease WHERE user_id = $1`), one[string](t, c.DB(), `SELECT current_user`))
}

func testRefreshsError(s *suite, t *testing.T) {
	c, ctx := s.cache(t, func(cfg *fastpgcache.Config) { cfg.OnError = func(error) {} }), bounded(t)
	mustSet(t, c, "k", "old", time.Minute)
	begun, fail := make(chan struct{}), make(chan struct{})
	if err := c.GetOrRefresh(ctx, "k", nil, time.Minute, time.Hour, func(context.Context) (any, error) {
		close(begun)
		<-fail
		return nil, errLoader
	}); err != nil {
		t.Error(err)
	}
	<-begun
	s.expire(t, c, "k")
	load, _ := loads("new")
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			var got string
			if err := c.GetOrRefresh(ctx, "k", &got, time.Minute, time.Hour, load); err != nil || got != "new" {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
	time.Sleep(20 * time.Millisecond)
	close(fail)
	wg.Wait()
}

func testRefreshEnds(s *suite, t *testing.T) {
	c, ctx := s.cache(t, func(cfg *fastpgcache.Config) { cfg.OnError = func(error) {} }), bounded(t)
	type trace struct{}
	var got string
	var begun atomic.Bool
	ended := make(chan error, 1)
	var late <-chan time.Time
	for !begun.Load() { // on a busy machine the entry ends before a refresh begins
		mustSet(t, c, "k", "old", 300*time.Millisecond)
		if err := c.GetOrRefresh(context.WithValue(ctx, trace{}, "caller's"), "k", &got, time.Minute, time.Hour, func(ctx context.Context) (any, error) {
			begun.Store(true)
			if ctx.Value(trace{}) != "caller's" {
				t.Error("the refresh lacks the caller's values")
			}
			<-ctx.Done()
			ended <- ctx.Err()
			return nil, ctx.Err()
		}); err != nil || got != "old" {
			t.Fatalf("got %q, %v", got, err)
		}
		late = time.After(5 * time.Second)
		await(t, "the entry expires", func() bool {
			found, err := c.Exists(ctx, "k")
			if err != nil {
				t.Fatal(err)
			}
			return !found
		})
	}
	select {
	case <-ended:
	case <-late:
		t.Error("the refresh outlives its entry")
	}
	wantMiss(t, c, "k")
	load, _ := loads("new")
	if err := c.GetOrRefresh(ctx, "k", &got, time.Minute, time.Hour, load); err != nil || got != "new" {
		t.Errorf("after it: got %q, %v", got, err)
	}
}
