// Package conformance is one suite of what a Cache promises, for every database
// driver and every mode that a driver has.
//
// A test is a function of a suite, in one of the lists at the top of its file. It
// takes a cache from [suite.cache]: as a login role of its own, whose entries
// nobody else sees, and, in the crowded variant, under the load of other callers,
// so that what it calls is merged with what they call. What holds for every
// operation is a loop over operations: an operation added there is tested by all of
// these.
package conformance

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/pprof"
	"strings"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
	"github.com/lib/pq"
)

// Driver is a database driver, or a mode of one.
type Driver struct {
	Name string

	// Connect returns a connector for a DSN in libpq's key/value form.
	Connect func(dsn string) (driver.Connector, error)

	// Unprepared says that this is a mode of sending what is not prepared, so that
	// DisablePrepare is all there is to test.
	Unprepared bool
}

// variant is a way to configure the cache.
type variant struct {
	name    string
	cfg     fastpgcache.Config
	callers int  // that use each test's cache beside the test
	once    bool // is hardly a matter of drivers, and so runs over the first only
}

// Callers is how many callers at once the concurrent tests have.
const Callers = 200

func variants(d Driver) []variant {
	unprepared := fastpgcache.Config{DisablePrepare: true}
	if d.Unprepared {
		return []variant{
			{name: "unprepared", cfg: unprepared},
			{name: "crowded", cfg: unprepared, callers: Callers, once: true},
		}
	}
	all := []variant{
		{name: "prepared"},
		{name: "unprepared", cfg: unprepared},
		{name: "crowded", callers: Callers, once: true},
	}
	if d.Name == "pq" { // others have no other statements there
		all = append(all, variant{name: "uncoalesced", cfg: fastpgcache.Config{DisableCoalescing: true}})
	}
	return all
}

// test is one promise.
type test struct {
	name string
	run  func(*suite, *testing.T)

	once bool // no variant could change it: runs in the first only
	lone bool // uses no cache that has a crowd
	here bool // needs triggers, locks and sessions on the server itself, or answers from memory: not for Citus
	pool bool // is about the one pool of a cache that is not sharded
}

func tests() []test {
	var all []test
	for _, list := range [][]test{lifecycleTests, valueTests, expiryTests, errorTests, userTests, txTests, atomicTests, loadTests, loadingTests, localTests, modelTests} {
		all = append(all, list...)
	}
	return all
}

// Run runs the suite over each driver, in each variant, side by side, since much of it
// is waiting.
func Run(t *testing.T, drivers ...Driver) {
	for i, d := range drivers {
		t.Run(d.Name, func(t *testing.T) {
			t.Parallel()
			for j, v := range variants(d) {
				if v.once && i > 0 {
					continue
				}
				t.Run(v.name, func(t *testing.T) {
					t.Parallel()
					s := newSuite(t, d, v)
					for _, test := range tests() {
						if test.once && j > 0 || test.lone && v.callers > 0 {
							continue
						}
						t.Run(test.name, func(t *testing.T) { test.run(s, t) })
					}
				})
			}
		})
	}
	t.Run("restart", func(t *testing.T) {
		t.Parallel()
		testRestart(t, drivers)
	})
}

// suite is what the tests of one driver and variant share.
type suite struct {
	driver  Driver
	cfg     fastpgcache.Config
	callers int
	dsn     string   // of a database that is set up, as superuser
	admin   *sql.DB  // the superuser's, over lib/pq
	schemas []string // where the entries of a cache are: more than one, if it is sharded
}

func newSuite(t *testing.T, d Driver, v variant) *suite {
	t.Helper()
	s := &suite{driver: d, cfg: v.cfg, callers: v.callers, dsn: pgtest.Database(t), schemas: []string{"public"}}
	s.admin = openAdmin(t, s.dsn)
	s.setup(t, fastpgcache.SetupConfig{})
	return s
}

func openAdmin(t *testing.T, dsn string) *sql.DB {
	t.Helper()
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		t.Fatal(err)
	}
	db.SetMaxOpenConns(20)
	t.Cleanup(func() { db.Close() })
	return db
}

func (s *suite) setup(t *testing.T, cfg fastpgcache.SetupConfig) {
	t.Helper()
	cfg.Citus = s.cfg.Citus
	if err := fastpgcache.Setup(bounded(t), s.admin, cfg); err != nil {
		t.Fatal(err)
	}
}

// config is the variant's configuration, as changed.
func (s *suite) config(change ...func(*fastpgcache.Config)) fastpgcache.Config {
	cfg := s.cfg
	for _, f := range change {
		f(&cfg)
	}
	return cfg
}

