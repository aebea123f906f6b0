package main

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/lib/pq"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// tour shows the cache to two users, alice and bob.
type tour struct {
	*screen
	load       time.Duration  // how long each measurement takes
	server     *pgtest.Server // nil: somebody else's
	admin      *sql.DB        // of who sets up, and owns what the tour creates
	schema     string
	aliceRole  string
	alice, bob *fastpgcache.Cache

	roles []string
}

// setUp sets the cache up, as a DBA does once, in a schema of its own.
func (t *tour) setUp(ctx context.Context, dsn string) (err error) {
	suffix := strings.ToLower(rand.Text()[:8])
	t.schema, t.aliceRole = "fastpgcache_tour_"+suffix, "alice_"+suffix
	if t.admin, err = sql.Open("postgres", dsn); err != nil {
		return err
	}
	if err := fastpgcache.Setup(ctx, t.admin, fastpgcache.SetupConfig{Schema: t.schema}); err != nil {
		return err
	}
	if t.alice, err = t.user(ctx, dsn, t.aliceRole); err != nil {
		return err
	}
	if t.bob, err = t.user(ctx, dsn, "bob_"+suffix); err != nil {
		return err
	}
	for _, statement := range []string{
		"CREATE TABLE " + t.schema + ".product (id integer PRIMARY KEY, price numeric)",
		"INSERT INTO " + t.schema + ".product VALUES (7, 19.90)",
		"GRANT SELECT, UPDATE ON " + t.schema + ".product TO " + t.aliceRole,
	} {
		if _, err := t.admin.ExecContext(ctx, statement); err != nil {
			return err
		}
	}
	items := map[string]any{"price:tea": "3.50"}
	for i := range 1000 {
		items[fmt.Sprint("item:", i)] = strings.Repeat("x", 100)
	}
	return t.alice.SetMany(ctx, items, fastpgcache.NoExpiry)
}

// user creates a role and returns the cache as it sees it. A service logs in as
// its role; the tour, which knows no passwords, assumes it at login, and is as
// confined.
func (t *tour) user(ctx context.Context, dsn, role string) (*fastpgcache.Cache, error) {
	if _, err := t.admin.ExecContext(ctx, "CREATE ROLE "+role); err != nil {
		return nil, err
	}
	t.roles = append(t.roles, role)
	if _, err := t.admin.ExecContext(ctx, "GRANT "+role+" TO CURRENT_USER"); err != nil {
		return nil, err
	}
	cfg, err := pq.NewConfig(dsn)
	if err != nil {
		return nil, err
	}
	if cfg.Runtime == nil {
		cfg.Runtime = map[string]string{}
	}
	cfg.Runtime["role"], cfg.Runtime["search_path"] = role, t.schema
	connector, err := pq.NewConnectorConfig(cfg)
	if err != nil {
		return nil, err
	}
	return fastpgcache.OpenConnector(connector, fastpgcache.Config{Schema: t.schema})
}

// close removes what the tour created.
func (t *tour) close() error {
	for _, cache := range []*fastpgcache.Cache{t.alice, t.bob} {
		if cache != nil {
			cache.Close() // its error is that the crash broke connections
		}
	}
	if t.admin == nil {
		return nil
	}
	statements := []string{"DROP SCHEMA IF EXISTS " + t.schema + " CASCADE"}
	for _, role := range t.roles {
		statements = append(statements, "DROP ROLE "+role)
	}
	var err error
	for _, statement := range statements {
		_, dropErr := t.admin.Exec(statement)
		err = errors.Join(err, dropErr)
	}
	return errors.Join(err, t.admin.Close())
}

const next = `
  go get github.com/fastpgcache/fastpgcache
  go run github.com/fastpgcache/fastpgcache/cmd/fastpgcache-admin@latest --host … --database … --grant …

  examples/            a session store, a rate limiter, a cache beside a handler, and more
  docs/operations.md   cleanup, poolers, crash and restart, limits
  docs/local.md        answers from memory, and how to choose MaxStaleness
  go doc -all github.com/fastpgcache/fastpgcache
`

func (t *tour) run(ctx context.Context) error {
	for i, step := range []struct {
		title string
		run   func(context.Context, *fastpgcache.Cache, *tour) error
	}{
		{"Store a session, and get it back", setAndGet},
		{"Everything has a time to live, if you want", ttl},
		{"Many callers at once: calls are merged into fewer statements, by themselves", merged},
		{"What may be a moment old is answered from memory, in every process", local},
		{"Serve the old value while a new one is loaded, or cannot be", refresh},
		{"Change a row and forget its cached value: both, or neither", transaction},
		{"Two users of one table", twoUsers},
		{"A crash", crash},
	} {
		t.title(fmt.Sprintf("%d. %s", i+1, step.title))
		if t.server == nil && i == 7 {
			t.note("Left out: this server is not the tour's to crash.")
			continue
		}
		text, err := source(step.run)
		if err != nil {
			return err
		}
		t.code(text)
		if err := step.run(ctx, t.alice, t); err != nil {
			return err
		}
	}
	t.title("Next")
	_, err := fmt.Fprint(t, next)
	return err
}

// watch shows what a cache does while it is under load, and says it at the end.
func (t *tour) watch(c *fastpgcache.Cache, unmerged bool, load context.Context) {
	what := "Merged: "
	if unmerged {
		what = "A statement for each call: "
	}
	start, before := time.Now(), c.Stats()
	figures := func() string {
		now, took := c.Stats(), time.Since(start).Seconds()
		calls, statements := float64(now.Hits-before.Hits), float64(now.Statements-before.Statements)
		return fmt.Sprintf("%s%s calls a second in %s statements", what, thousands(calls/took), thousands(statements/took))
	}
	for tick := time.NewTicker(100 * time.Millisecond); ; {
		select {
		case <-tick.C:
			t.status("  " + figures())
		case <-load.Done():
			tick.Stop()
			t.status("")
			t.say("%s.", figures())
			return
		}
	}
}

// thousands is a number with its thousands apart.
func thousands(n float64) string {
	text := fmt.Sprint(int(n))
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
