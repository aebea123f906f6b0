package conformance

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

var loadTests = []test{
	{name: "GetOrSetLoadsOnceForManyCallers", run: testLoadOnce},
	{name: "AFailedLoadIsNotKept", run: testFailedLoad},
	{name: "APanicOfALoaderIsTheFirstCallersAlone", run: testPanickingLoad},
	{name: "ASetOrDeleteDuringTheLoadWins", run: testLoadLoses},
	{name: "WhoComesAfterADeleteNeverGetsWhatWasBefore", run: testNothingFromBeforeADelete, once: true},
	{name: "ALoaderLivesAsLongAsAnyCallerWaits", run: testLoadersContext},
	{name: "GetOrSetLoadsWithoutADatabase", run: testLoadOffline},
}

func testLoadOnce(s *suite, t *testing.T) {
	c, ctx := s.cache(t), bounded(t)
	var loads atomic.Int64
	load := func(context.Context) (any, error) {
		loads.Add(1)
		time.Sleep(20 * time.Millisecond)
		return map[string]int{"n": 7}, nil
	}
	atOnce(func(int) {
		var got struct{ N int }
		if err := c.GetOrSet(ctx, "k", &got, time.Hour, load); err != nil || got.N != 7 {
			t.Errorf("got %v, %v", got, err)
		}
	})
	if loads.Load() != 1 {
		t.Errorf("got %d loads, want 1", loads.Load())
	}
	wantHit(t, c, "k", `{"n":7}`)
	wantTTL(t, c, "k", time.Hour)

	// What does not decode is a miss.
	mustSet(t, c, "k", "no JSON", 0)
	var got struct{ N int }
	if err := c.GetOrSet(ctx, "k", &got, time.Hour, load); err != nil || got.N != 7 || loads.Load() != 2 {
		t.Errorf("got %v, %v after %d loads", got, err, loads.Load())
	}
}

var errLoader = errors.New("nothing to load")

func testFailedLoad(s *suite, t *testing.T) {
	c := s.cache(t)
	for range 2 {
		err := c.GetOrSet(bounded(t), "k", nil, 0, func(context.Context) (any, error) { return nil, errLoader })
		wantError(t, "get or set", err, errLoader)
		wantMiss(t, c, "k")
	}
}

func testPanickingLoad(s *suite, t *testing.T) {
	c := s.cache(t)
	ctx := bounded(t)
	var panics, fails atomic.Int64
	atOnce(func(int) {
		defer func() {
			if recover() != nil {
				panics.Add(1)
			}
		}()
		err := c.GetOrSet(ctx, "k", nil, 0, func(context.Context) (any, error) {
			time.Sleep(50 * time.Millisecond)
			panic("a bug")
		})
		if err == nil {
			t.Error("got no error")
		}
		fails.Add(1)
	})
	// Who comes late loads anew.
	if panics.Load() < 1 || fails.Load() < 1 || panics.Load() > fails.Load() {
		t.Errorf("%d callers saw the panic, %d an error", panics.Load(), fails.Load())
	}
	wantMiss(t, c, "k")
}

func testLoadLoses(s *suite, t *testing.T) {
	c := s.cache(t)
	err := c.GetOrSet(bounded(t), "k", nil, 0, func(ctx context.Context) (any, error) {
		return "loaded", c.Set(ctx, "k", "set", 0)
	})
	if err != nil {
		t.Error(err)
	}
	wantHit(t, c, "k", "set")
	err = c.GetOrSet(bounded(t), "gone", nil, 0, func(ctx context.Context) (any, error) {
		_, err := c.Delete(ctx, "gone")
		return "loaded", err
	})
	if err != nil {
		t.Error(err)
	}
	wantMiss(t, c, "gone")
}

// Of 64 callers on 8 keys, 8 change the source and delete the entry; whoever calls
// then must not get the version before.
func testNothingFromBeforeADelete(s *suite, t *testing.T) {
	c := s.cache(t)
	deletes := 1_000
	if pgtest.Long() {
		deletes = 10_000
	}
	nothingFromBefore(t, 8, 56, deletes, func(ctx context.Context, key string, load func() int64) (got int64, err error) {
		err = c.GetOrSet(ctx, key, &got, time.Minute, func(context.Context) (any, error) { return load(), nil })
		return got, err
	}, func(ctx context.Context, key string) error {
		_, err := c.Delete(ctx, key)
		return err
	})
}

// nothingFromBefore changes the source of each key and removes its entry, again and
// again, beside readers: whoever begins to get it then must not get a version before.
func nothingFromBefore(t *testing.T, keys, readers, removals int, get func(ctx context.Context, key string, load func() int64) (int64, error), remove func(ctx context.Context, key string) error) {
	ctx := t.Context()
	source, removed := make([]atomic.Int64, keys), make([]atomic.Int64, keys)
	var stale atomic.Int64
	read := func(k int) {
		want := removed[k].Load()
		got, err := get(ctx, fmt.Sprint("key", k), source[k].Load)
		if err != nil {
			t.Error(err)
		}
		if got < want {
			stale.Add(1)
		}
	}
	var writing, reading sync.WaitGroup
	done := make(chan struct{})
	for i := range readers {
		reading.Go(func() {
			for n := i; ; n++ {
				select {
				case <-done:
					return
				default:
					read(n % keys)
				}
			}
		})
	}
	for k := range keys {
		writing.Go(func() {
			for range removals / keys {
				version := source[k].Add(1)
				if err := remove(ctx, fmt.Sprint("key", k)); err != nil {
					t.Error(err)
				}
				removed[k].Store(version)
				read(k)
			}
		})
	}
	writing.Wait()
	close(done)
	reading.Wait()
	if n := stale.Load(); n > 0 {
		t.Errorf("%d callers got what was there before the last of %d removals", n, removals)
	}
}

func testLoadersContext(s *suite, t *testing.T) {
	c := s.cache(t)
	ctx, cancel := context.WithCancel(bounded(t))
	ended := make(chan struct{})
	err := c.GetOrSet(ctx, "k", nil, 0, func(loading context.Context) (any, error) {
		cancel()
		<-loading.Done()
		close(ended)
		return nil, loading.Err()
	})
	wantError(t, "get or set", err, context.Canceled)
	select {
	case <-ended:
	case <-time.After(patience):
		t.Error("the loader's context never ended")
	}
}

func testLoadOffline(s *suite, t *testing.T) {
	c, _ := s.offline(t)
	var got string
	err := c.GetOrSet(bounded(t), "k", &got, 0, func(context.Context) (any, error) { return "loaded", nil })
	if err != nil || got != "loaded" {
		t.Errorf("got %q, %v, want what was loaded", got, err)
	}
}
