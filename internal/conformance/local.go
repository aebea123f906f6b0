package conformance

import (
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

var localTests = []test{
	{name: "answers from memory", run: testLocal, lone: true, here: true},
}

// testLocal has hits and misses answered from memory, and another cache's writes seen in
// time, and own ones at once.
func testLocal(s *suite, t *testing.T) {
	ctx := t.Context()
	dsn, _ := s.role(t)
	other := s.open(t, dsn)
	const staleness = 20 * time.Millisecond
	c := s.open(t, dsn, func(cfg *fastpgcache.Config) { cfg.MaxStaleness = staleness })
	get := func(key string) (text string) {
		t.Helper()
		if _, err := c.Get(ctx, key, &text); err != nil {
			t.Fatal(err)
		}
		return text
	}
	want := func(key, want string) {
		t.Helper()
		if got := get(key); got != want {
			t.Errorf("%s: got %q, want %q", key, got, want)
		}
	}
	values := []string{"text", "", "\xff\x00 bytes", "'quotes' and \\"}
	for round, value := range values {
		key := string(rune('a' + round))
		before := c.Stats()
		await(t, "a miss from memory", func() bool {
			want("missing", "")
			return c.Stats().Local.Misses > before.Local.Misses
		})
		want(key, "")
		if err := other.Set(ctx, key, value, time.Hour); err != nil {
			t.Fatal(err)
		}
		time.Sleep(staleness + time.Millisecond)
		want(key, value)
		await(t, "a hit from memory", func() bool {
			want(key, value)
			return c.Stats().Local.Hits > before.Local.Hits
		})
		if ttl, found, err := c.TTL(ctx, key); !found || ttl > time.Hour || ttl < time.Hour-time.Minute || err != nil {
			t.Errorf("TTL: got %v, %v, %v", ttl, found, err)
		}
		if err := c.Set(ctx, key, value+"own", 0); err != nil {
			t.Fatal(err)
		}
		want(key, value+"own")
		if _, err := other.Delete(ctx, key); err != nil {
			t.Fatal(err)
		}
		time.Sleep(staleness + time.Millisecond)
		want(key, "")
	}
	if stats := c.Stats(); stats.Local.CatchUps == 0 || stats.Errors > 0 {
		t.Errorf("got %+v", stats)
	}
}