func inSchema(schema string) func(*fastpgcache.Config) {
	return func(cfg *fastpgcache.Config) { cfg.Schema = schema }
}

func asUser(label string) func(*fastpgcache.Config) {
	return func(cfg *fastpgcache.Config) { cfg.User = label }
}

// role creates a login role and returns the DSN for it and its name. Settings,
// each "name=value", are for its sessions.
func (s *suite) role(t *testing.T, settings ...string) (dsn, name string) {
	t.Helper()
	name = fmt.Sprintf("role_%016x", rand.Uint64())
	s.exec(t, `CREATE ROLE `+name+` LOGIN PASSWORD `+pq.QuoteLiteral(name))
	t.Cleanup(func() { s.exec(t, `DROP ROLE `+name) })
	return strings.Join(append([]string{pgtest.WithUser(s.dsn, name)}, settings...), " "), name
}

// open returns a cache over a pool of its own, closed when the test ends.
func (s *suite) open(t *testing.T, dsn string, change ...func(*fastpgcache.Config)) *fastpgcache.Cache {
	t.Helper()
	var c *fastpgcache.Cache
	if len(s.schemas) > 1 && s.config(change...).Schema == "" {
		c = s.sharded(t, dsn, change...)
	} else {
		var err error
		if c, err = fastpgcache.OpenConnector(s.connector(t, dsn), s.config(change...)); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
			pprof.Lookup("goroutine").WriteTo(t.Output(), 1) // what it waited for
		}
	})
	return c
}

func (s *suite) connector(t *testing.T, dsn string) driver.Connector {
	t.Helper()
	connector, err := s.driver.Connect(dsn)
	if err != nil {
		t.Fatal(err)
	}
	return connector
}

// cache returns a cache of a role of its own, with the variant's crowd on it.
func (s *suite) cache(t *testing.T, change ...func(*fastpgcache.Config)) *fastpgcache.Cache {
	t.Helper()
	dsn, _ := s.role(t)
	c := s.open(t, dsn, change...)
	if s.callers > 0 {
		c.DB().SetMaxOpenConns(4) // fewer, so that more calls meet
	}
	startCrowd(t, c, s.callers)
	return c
}

// offline returns a cache whose server nobody can reach, and how often it tried.
func (s *suite) offline(t *testing.T) (*fastpgcache.Cache, *offlineConnector) {
	t.Helper()
	connector := new(offlineConnector)
	c, err := fastpgcache.OpenConnector(connector, s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, connector
}

// exec runs statements as superuser.
func (s *suite) exec(t *testing.T, statements ...string) {
	t.Helper()
	for _, statement := range statements {
		// Not the test's context, which has ended when its cleanups run.
		_, err := s.admin.Exec(statement)
		for range 5 { // a DROP can meet what a cache does in the background
			if e := (*pq.Error)(nil); !errors.As(err, &e) || e.Code != "40P01" {
				break
			}
			_, err = s.admin.Exec(statement)
		}
		if err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
}

// querier is a *sql.DB, *sql.Conn or *sql.Tx.
type querier interface {
	QueryRowContext(context.Context, string, ...any) *sql.Row
}

// one is the single value of a query.
func one[T any](t *testing.T, db querier, query string, args ...any) (v T) {
	t.Helper()
	if err := db.QueryRowContext(bounded(t), query, args...).Scan(&v); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return v
}

// bounded is the test's context with a limit, so that what hangs fails.
func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// patience is how long anything may take at all.
const patience = 30 * time.Second

// await polls until cond holds.
func await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited %v in vain: %s", patience, what)
		}
	}
}

func mustSet(t *testing.T, c *fastpgcache.Cache, key string, value any, ttl time.Duration) {
	t.Helper()
	if err := c.Set(bounded(t), key, value, ttl); err != nil {
		t.Fatal(err)
	}
}

func wantHit(t *testing.T, c *fastpgcache.Cache, key, want string) {
	t.Helper()
	var got string
	if found, err := c.Get(bounded(t), key, &got); err != nil || !found || got != want {
		t.Errorf("get %.80q: got %.80q, %t, %v, want %.80q", key, got, found, err, want)
	}
}

func wantMiss(t *testing.T, c *fastpgcache.Cache, key string) {
	t.Helper()
	var got string
	if found, err := c.Get(bounded(t), key, &got); err != nil || found {
		t.Errorf("get %.80q: got %.80q, %t, %v, want a miss", key, got, found, err)
	}
}
