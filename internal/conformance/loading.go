package conformance

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

var loadingTests = []test{
	{name: "AStaleEntryIsServedWhileOneCallerRefreshesIt", run: testRefresh},
	{name: "AFailedRefreshKeepsTheEntry", run: testFailedRefresh},
	{name: "ASetOrDeleteDuringARefreshWins", run: testRefreshLoses},
	{name: "WhoWaitsNeverGetsARefreshsError", run: testRefreshsError},
	{name: "ARefreshEndsWithTheEntry", run: testRefreshEnds},
	{name: "AnAbsenceIsRememberedByAll", run: testAbsence},
	{name: "AnyWriteEndsARememberedAbsence", run: testAbsenceEnds},
	{name: "CleanupLeavesAnAbsenceUntilItsEnd", run: testAbsenceCleanup, lone: true},
	{name: "GetOrSetManyLoadsWhatIsMissing", run: testLoadMany},
	{name: "GetOrSetManyReturnsWhatWasFoundWithTheError", run: testLoadManyFails},
	{name: "ManyCallersOfOverlappingKeysLoadEachOnce", run: testLoadManyOverlapping},
	{name: "GetOrSetManyTakesOverWhatTheDeadWereLoading", run: testLoadManyTakesOver, lone: true},
	{name: "DeletePrefixRemovesThosePrefixedAlone", run: testDeletePrefix},
	{name: "DeletePrefixGoesToTheEndOfTheKeys", run: testDeletePrefixAtTheEnd},
	{name: "LoadingInATransaction", run: testLoadingInTx},
	{name: "NoFormOfLoadingGivesWhatWasDeleted", run: testNoFormGivesWhatWasDeleted, once: true},
	{name: "TypedHoldsValuesOfOneType", run: testTyped},
}

// loads returns a loader of value, and how often it ran.
func loads(value any) (func(context.Context) (any, error), *atomic.Int64) {
	var n atomic.Int64
	return func(context.Context) (any, error) {
		n.Add(1)
		return value, nil
	}, &n
}

func never(context.Context) (any, error) { return nil, errors.New("there was nothing to load") }

func wantValues(t *testing.T, got map[string]fastpgcache.Value, err error, want map[string]string) {
	t.Helper()
	have := map[string]string{}
	for k, v := range got {
		have[k] = v.String()
	}
	if err != nil || !maps.Equal(have, want) {
		t.Errorf("got %v, %v, want %v", have, err, want)
	}
}

func testLoadMany(s *suite, t *testing.T) {
	c, ctx := s.cache(t), bounded(t)
	mustSet(t, c, "there", "entry", 0)
	mustSet(t, c, "gone", "expired", time.Hour)
	s.expire(t, c, "gone")
	keys := []string{"z", "gone", "there", "a", "z", "unknown"}
	got, err := c.GetOrSetMany(ctx, keys, time.Hour, func(_ context.Context, missing []string) (map[string]any, error) {
		if want := []string{"z", "gone", "a", "unknown"}; !slices.Equal(missing, want) {
			t.Errorf("load got %q, want %q", missing, want)
		}
		return map[string]any{"a": 1, "z": []byte{0xff, 0}, "gone": "loaded", "not asked for": "x"}, nil
	})
	want := map[string]string{"there": "entry", "a": "1", "z": "\xff\x00", "gone": "loaded"}
	wantValues(t, got, err, want)
	wantTTL(t, c, "a", time.Hour)
	wantMiss(t, c, "unknown")
	wantMiss(t, c, "not asked for")

	// Now they are there; what was left out is to be loaded again, and may be remembered.
	for range 2 {
		asked := 0
		got, err = c.GetOrSetMany(ctx, keys, time.Hour, func(_ context.Context, missing []string) (map[string]any, error) {
			asked++
			if !slices.Equal(missing, []string{"unknown"}) {
				t.Errorf("load got %q", missing)
			}
			return nil, nil
		})
		wantValues(t, got, err, want)
		if asked != 1 {
			t.Errorf("loaded %d times", asked)
		}
	}
	for _, load := range []func(context.Context, []string) (map[string]any, error){
		func(context.Context, []string) (map[string]any, error) {
			return map[string]any{"b": "loaded"}, fastpgcache.NotFoundFor(time.Minute)
		},
		func(context.Context, []string) (map[string]any, error) { return nil, errLoader },
	} {
		got, err = c.GetOrSetMany(ctx, []string{"unknown", "b"}, 0, load)
		wantValues(t, got, err, map[string]string{"b": "loaded"})
	}
	got, err = c.GetOrSetMany(ctx, nil, 0, func(context.Context, []string) (map[string]any, error) { return nil, errLoader })
	wantValues(t, got, err, map[string]string{})

	// More than a statement takes.
	var many []string
	for i := range 2500 {
		many = append(many, fmt.Sprint("many", i))
	}
	got, err = c.GetOrSetMany(ctx, many, 0, func(_ context.Context, missing []string) (map[string]any, error) {
		loaded := map[string]any{}
		for _, key := range missing {
			loaded[key] = strings.ToUpper(key)
		}
		return loaded, nil
	})
	if err != nil || len(got) != len(many) || got["many2499"].String() != "MANY2499" {
		t.Errorf("got %d values, %v", len(got), err)
	}
}

