package fastpgcache

import (
	"context"
	"database/sql"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// setUp returns the DSN of a login role confined to its own entries, in a database
// of the test's own, and that of the superuser.
func setUp(t testing.TB) (dsn, admin string) {
	t.Helper()
	admin = pgtest.Prepared(t, func(dsn string) error {
		db, err := sql.Open("postgres", dsn)
		if err != nil {
			return err
		}
		defer db.Close()
		return Setup(context.Background(), db, SetupConfig{})
	})
	return pgtest.WithUser(admin, pgtest.Role(t, admin)), admin
}

func openDB(t testing.TB, dsn string) *sql.DB {
	t.Helper()
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// openCache returns a cache with a pool of its own, as another process would have it.
// An error of background work fails the test, unless cfg sees to it.
func openCache(t testing.TB, dsn string, cfg Config) *Cache {
	t.Helper()
	if cfg.OnError == nil {
		cfg.OnError = func(err error) { t.Error(err) }
	}
	c, err := Open(dsn, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// eventually polls until cond holds.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// returns is a loader.
func returns(value any) func(context.Context) (any, error) {
	return func(context.Context) (any, error) { return value, nil }
}

// gate is a loader that says when it runs, and returns value once it may.
type gate struct {
	runs  chan context.Context
	value chan any
}

func newGate() gate { return gate{make(chan context.Context, 1), make(chan any, 1)} }

func (g gate) load(ctx context.Context) (any, error) {
	g.runs <- ctx
	return <-g.value, nil
}

// asked is a call of GetOrSet under way.
type asked struct {
	got string
	err error
}

func ask(ctx context.Context, c *Cache, key string, load func(context.Context) (any, error)) <-chan asked {
	answer := make(chan asked, 1)
	go func() {
		var a asked
		a.err = c.GetOrSet(ctx, key, &a.got, time.Minute, load)
		answer <- a
	}()
	return answer
}

func wantAnswer(t *testing.T, answer <-chan asked, want string) {
	t.Helper()
	select {
	case a := <-answer:
		if a.err != nil || a.got != want {
			t.Errorf("get or set: got %q, %v, want %q", a.got, a.err, want)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("get or set: no answer")
	}
}

func wantEntry(t *testing.T, c *Cache, key, want string) {
	t.Helper()
	var got string
	if found, err := c.Get(t.Context(), key, &got); err != nil || !found || got != want {
		t.Errorf("get %q: got %q, %t, %v, want %q", key, got, found, err, want)
	}
}

func wantNoEntry(t *testing.T, c *Cache, key string) {
	t.Helper()
	var got string
	if found, err := c.Get(t.Context(), key, &got); err != nil || found {
		t.Errorf("get %q: got %q, %t, %v, want a miss", key, got, found, err)
	}
}

// execAdmin runs a statement as superuser.
func execAdmin(t *testing.T, admin, statement string, args ...any) {
	t.Helper()
	if _, err := openDB(t, admin).Exec(statement, args...); err != nil {
		t.Fatal(err)
	}
}

func waiting(c *Cache, key string) int {
	c.loads.one.mu.Lock()
	defer c.loads.one.mu.Unlock()
	if l := c.loads.one.legs[key]; l != nil {
		return l.flight.seats
	}
	return 0
}
