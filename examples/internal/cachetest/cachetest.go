// Package cachetest gives each example's test a cache on a throwaway PostgreSQL.
package cachetest

import (
	"database/sql"
	"testing"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
	_ "github.com/lib/pq"
)

// New returns a database that is set up, and a cache over it.
func New(t *testing.T) (*sql.DB, *fastpgcache.Cache) {
	t.Helper()
	db, err := sql.Open("postgres", pgtest.Database(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	if err := fastpgcache.Setup(t.Context(), db, fastpgcache.SetupConfig{}); err != nil {
		t.Fatal(err)
	}
	cache, err := fastpgcache.New(db, fastpgcache.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cache.Close() })
	return db, cache
}
