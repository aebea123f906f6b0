package conformance

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/fastpgcache/fastpgcache"
)

func testDeletePrefix(s *suite, t *testing.T) {
	c, ctx := s.cache(t), bounded(t)
	other := s.cache(t)
	mustSet(t, other, "a%1", "v", 0)
	keys := []string{"a%1", "a%", "a%%", "a_1", "a1", "a", "A%1", "ä%1", `a\%1`, "a%\U0010FFFF"}
	items := map[string]any{"a%expired": "v"}
	for _, key := range keys {
		items[key] = "v"
	}
	if err := c.SetMany(ctx, items, 0); err != nil {
		t.Fatal(err)
	}
	s.expire(t, c, "a%expired")
	if n, err := c.DeletePrefix(ctx, "a%"); n != 4 || err != nil {
		t.Errorf("got %d, %v, want 4", n, err)
	}
	for _, key := range keys {
		if strings.HasPrefix(key, "a%") {
			wantMiss(t, c, key)
		} else {
			wantHit(t, c, key, "v")
		}
	}
	wantHit(t, other, "a%1", "v")
	for _, prefix := range []string{"", "\x00", "\xff", strings.Repeat("x", 1025)} {
		_, err := c.DeletePrefix(ctx, prefix)
		wantError(t, "delete prefix", err, fastpgcache.ErrInvalidKey)
	}

	// What is being loaded under it is not stored.
	err := c.GetOrSet(ctx, "a%loading", nil, 0, func(ctx context.Context) (any, error) {
		_, err := c.DeletePrefix(ctx, "a%l")
		return "loaded", err
	})
	if err != nil {
		t.Error(err)
	}
	wantMiss(t, c, "a%loading")
}

func testDeletePrefixAtTheEnd(s *suite, t *testing.T) {
	c, ctx := s.cache(t), bounded(t)
	last := strings.Repeat("\U0010FFFF", 256)
	items := map[string]any{last: 1, "\U0010FFFF": 2, "\U0010FFFE": 3}
	for i := range 2500 {
		items[fmt.Sprint("\U0010FFFF", i)] = i
	}
	if err := c.SetMany(ctx, items, 0); err != nil {
		t.Fatal(err)
	}
	if n, err := c.DeletePrefix(ctx, last); n != 1 || err != nil {
		t.Errorf("the last key: got %d, %v", n, err)
	}
	if n, err := c.DeletePrefix(ctx, "\U0010FFFF"); n != 2501 || err != nil {
		t.Errorf("got %d, %v, want 2501", n, err)
	}
	wantHit(t, c, "\U0010FFFE", "3")
}