func testLoadManyFails(s *suite, t *testing.T) {
	c, ctx := s.cache(t), bounded(t)
	mustSet(t, c, "there", "entry", 0)
	keys := []string{"there", "missing", "other"}
	got, err := c.GetOrSetMany(ctx, keys, 0, func(context.Context, []string) (map[string]any, error) {
		return map[string]any{"missing": "half"}, errLoader
	})
	wantError(t, "get or set many", err, errLoader)
	wantValues(t, got, nil, map[string]string{"there": "entry"})
	got, err = c.GetOrSetMany(ctx, keys, 0, func(context.Context, []string) (map[string]any, error) {
		return map[string]any{"missing": "good", "other": make(chan int)}, nil
	})
	wantForm(t, "get or set many", err)
	wantValues(t, got, nil, map[string]string{"there": "entry"})
	wantMiss(t, c, "missing")
	if s.leases(t, c) != 0 {
		t.Error("a lease is left")
	}
	_, err = c.GetOrSetMany(ctx, []string{"good", ""}, 0, func(context.Context, []string) (map[string]any, error) { return nil, nil })
	wantError(t, "get or set many", err, fastpgcache.ErrInvalidKey)
	_, err = c.GetOrSetMany(ctx, keys, -7, func(context.Context, []string) (map[string]any, error) { return nil, nil })
	wantError(t, "get or set many", err, fastpgcache.ErrInvalidTTL)
	_, err = c.GetOrSetMany(ctx, keys, 0, nil)
	wantForm(t, "get or set many", err)

	// Over a database that is not there it loads nonetheless.
	offline, _ := s.offline(t)
	got, err = offline.GetOrSetMany(ctx, keys, 0, func(_ context.Context, missing []string) (map[string]any, error) {
		return map[string]any{"missing": fmt.Sprint(missing)}, nil
	})
	wantValues(t, got, err, map[string]string{"missing": "[there missing other]"})
}

// 24 callers of two processes, each on a third of the keys in an order of its own.
func testLoadManyOverlapping(s *suite, t *testing.T) {
	dsn, _ := s.role(t)
	caches := []*fastpgcache.Cache{s.open(t, dsn), s.open(t, dsn)}
	ctx := bounded(t)
	const keys = 60
	var loads [keys]atomic.Int64
	var wg sync.WaitGroup
	for i := range 24 {
		wg.Go(func() {
			var asked []string
			for j := range keys / 3 {
				k := (i*7 + j*(1+i%5)*11) % keys
				asked = append(asked, fmt.Sprint(k))
			}
			got, err := caches[i%2].GetOrSetMany(ctx, asked, time.Hour, func(_ context.Context, missing []string) (map[string]any, error) {
				loaded := map[string]any{}
				for _, key := range missing {
					var k int
					fmt.Sscan(key, &k)
					loads[k].Add(1)
					loaded[key] = "value of " + key
				}
				time.Sleep(20 * time.Millisecond)
				return loaded, nil
			})
			if err != nil {
				t.Error(err)
			}
			for _, key := range asked {
				if got[key].String() != "value of "+key {
					t.Errorf("%s: got %q", key, got[key])
				}
			}
		})
	}
	wg.Wait()
	for k := range loads {
		if n := loads[k].Load(); n > 1 {
			t.Errorf("key %d was loaded %d times", k, n)
		}
	}
}

func testLoadManyTakesOver(s *suite, t *testing.T) {
	dsn, user := s.role(t)
	c := s.open(t, dsn)
	if err := s.each(s.admin, `INSERT INTO {schema}.cache_lease (user_id, key, holder, expires_at) VALUES
		($1, 'dying', 'dead', now() + interval '1 second'), ($1, 'future', 'dead', now() + interval '1 day')`, user); err != nil {
		t.Fatal(err)
	}
	var asked [][]string
	got, err := c.GetOrSetMany(bounded(t), []string{"dying", "own", "future"}, 0, func(_ context.Context, missing []string) (map[string]any, error) {
		asked = append(asked, missing)
		loaded := map[string]any{}
		for _, key := range missing {
			loaded[key] = "loaded " + key
		}
		return loaded, nil
	})
	wantValues(t, got, err, map[string]string{"dying": "loaded dying", "own": "loaded own", "future": "loaded future"})
	if want := "[[own future] [dying]]"; fmt.Sprint(asked) != want {
		t.Errorf("loaded %v, want %v", asked, want)
	}
}

