package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"

	"github.com/fastpgcache/fastpgcache"
)

// schemaPattern is the comment of a table that is set up.
var schemaPattern = regexp.MustCompile(`fastpgcache schema (\d+)`)

// schemaVersion is what setup makes of a table.
func schemaVersion() (int, error) {
	text, err := fastpgcache.MigrationSQL(fastpgcache.SetupConfig{})
	if err != nil {
		return 0, err
	}
	return versionIn(text), nil
}

// versionIn finds a version in a table's comment, or is 0.
func versionIn(text string) int {
	m := schemaPattern.FindStringSubmatch(text)
	if m == nil {
		return 0
	}
	n, err := strconv.Atoi(m[1])
	if err != nil {
		return 0
	}
	return n
}

func runSetup(ctx context.Context, o *options, out, _ io.Writer) error {
	want, err := schemaVersion()
	if err != nil {
		return err
	}
	s, err := connect(ctx, o)
	if err != nil {
		return err
	}
	defer s.Close()
	before, err := s.table(ctx)
	if err != nil {
		return err
	}
	var was [3]string
	if before.cache {
		if err := s.trust(ctx); err != nil {
			return err
		}
		if was, err = s.rights(ctx); err != nil {
			return err
		}
	}
	var entries int64
	if o.setup.Force && before.cache {
		// What is written between this and the DROP is not counted.
		if err := s.QueryRowContext(ctx, "SELECT count(*) FROM "+s.schema+".cache").Scan(&entries); err != nil && sqlState(err) != "42501" {
			return err
		}
	}
	if err := fastpgcache.Setup(ctx, s.DB, o.setup); err != nil {
		return err
	}
	switch {
	case before.cache && o.setup.Force:
		fmt.Fprintf(out, "Set up anew in %s; %s deleted.\n", s.where, count(entries, "entry was", "entries were"))
	case !before.cache:
		fmt.Fprintf(out, "Set up in %s.\n", s.where)
	case before.version == want:
		fmt.Fprintf(out, "Already set up in %s; every entry is still there.\n", s.where)
	default:
		fmt.Fprintf(out, "Upgraded in %s; every entry is still there.\n", s.where)
	}
	is, err := s.rights(ctx)
	if err != nil {
		return err
	}
	for i, text := range is {
		switch was[i] {
		case text:
		case "":
			fmt.Fprintf(out, "%s.\n", text)
		default:
			fmt.Fprintf(out, "%s. (Before: %s.)\n", text, was[i])
		}
	}
	return nil
}

const rightsSQL = `
SELECT coalesce((SELECT string_agg(CASE WHEN r = 0 THEN 'every role' ELSE 'role ' || r::regrole END, ', ') FROM pg_policy p, unnest(p.polroles) r
    WHERE p.polrelid = c.oid AND p.polname = 'cache_own_rows'), 'nobody but the owner'),
  coalesce((SELECT string_agg('role ' || r::regrole, ', ') FROM pg_policy p, unnest(p.polroles) r
    WHERE p.polrelid = c.oid AND p.polname = 'cache_any_rows'), 'nobody but the owner')
FROM pg_class c WHERE c.oid = to_regclass($1)`

// rights says who may do what, a sentence each; they are empty where there is no cache.
func (s *server) rights(ctx context.Context) (sentences [3]string, err error) {
	var grantee, service string
	err = s.QueryRowContext(ctx, rightsSQL, s.schema+".cache_change").Scan(&grantee, &service)
	if errors.Is(err, sql.ErrNoRows) {
		return sentences, nil
	}
	if err != nil {
		return sentences, err
	}
	sentences[0] = fmt.Sprintf("May use it, each login confined to its own entries: %s", grantee)
	sentences[1] = fmt.Sprintf("May act for any user: %s", service)
	st := &status{}
	if err := s.limits(ctx, st); err != nil {
		return sentences, err
	}
	sentences[2] = "Limit: " + st.limitText()
	return sentences, nil
}

// table is what bears the name of the cache's table.
type table struct {
	found   bool
	cache   bool // made by fastpgcache or by the Python library, for all one can tell
	version int  // 0 for the Python library's
	kind    string
	owner   string
}

const tableSQL = `
SELECT c.relpersistence, c.relowner::regrole, coalesce(obj_description(c.oid, 'pg_class'), ''),
  EXISTS (SELECT FROM pg_attribute WHERE attrelid = c.oid AND attname = 'accessed_at' AND NOT attisdropped)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = $1 AND c.relname = 'cache' AND c.relkind = 'r'`

// table looks the table up; there may be none.
func (s *server) table(ctx context.Context) (t table, err error) {
	var comment string
	var accessedAt bool
	err = s.QueryRowContext(ctx, tableSQL, s.name).Scan(&t.kind, &t.owner, &comment, &accessedAt)
	if errors.Is(err, sql.ErrNoRows) {
		return table{}, nil
	}
	t.found = err == nil
	t.version = versionIn(comment)
	t.cache = t.version > 0 || accessedAt
	return t, err
}

// count is a number with its noun.
func count(n int64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
