package main

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/lib/pq"

	"github.com/fastpgcache/fastpgcache"
)

// tour shows the cache to two users, alice and bob.
type tour struct {
	out        io.Writer
	admin      *sql.DB // of who sets up, and owns what the tour creates
	cfg        fastpgcache.Config
	alice, bob *fastpgcache.Cache
	roles      []string
}

// newTour sets the cache up, as a DBA does once, in a schema of its own.
func newTour(ctx context.Context, dsn string, out io.Writer) (t *tour, err error) {
	suffix := strings.ToLower(rand.Text()[:8])
	t = &tour{out: out, cfg: fastpgcache.Config{Schema: "fastpgcache_tour_" + suffix}}
	if t.admin, err = sql.Open("postgres", dsn); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			t.close()
		}
	}()
	if err := fastpgcache.Setup(ctx, t.admin, fastpgcache.SetupConfig{Schema: t.cfg.Schema}); err != nil {
		return nil, err
	}
	if t.alice, err = t.user(ctx, dsn, "alice_"+suffix); err != nil {
		return nil, err
	}
	if t.bob, err = t.user(ctx, dsn, "bob_"+suffix); err != nil {
		return nil, err
	}
	return t, nil
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
	cfg.Runtime["role"] = role
	connector, err := pq.NewConnectorConfig(cfg)
	if err != nil {
		return nil, err
	}
	return fastpgcache.OpenConnector(connector, t.cfg)
}

// close removes what the tour created.
func (t *tour) close() error {
	var err error
	for _, cache := range []*fastpgcache.Cache{t.alice, t.bob} {
		if cache != nil {
			err = errors.Join(err, cache.Close())
		}
	}
	statements := []string{"DROP SCHEMA IF EXISTS " + t.cfg.Schema + " CASCADE"}
	for _, role := range t.roles {
		statements = append(statements, "DROP ROLE "+role)
	}
	for _, statement := range statements {
		_, dropErr := t.admin.Exec(statement)
		err = errors.Join(err, dropErr)
	}
	return errors.Join(err, t.admin.Close())
}

func (t *tour) run(ctx context.Context) error {
	for _, stop := range []struct {
		title string
		show  func(context.Context, *fastpgcache.Cache) error
	}{
		{"A session, for half an hour", t.session},
		{"Values as JSON", t.json},
		{"A batch", t.batch},
		{"Missing keys", t.missing},
		{"Two users", t.isolation},
	} {
		fmt.Fprintf(t.out, "\n%s\n", stop.title)
		if err := stop.show(ctx, t.alice); err != nil {
			return err
		}
	}
	fmt.Fprintln(t.out, "\nThat was the tour.")
	return nil
}

// print writes a line of the tour.
func (t *tour) print(format string, args ...any) { fmt.Fprintf(t.out, "  "+format+"\n", args...) }

func (t *tour) session(ctx context.Context, cache *fastpgcache.Cache) error {
	if err := cache.Set(ctx, "session:42", "user=anna", 30*time.Minute); err != nil {
		return err
	}
	var session string
	found, err := cache.Get(ctx, "session:42", &session)
	if err != nil {
		return err
	}
	t.print("Get: %q, found %t", session, found)

	if _, err := cache.Expire(ctx, "session:42", time.Hour); err != nil {
		return err
	}
	ttl, _, err := cache.TTL(ctx, "session:42")
	if err != nil {
		return err
	}
	t.print("TTL, after Expire gave it an hour: %v", ttl.Round(time.Minute))

	deleted, err := cache.Delete(ctx, "session:42")
	if err != nil {
		return err
	}
	t.print("Delete: %t", deleted)

	// The server's clock decides: an entry is gone when its time is up, removed
	// from the table or not.
	if err := cache.Set(ctx, "blink", "of an eye", time.Millisecond); err != nil {
		return err
	}
	time.Sleep(2 * time.Millisecond)
	if found, err = cache.Exists(ctx, "blink"); err != nil {
		return err
	}
	t.print("Exists, after a TTL of a millisecond: %t", found)
	return nil
}

type profile struct {
	Name  string   `json:"name"`
	Roles []string `json:"roles"`
}

func (t *tour) json(ctx context.Context, cache *fastpgcache.Cache) error {
	err := cache.Set(ctx, "profile:7", profile{Name: "Ben", Roles: []string{"editor", "admin"}}, fastpgcache.NoExpiry)
	if err != nil {
		return err
	}
	var p profile
	if _, err := cache.Get(ctx, "profile:7", &p); err != nil {
		return err
	}
	t.print("Get into a struct: %+v", p)

	var stored string
	if _, err := cache.Get(ctx, "profile:7", &stored); err != nil {
		return err
	}
	t.print("Get into a string: %s", stored)

	// Clients in other languages call the SQL functions.
	err = cache.DB().QueryRowContext(ctx, "SELECT "+t.cfg.Schema+".cache_get(current_user, 'profile:7')").Scan(&stored)
	if err != nil {
		return err
	}
	t.print("cache_get in SQL:  %s", stored)
	return nil
}

