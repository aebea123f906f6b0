package conformance

import (
	"context"
	"database/sql"
	"fmt"
	"strings"
	"testing"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// shardSchemas are the schemas of a suite whose caches are sharded.
var shardSchemas = []string{"shard_0", "shard_1", "shard_2"}

// RunSharded runs the suite over caches of several shards, schemas of one database.
func RunSharded(t *testing.T, d Driver) {
	s := &suite{driver: d, dsn: pgtest.Database(t), schemas: shardSchemas}
	s.admin = openAdmin(t, s.dsn)
	s.setup(t, fastpgcache.SetupConfig{})
	for _, schema := range s.schemas {
		s.setup(t, fastpgcache.SetupConfig{Schema: schema})
	}
	for _, test := range tests() {
		if !test.once && !test.pool {
			t.Run(test.name, func(t *testing.T) { test.run(s, t) })
		}
	}
}

// sharded returns a cache of the suite's shards.
func (s *suite) sharded(t *testing.T, dsn string, change ...func(*fastpgcache.Config)) *fastpgcache.Cache {
	t.Helper()
	db := sql.OpenDB(s.connector(t, dsn))
	db.SetMaxOpenConns(10)
	db.SetMaxIdleConns(10)
	t.Cleanup(func() { db.Close() })
	shards := make(map[string]*fastpgcache.Cache)
	for _, schema := range s.schemas {
		shard, err := fastpgcache.New(db, s.config(append(change, inSchema(schema))...))
		if err != nil {
			t.Fatal(err)
		}
		shards[schema] = shard
	}
	c, err := fastpgcache.NewSharded(shards)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// execer is a *sql.DB or *sql.Tx.
type execer interface {
	ExecContext(context.Context, string, ...any) (sql.Result, error)
}

// each runs a statement in every {schema} that the entries of one cache may be in.
func (s *suite) each(db execer, statement string, args ...any) error {
	for _, schema := range s.schemas {
		if _, err := db.ExecContext(context.Background(), strings.ReplaceAll(statement, "{schema}", schema), args...); err != nil {
			return fmt.Errorf("%s: %w", schema, err)
		}
	}
	return nil
}

// union is a query's rows of every {schema}, as a relation.
func (s *suite) union(query string) string {
	var queries []string
	for _, schema := range s.schemas {
		queries = append(queries, strings.ReplaceAll(query, "{schema}", schema))
	}
	return "(" + strings.Join(queries, " UNION ALL ") + ") u"
}
