package conformance

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

// rememberAbsence has it remembered that key is not there.
func rememberAbsence(t *testing.T, c *fastpgcache.Cache, key string, ttl time.Duration) {
	t.Helper()
	err := c.GetOrSet(bounded(t), key, nil, time.Hour, func(context.Context) (any, error) {
		return nil, fmt.Errorf("no row: %w", fastpgcache.NotFoundFor(ttl))
	})
	wantError(t, "get or set", err, fastpgcache.ErrNotFound)
	if err == nil || !strings.Contains(err.Error(), "no row") {
		t.Errorf("got %v, want what the loader said", err)
	}
}

func testAbsence(s *suite, t *testing.T) {
	dsn, _ := s.role(t)
	c, other, ctx := s.open(t, dsn), s.open(t, dsn), bounded(t)
	mustSet(t, c, "k", "expired", time.Hour)
	s.expire(t, c, "k")
	for _, key := range []string{"k", "new"} {
		rememberAbsence(t, c, key, time.Minute)
		before := other.Stats().Errors
		wantError(t, "get or set", other.GetOrSet(ctx, key, nil, 0, never), fastpgcache.ErrNotFound)
		wantError(t, "get or refresh", other.GetOrRefresh(ctx, key, nil, time.Minute, time.Hour, never), fastpgcache.ErrNotFound)
		got, err := other.GetOrSetMany(ctx, []string{key}, 0, func(context.Context, []string) (map[string]any, error) { return nil, errLoader })
		if err != nil || len(got) > 0 {
			t.Errorf("get or set many: got %v, %v", got, err)
		}
		if other.Stats().Errors != before {
			t.Error("an absence counts as an error")
		}
		wantMiss(t, c, key)
		if found, err := c.Exists(ctx, key); found || err != nil {
			t.Errorf("exists: got %t, %v", found, err)
		}
		if _, found, err := c.TTL(ctx, key); found || err != nil {
			t.Errorf("ttl: got %t, %v", found, err)
		}
		if found, err := c.Expire(ctx, key, time.Hour); found || err != nil {
			t.Errorf("expire: got %t, %v", found, err)
		}
		if _, found, err := c.Take(ctx, "no such"); found || err != nil {
			t.Errorf("take: got %t, %v", found, err)
		}
	}
	for key, err := range c.Keys(ctx, "") {
		t.Errorf("keys: got %q, %v", key, err)
	}
	// It ends.
	rememberAbsence(t, c, "short", 300*time.Millisecond)
	await(t, "the absence ends", func() bool {
		var got string
		err := c.GetOrSet(ctx, "short", &got, 0, func(context.Context) (any, error) { return "now there", nil })
		return err == nil && got == "now there"
	})
	if s.leases(t, c) != 0 {
		t.Error("an absence keeps a lease")
	}
	err := c.GetOrSet(ctx, "bad", nil, 0, func(context.Context) (any, error) { return nil, fastpgcache.NotFoundFor(0) })
	if !errors.Is(err, fastpgcache.ErrNotFound) || !errors.Is(err, fastpgcache.ErrInvalidTTL) {
		t.Errorf("got %v", err)
	}
}

func testAbsenceEnds(s *suite, t *testing.T) {
	dsn, user := s.role(t)
	c, ctx := s.open(t, dsn), bounded(t)
	for name, write := range map[string]func(key string) error{
		"set":         func(key string) error { return c.Set(ctx, key, "there", 0) },
		"set many":    func(key string) error { return c.SetMany(ctx, map[string]any{key: "there", "x": 1}, 0) },
		"add":         func(key string) error { _, err := c.Add(ctx, key, "there", 0); return err },
		"increment":   func(key string) error { _, err := c.Increment(ctx, key, 1, 0); return err },
		"delete":      func(key string) error { _, err := c.Delete(ctx, key); return err },
		"delete many": func(key string) error { _, err := c.DeleteMany(ctx, []string{key, "x"}); return err },
		"take":        func(key string) error { _, _, err := c.Take(ctx, key); return err },
		"prefix":      func(key string) error { _, err := c.DeletePrefix(ctx, key); return err },
		"clear":       func(string) error { _, err := c.Clear(ctx); return err },
		"cache_set": func(key string) error {
			return s.each(s.admin, `SELECT {schema}.cache_set($1, $2, 'there')`, user, key)
		},
		"raw SQL": func(key string) error {
			return s.each(s.admin, `UPDATE {schema}.cache SET value = 'there', expires_at = NULL WHERE user_id = $1 AND key = $2`, user, key)
		},
		"raw DELETE": func(key string) error {
			return s.each(s.admin, `DELETE FROM {schema}.cache WHERE user_id = $1 AND key = $2`, user, key)
		},
	} {
		rememberAbsence(t, c, name, time.Minute)
		if err := write(name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		var got string
		err := c.GetOrSet(ctx, name, &got, 0, func(context.Context) (any, error) { return "there", nil })
		if err != nil || got != "there" && got != "1" {
			t.Errorf("%s: got %q, %v", name, got, err)
		}
	}
}

func testAbsenceCleanup(s *suite, t *testing.T) {
	c := s.cache(t)
	rememberAbsence(t, c, "long", time.Hour)
	rememberAbsence(t, c, "short", time.Millisecond)
	mustSet(t, c, "expired", "v", time.Hour)
	s.expire(t, c, "expired")
	time.Sleep(2 * time.Millisecond)
	if n, err := c.Cleanup(bounded(t)); n != 1 || err != nil {
		t.Errorf("got %d removed, %v, want the entry alone to count", n, err)
	}
	if got := s.rows(t, c, "long") + s.rows(t, c, "short"); got != 1 {
		t.Errorf("%d absences are left, want the longer one", got)
	}
	wantError(t, "get or set", c.GetOrSet(bounded(t), "long", nil, 0, never), fastpgcache.ErrNotFound)
}
