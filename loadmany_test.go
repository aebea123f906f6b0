package fastpgcache

import (
	"context"
	"fmt"
	"testing"
)

// loadAll is a loader that knows every key.
func loadAll(_ context.Context, missing []string) (map[string]any, error) {
	loaded := make(map[string]any, len(missing))
	for _, key := range missing {
		loaded[key] = "value of " + key
	}
	return loaded, nil
}

func TestGetOrSetManyTakesFourRoundTrips(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	for _, n := range []int{1, 10, 1000} {
		keys := make([]string, n)
		for i := range keys {
			keys[i] = fmt.Sprint(n, "/", i)
		}
		before := c.Stats().Statements
		if got, err := c.GetOrSetMany(ctx, keys, 0, loadAll); err != nil || len(got) != n {
			t.Errorf("got %d values, %v", len(got), err)
		}
		if got := c.Stats().Statements - before; got != 4 {
			t.Errorf("%d missing keys took %d statements, want 4", n, got)
		}
		before = c.Stats().Statements
		if got, err := c.GetOrSetMany(ctx, keys, 0, loadNone); err != nil || len(got) != n {
			t.Errorf("got %d values, %v", len(got), err)
		}
		if got := c.Stats().Statements - before; got != 1 {
			t.Errorf("%d keys that are there took %d statements, want 1", n, got)
		}
	}
}

func loadNone(context.Context, []string) (map[string]any, error) { return nil, errLeftOut }

// Large values go in several statements, and all of them are stored.
func TestGetOrSetManyStoresLargeValues(t *testing.T) {
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	var keys []string
	for i := range 7 {
		keys = append(keys, fmt.Sprint("k", i))
	}
	got, err := c.GetOrSetMany(t.Context(), keys, 0, func(_ context.Context, missing []string) (map[string]any, error) {
		loaded := map[string]any{}
		for i, key := range missing[:6] {
			loaded[key] = make([]byte, i<<20)
		}
		return loaded, nil
	})
	if err != nil || len(got) != 6 || len(got["k5"]) != 5<<20 {
		t.Errorf("got %d values, %v", len(got), err)
	}
	if got := c.Stats().Sets; got != 6 {
		t.Errorf("%d were stored, want 6", got)
	}
	var leases int
	if err := c.DB().QueryRow(`SELECT count(*) FROM cache_lease`).Scan(&leases); err != nil || leases != 0 {
		t.Errorf("got %d leases, %v", leases, err)
	}
}
