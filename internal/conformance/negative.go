package conformance

import (
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

var negativeTests = []test{
	{name: "misses answered from a filter", run: testFilter, lone: true},
}

// testFilter loads a filter and lets it catch up with another cache's writes.
func testFilter(s *suite, t *testing.T) {
	ctx := t.Context()
	dsn, _ := s.role(t)
	other := s.open(t, dsn)
	c := s.open(t, dsn, func(cfg *fastpgcache.Config) { cfg.MaxStaleness = 10 * time.Millisecond })
	for round := range 3 {
		before := c.Stats().FilterAnswers
		await(t, "the filter answers", func() bool {
			found, err := c.Get(ctx, "missing", nil)
			return !found && err == nil && c.Stats().FilterAnswers > before
		})
		key := string(rune('a' + round))
		if err := other.Set(ctx, key, 1, 0); err != nil {
			t.Fatal(err)
		}
		time.Sleep(11 * time.Millisecond)
		if found, err := c.Get(ctx, key, nil); !found || err != nil {
			t.Errorf("got %v, %v, want another process's key", found, err)
		}
	}
	if stats := c.Stats(); stats.Local.FilterLoads == 0 || stats.Local.CatchUps == 0 || stats.Errors > 0 {
		t.Errorf("got %+v", stats)
	}
}
