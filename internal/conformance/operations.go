package conformance

import (
	"context"
	"database/sql/driver"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

// operation is one of the cache's, called in a typical way.
type operation struct {
	name  string // as errors give it
	keyed bool   // is about one key
	reads bool   // changes no row
	all   bool   // goes to every shard at once
	walks bool   // removes expired rows, too, and leases by a statement of their own

	// run calls it. For a keyed operation other than a write that stores, found is
	// whether the key was there.
	run    func(ctx context.Context, c *fastpgcache.Cache, key string) (found bool, err error)
	stores bool
}

func operations() []operation {
	type cache = fastpgcache.Cache
	return []operation{
		{name: "set", keyed: true, stores: true, run: func(ctx context.Context, c *cache, key string) (bool, error) {
			return false, c.Set(ctx, key, "set", time.Hour)
		}},
		{name: "get", keyed: true, reads: true, run: func(ctx context.Context, c *cache, key string) (bool, error) {
			var v string
			return c.Get(ctx, key, &v)
		}},
		{name: "ping", all: true, reads: true, run: func(ctx context.Context, c *cache, _ string) (bool, error) {
			return false, c.Ping(ctx)
		}},
		{name: "exists", keyed: true, reads: true, run: func(ctx context.Context, c *cache, key string) (bool, error) {
			return c.Exists(ctx, key)
		}},
		{name: "ttl", keyed: true, reads: true, run: func(ctx context.Context, c *cache, key string) (bool, error) {
			_, found, err := c.TTL(ctx, key)
			return found, err
		}},
		{name: "expire", keyed: true, run: func(ctx context.Context, c *cache, key string) (bool, error) {
			return c.Expire(ctx, key, time.Hour)
		}},
		{name: "persist", keyed: true, run: func(ctx context.Context, c *cache, key string) (bool, error) {
			return c.Persist(ctx, key)
		}},
		{name: "delete", keyed: true, run: func(ctx context.Context, c *cache, key string) (bool, error) {
			return c.Delete(ctx, key)
		}},
		{name: "add", keyed: true, stores: true, run: func(ctx context.Context, c *cache, key string) (bool, error) {
			_, err := c.Add(ctx, key, "added", time.Hour)
			return false, err
		}},
		{name: "increment", keyed: true, stores: true, run: func(ctx context.Context, c *cache, key string) (bool, error) {
			_, err := c.Increment(ctx, key, 1, time.Hour)
			if errors.Is(err, fastpgcache.ErrNotInteger) {
				err = nil // what the others leave there
			}
			return false, err
		}},
		{name: "take", keyed: true, run: func(ctx context.Context, c *cache, key string) (bool, error) {
			_, found, err := c.Take(ctx, key)
			return found, err
		}},
		{name: "set many", keyed: true, stores: true, run: func(ctx context.Context, c *cache, key string) (bool, error) {
			return false, c.SetMany(ctx, map[string]any{key: "set", "more": []byte{0}}, time.Hour)
		}},
		{name: "get many", keyed: true, reads: true, run: func(ctx context.Context, c *cache, key string) (bool, error) {
			values, err := c.GetMany(ctx, []string{key, key})
			return len(values) > 0, err
		}},
		{name: "delete many", keyed: true, run: func(ctx context.Context, c *cache, key string) (bool, error) {
			n, err := c.DeleteMany(ctx, []string{key, key})
			return n > 0, err
		}},
		{name: "delete prefix", keyed: true, all: true, walks: true, run: func(ctx context.Context, c *cache, key string) (bool, error) {
			n, err := c.DeletePrefix(ctx, key)
			return n > 0, err
		}},
		{name: "keys", reads: true, run: func(ctx context.Context, c *cache, _ string) (bool, error) {
			for _, err := range c.Keys(ctx, "no such key") {
				return err == nil, err
			}
			return false, nil
		}},
		{name: "cleanup", all: true, run: func(ctx context.Context, c *cache, _ string) (bool, error) {
			_, err := c.Cleanup(ctx)
			return false, err
		}},
	}
}

// eachOperation runs f for every operation, as a subtest.
func eachOperation(t *testing.T, f func(*testing.T, operation)) {
	t.Helper()
	for _, op := range operations() {
		t.Run(op.name, func(t *testing.T) { f(t, op) })
	}
}

// wantError checks that err is target and has the form of every error of op.
func wantError(t *testing.T, op string, err, target error) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Errorf("%s: got error %v, want one that is %v", op, err, target)
	}
	wantForm(t, op, err)
}

func wantForm(t *testing.T, op string, err error) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: got no error", op)
		return
	}
	const prefix = "fastpgcache: "
	text := err.Error()
	if !strings.HasPrefix(text, prefix+op+": ") || strings.Count(text, prefix) != 1 {
		t.Errorf("%s: got error %q, want %q once, at its head", op, text, prefix+op+": ")
	}
}

// wantState checks the SQLSTATE of err, read as a caller reads it.
func wantState(t *testing.T, op string, err error, want string) {
	t.Helper()
	wantForm(t, op, err)
	var e interface{ SQLState() string }
	if !errors.As(err, &e) {
		t.Errorf("%s: got error %v, want SQLSTATE %s", op, err, want)
	} else if got := e.SQLState(); got != want {
		t.Errorf("%s: got SQLSTATE %s, want %s (%v)", op, got, want, err)
	}
}

// offlineConnector reaches no server.
type offlineConnector struct{ tried atomic.Int64 }

var errOffline = errors.New("no server here")

func (c *offlineConnector) Connect(context.Context) (driver.Conn, error) {
	c.tried.Add(1)
	return nil, errOffline
}

func (c *offlineConnector) Driver() driver.Driver { return nil }