func testLoadingInTx(s *suite, t *testing.T) {
	c, ctx := s.cache(t), bounded(t)
	mustSet(t, c, "there", "old", time.Minute)
	mustSet(t, c, "p:1", "v", 0)
	tx, in := begin(t, c)
	load, n := loads("loaded")
	var got string
	// It refreshes nothing, since there is nobody to do it in the background.
	if err := in.GetOrRefresh(ctx, "there", &got, time.Second, time.Hour, load); err != nil || got != "old" || n.Load() != 0 {
		t.Errorf("got %q, %v, and %d loads", got, err, n.Load())
	}
	if err := in.GetOrRefresh(ctx, "one", &got, time.Second, time.Hour, load); err != nil || got != "loaded" || n.Load() != 1 {
		t.Errorf("got %q, %v, and %d loads", got, err, n.Load())
	}
	values, err := in.GetOrSetMany(ctx, []string{"there", "one", "two", "no", "p:1"}, 0, func(_ context.Context, missing []string) (map[string]any, error) {
		return map[string]any{"two": fmt.Sprint(missing)}, fastpgcache.NotFoundFor(time.Minute)
	})
	want := map[string]string{"there": "old", "one": "loaded", "two": "[two no]", "p:1": "v"}
	wantValues(t, values, err, want)
	rememberAbsence(t, in, "none", time.Minute)
	for _, key := range []string{"no", "none"} {
		wantError(t, "get or set", in.GetOrSet(ctx, key, nil, 0, never), fastpgcache.ErrNotFound)
	}
	if n, err := in.DeletePrefix(ctx, "p:"); n != 1 || err != nil {
		t.Errorf("delete prefix: got %d, %v", n, err)
	}
	wantMiss(t, c, "one")
	wantHit(t, c, "p:1", "v")
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	wantHit(t, c, "one", "loaded")
	wantHit(t, c, "two", "[two no]")
	wantMiss(t, c, "p:1")
	wantError(t, "get or set", c.GetOrSet(ctx, "none", nil, 0, never), fastpgcache.ErrNotFound)
	if s.leases(t, c) != 0 {
		t.Error("a lease is left")
	}
}

// As testNothingFromBeforeADelete, by every form.
func testNoFormGivesWhatWasDeleted(s *suite, t *testing.T) {
	dsn, _ := s.role(t)
	c, other := s.open(t, dsn), s.open(t, dsn)
	typed := fastpgcache.NewTyped[int64](c, "")
	forms := map[string]func(ctx context.Context, key string, load func() int64) (int64, error){
		"GetOrRefresh": func(ctx context.Context, key string, load func() int64) (got int64, err error) {
			// Stale at once: refreshes go on all the time.
			err = c.GetOrRefresh(ctx, key, &got, time.Microsecond, time.Minute, func(context.Context) (any, error) { return load(), nil })
			return got, err
		},
		"GetOrSetMany": func(ctx context.Context, key string, load func() int64) (got int64, err error) {
			values, err := c.GetOrSetMany(ctx, []string{key, "x" + key}, time.Minute, func(_ context.Context, missing []string) (map[string]any, error) {
				v := load()
				return map[string]any{key: v, "x" + key: v}, nil
			})
			if err == nil {
				err = values[key].Decode(&got)
			}
			return got, err
		},
		"Typed": func(ctx context.Context, key string, load func() int64) (int64, error) {
			return typed.GetOrSet(ctx, key, time.Minute, func(context.Context) (int64, error) { return load(), nil })
		},
	}
	removals := map[string]func(ctx context.Context, key string) error{
		"Delete":           func(ctx context.Context, key string) error { _, err := c.Delete(ctx, key); return err },
		"another's Delete": func(ctx context.Context, key string) error { _, err := other.Delete(ctx, key); return err },
		"another's DeleteMany": func(ctx context.Context, key string) error {
			_, err := other.DeleteMany(ctx, []string{key, "x" + key})
			return err
		},
		"DeletePrefix": func(ctx context.Context, key string) error { _, err := c.DeletePrefix(ctx, key); return err },
	}
	deletes := 60
	if pgtest.Long() {
		deletes = 200
	}
	for form, get := range forms {
		for how, remove := range removals {
			t.Run(form+" after "+how, func(t *testing.T) { nothingFromBefore(t, 4, 24, deletes, get, remove) })
		}
	}
}

