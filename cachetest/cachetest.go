// Package cachetest gives tests a cache on a real PostgreSQL:
//
//	func TestSomething(t *testing.T) {
//		cache := cachetest.New(t)
//		…
//	}
//
// The first call of a test binary starts a throwaway server from the programs that are installed
// on this machine (initdb and postgres; root need not be avoided). It ends with the binary, however
// that ends. Where there are none the test fails and says what to install. FASTPGCACHE_TEST_BINDIR
// is the directory of those programs, and FASTPGCACHE_TEST_DSN, a superuser's connection string, a
// running server to use instead.
//
// Each test has a schema and a login of its own, so tests may run in parallel. The login is
// confined to its own entries, as a service's is, and may create tables in the schema, which is its
// search path. Both are dropped when the test ends.
package cachetest

import (
	"context"
	"database/sql"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/lib/pq"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// New returns an empty cache, which is closed when the test ends. Its DB is a pool on the same
// schema. An error of its background work fails the test.
func New(tb testing.TB) *fastpgcache.Cache {
	tb.Helper()
	return NewConfig(tb, fastpgcache.Config{})
}

// NewConfig is New with a configuration, in which Schema is replaced. Where it has an OnError,
// that decides what fails the test.
func NewConfig(tb testing.TB, cfg fastpgcache.Config) *fastpgcache.Cache {
	tb.Helper()
	dsn, schema := DSN(tb)
	cfg.Schema = schema
	var ended atomic.Bool // when tb must not be used any more
	if cfg.OnError == nil {
		cfg.OnError = func(err error) {
			if !ended.Load() {
				tb.Error(err)
			}
		}
	}
	cache, err := fastpgcache.Open(dsn, cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := cache.Close(); err != nil {
			tb.Error(err)
		}
		ended.Store(true)
	})
	return cache
}

// DSN returns the connection string of a login that may use an empty cache in schema, for who
// opens it with another driver, or as another process would:
//
//	dsn, schema := cachetest.DSN(t)
//	db, err := sql.Open("pgx", dsn)
//	…
//	cache, err := fastpgcache.New(db, fastpgcache.Config{Schema: schema})
func DSN(tb testing.TB) (dsn, schema string) {
	tb.Helper()
	admin := pgtest.Shared(tb).DSN("postgres")
	login := pgtest.Role(tb, admin)
	schema = strings.Replace(login, "pgtest", "cachetest", 1)
	db, err := sql.Open("postgres", admin)
	if err != nil {
		tb.Fatal(err)
	}
	if err := fastpgcache.Setup(context.Background(), db, fastpgcache.SetupConfig{Schema: schema, Grantee: login}); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		defer db.Close()
		if _, err := db.Exec(`DROP SCHEMA ` + pq.QuoteIdentifier(schema) + ` CASCADE`); err != nil {
			tb.Error(err)
		}
	})
	if _, err := db.Exec(`GRANT CREATE ON SCHEMA ` + pq.QuoteIdentifier(schema) + ` TO ` + pq.QuoteIdentifier(login)); err != nil {
		tb.Fatal(err)
	}
	return pgtest.WithUser(admin, login) + " search_path=" + schema, schema
}