func (t *tour) batch(ctx context.Context, cache *fastpgcache.Cache) error {
	prices := map[string]any{}
	for i := range 500 {
		prices[fmt.Sprintf("price:%03d", i)] = 100 + i
	}
	// One statement, all or none.
	if err := cache.SetMany(ctx, prices, time.Hour); err != nil {
		return err
	}
	t.print("SetMany: %d prices", len(prices))

	values, err := cache.GetMany(ctx, []string{"price:001", "price:499", "price:500"})
	if err != nil {
		return err
	}
	for _, key := range slices.Sorted(maps.Keys(values)) {
		var cents int
		if err := values[key].Decode(&cents); err != nil {
			return err
		}
		t.print("GetMany: %s is %d", key, cents)
	}
	t.print("GetMany: price:500 is a miss, and left out")

	deleted, err := cache.DeleteMany(ctx, slices.Collect(maps.Keys(prices)))
	if err != nil {
		return err
	}
	t.print("DeleteMany: %d", deleted)
	return nil
}

func (t *tour) missing(ctx context.Context, cache *fastpgcache.Cache) error {
	greeting := "untouched"
	found, err := cache.Get(ctx, "no such key", &greeting)
	if err != nil {
		return err
	}
	t.print("Get: found %t, no error, and dest is %s", found, greeting)

	// Who can live with answers that are 100 ms old has most misses answered from
	// memory, by a filter of the keys.
	cfg := t.cfg
	cfg.MaxStaleness = 100 * time.Millisecond
	filtered, err := fastpgcache.New(cache.DB(), cfg)
	if err != nil {
		return err
	}
	defer filtered.Close()
	// The first miss has the keys read, in the background.
	for tries := 0; filtered.Stats().FilterAnswers == 0 && tries < 1000; tries++ {
		if _, err := filtered.Get(ctx, "no such key", nil); err != nil {
			return err
		}
	}
	before := filtered.Stats()
	const lookups = 10_000
	for i := range lookups {
		if _, err := filtered.Get(ctx, fmt.Sprint("no such key ", i), nil); err != nil {
			return err
		}
	}
	after := filtered.Stats()
	t.print("%d of them, with a filter: a query for one in a hundred at most, %t", lookups,
		after.Misses-before.Misses == lookups && after.Statements-before.Statements <= lookups/100)
	// What this cache itself writes is never missed.
	if err := filtered.Set(ctx, "no such key", "now there is", time.Minute); err != nil {
		return err
	}
	if found, err = filtered.Get(ctx, "no such key", nil); err != nil {
		return err
	}
	t.print("Get, once that key is set: found %t", found)
	return nil
}

func (t *tour) isolation(ctx context.Context, alice *fastpgcache.Cache) error {
	if err := alice.Set(ctx, "secret", "alice's", 0); err != nil {
		return err
	}
	var secret string
	found, err := t.bob.Get(ctx, "secret", &secret)
	if err != nil {
		return err
	}
	t.print("Bob gets Alice's key:          found %t", found)

	deleted, err := t.bob.Delete(ctx, "secret")
	if err != nil {
		return err
	}
	t.print("Bob deletes it:                %t", deleted)

	var rows int
	if err := t.bob.DB().QueryRowContext(ctx, "SELECT count(*) FROM "+t.cfg.Schema+".cache").Scan(&rows); err != nil {
		return err
	}
	t.print("Bob counts rows in the table:  %d", rows)

	// Bob says that he is Alice. PostgreSQL knows better.
	claim := t.cfg
	claim.User = t.roles[0]
	liar, err := fastpgcache.New(t.bob.DB(), claim)
	if err != nil {
		return err
	}
	defer liar.Close()
	err = liar.Set(ctx, "secret", "bob's", 0)
	t.print("Bob writes under Alice's name: not permitted %t", errors.Is(err, fastpgcache.ErrNotPermitted))

	if err := t.bob.Set(ctx, "secret", "bob's", 0); err != nil {
		return err
	}
	if _, err := alice.Get(ctx, "secret", &secret); err != nil {
		return err
	}
	t.print("Bob sets a key of that name;   Alice still gets %q", secret)
	return nil
}