func testTyped(s *suite, t *testing.T) {
	c, ctx := s.cache(t), bounded(t)
	points := fastpgcache.NewTyped[point](c, "point:v1:")
	texts := fastpgcache.NewTyped[string](c, "text:")
	blobs := fastpgcache.NewTyped[[]byte](c, "blob:")
	mustSet(t, c, "1", "outside", 0)

	p := point{1, 2}
	if err := points.Set(ctx, "1", p, time.Hour); err != nil {
		t.Fatal(err)
	}
	if got, found, err := points.Get(ctx, "1"); got != p || !found || err != nil {
		t.Errorf("get: got %v, %t, %v", got, found, err)
	}
	if got, found, err := points.Get(ctx, "2"); got != (point{}) || found || err != nil {
		t.Errorf("get: got %v, %t, %v", got, found, err)
	}
	wantHit(t, c, "point:v1:1", `{"X":1,"Y":2}`)
	if added, err := points.Add(ctx, "1", p, 0); added || err != nil {
		t.Errorf("add: got %t, %v", added, err)
	}
	if err := points.SetMany(ctx, map[string]point{"2": {2, 2}, "3": {3, 3}}, 0); err != nil {
		t.Error(err)
	}
	if got, err := points.GetMany(ctx, []string{"1", "3", "4"}); err != nil || !maps.Equal(got, map[string]point{"1": p, "3": {3, 3}}) {
		t.Errorf("get many: got %v, %v", got, err)
	}
	var keys []string
	for key, err := range points.Keys(ctx, "") {
		if err != nil {
			t.Error(err)
		}
		keys = append(keys, key)
	}
	if !slices.Equal(keys, []string{"1", "2", "3"}) {
		t.Errorf("keys: got %q", keys)
	}
	if got, found, err := points.Take(ctx, "2"); got != (point{2, 2}) || !found || err != nil {
		t.Errorf("take: got %v, %t, %v", got, found, err)
	}
	if deleted, err := points.Delete(ctx, "2"); deleted || err != nil {
		t.Errorf("delete: got %t, %v", deleted, err)
	}
	load := func(context.Context) (point, error) { return point{4, 4}, nil }
	if got, err := points.GetOrSet(ctx, "4", 0, load); got != (point{4, 4}) || err != nil {
		t.Errorf("get or set: got %v, %v", got, err)
	}
	if got, err := points.GetOrRefresh(ctx, "5", time.Second, time.Hour, load); got != (point{4, 4}) || err != nil {
		t.Errorf("get or refresh: got %v, %v", got, err)
	}
	_, err := points.GetOrSet(ctx, "none", 0, func(context.Context) (point, error) { return point{}, fastpgcache.NotFoundFor(time.Minute) })
	wantError(t, "get or set", err, fastpgcache.ErrNotFound)

	// What does not decode is loaded anew, or an error.
	mustSet(t, c, "point:v1:broken", "no point", 0)
	if _, err := points.GetMany(ctx, []string{"1", "broken"}); err == nil || !strings.Contains(err.Error(), `"point:v1:broken"`) {
		t.Errorf("got %v, want the key", err)
	}
	got, err := points.GetOrSetMany(ctx, []string{"1", "broken", "6", "none"}, 0, func(_ context.Context, missing []string) (map[string]point, error) {
		if !slices.Equal(missing, []string{"broken", "6"}) {
			t.Errorf("load got %q", missing)
		}
		return map[string]point{"broken": {7, 7}, "6": {6, 6}}, nil
	})
	if err != nil || !maps.Equal(got, map[string]point{"1": p, "broken": {7, 7}, "6": {6, 6}}) {
		t.Errorf("get or set many: got %v, %v", got, err)
	}

	// Strings and bytes are stored as they are.
	if err := errors.Join(texts.Set(ctx, "k", "\xff\x00", 0), blobs.Set(ctx, "k", []byte("\xff\x00"), 0)); err != nil {
		t.Error(err)
	}
	wantHit(t, c, "text:k", "\xff\x00")
	wantHit(t, c, "blob:k", "\xff\x00")
	if got, _, err := texts.Get(ctx, "k"); got != "\xff\x00" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	if got, _, err := blobs.Get(ctx, "k"); string(got) != "\xff\x00" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}

	tx, _ := begin(t, c)
	if err := points.WithTx(tx).Set(ctx, "tx", p, 0); err != nil {
		t.Error(err)
	}
	if err := tx.Rollback(); err != nil {
		t.Error(err)
	}
	if _, found, err := points.Get(ctx, "tx"); found || err != nil {
		t.Errorf("after the rollback: got %t, %v", found, err)
	}
	if n, err := points.Clear(ctx); n != 6 || err != nil {
		t.Errorf("clear: got %d, %v, want 6", n, err)
	}
	wantHit(t, c, "1", "outside")
	wantHit(t, c, "text:k", "\xff\x00")
	wantError(t, "get", func() error { _, _, err := fastpgcache.NewTyped[int](c, "\x00").Get(ctx, "k"); return err }(), fastpgcache.ErrInvalidKey)
}
