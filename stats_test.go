package fastpgcache

import (
	"errors"
	"testing"
	"time"
)

func TestStatsCountsWhatWasDone(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{DisableCoalescing: true})
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var want Stats
	step := func(name string, add Stats, err error) {
		t.Helper()
		check(err)
		want.Hits += add.Hits
		want.Misses += add.Misses
		want.Sets += add.Sets
		want.Deletes += add.Deletes
		want.Loads += add.Loads
		want.Statements += add.Statements
		want.Keys += add.Keys
		want.Errors += add.Errors
		got := c.Stats()
		got.Latency = Latency{}
		if got != want {
			t.Errorf("after %s: got %+v, want %+v", name, got, want)
			want = got
		}
	}
	step("nothing", Stats{}, nil)
	step("Set", Stats{Sets: 1, Statements: 1, Keys: 1}, c.Set(ctx, "k", 1, 0))
	_, err := c.Get(ctx, "k", nil)
	step("a hit", Stats{Hits: 1, Statements: 1, Keys: 1}, err)
	_, err = c.Get(ctx, "no", nil)
	step("a miss", Stats{Misses: 1, Statements: 1, Keys: 1}, err)
	_, err = c.Exists(ctx, "k")
	step("Exists", Stats{Hits: 1, Statements: 1, Keys: 1}, err)
	_, _, err = c.TTL(ctx, "no")
	step("TTL", Stats{Misses: 1, Statements: 1, Keys: 1}, err)
	_, err = c.Add(ctx, "k", 1, 0)
	step("Add in vain", Stats{Statements: 1, Keys: 1}, err)
	_, err = c.Add(ctx, "k2", 1, 0)
	step("Add", Stats{Sets: 1, Statements: 1, Keys: 1}, err)
	_, err = c.Increment(ctx, "k2", 1, 0)
	step("Increment", Stats{Sets: 1, Statements: 1, Keys: 1}, err)
	_, _, err = c.Take(ctx, "k2")
	step("Take", Stats{Hits: 1, Deletes: 1, Statements: 1, Keys: 1}, err)
	_, err = c.Delete(ctx, "no")
	step("Delete in vain", Stats{Statements: 1, Keys: 1}, err)
	_, err = c.Delete(ctx, "k")
	step("Delete", Stats{Deletes: 1, Statements: 1, Keys: 1}, err)
	step("GetOrSet", Stats{Misses: 1, Sets: 1, Loads: 1, Statements: 4, Keys: 1}, c.GetOrSet(ctx, "k", nil, 0, returns(1)))
	step("GetOrSet, a hit", Stats{Hits: 1, Statements: 1, Keys: 1}, c.GetOrSet(ctx, "k", nil, 0, returns(1)))
	keysOf(t, c, "")
	step("Keys", Stats{Statements: 1}, nil)
	_, err = c.Clear(ctx)
	step("Clear", Stats{Deletes: 1, Statements: 3}, err)
	if err := c.Set(ctx, "", 1, 0); !errors.Is(err, ErrInvalidKey) {
		t.Error(err)
	}
	step("an error", Stats{Errors: 1}, nil)
	inTx(t, c, false, func(c *Cache) {
		if err := c.Set(ctx, "k", 1, 0); err != nil {
			t.Error(err)
		}
	})
	step("a transaction", Stats{Sets: 1, Statements: 1, Keys: 1}, nil)
	if !c.Stats().LastCleanup.IsZero() {
		t.Error("a cleanup was counted")
	}
	_, err = c.Cleanup(ctx)
	check(err)
	if age := time.Since(c.Stats().LastCleanup); age < 0 || age > time.Minute {
		t.Errorf("the last cleanup was %v ago", age)
	}
}
