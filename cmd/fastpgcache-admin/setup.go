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
	done := &setup{Schema: s.name, Database: o.database, Host: o.host, where: s.where}
	if before.cache {
		if err := s.trust(ctx); err != nil {
			return err
		}
		if done.was, err = s.rights(ctx, before); err != nil {
			return err
		}
	}
	if o.setup.Force && before.cache {
		// What is written between this and the DROP is not counted.
		if err := s.QueryRowContext(ctx, "SELECT count(*) FROM "+s.schema+".cache").Scan(&done.Deleted); err != nil && sqlState(err) != "42501" {
			return err
		}
	}
	if err := fastpgcache.Setup(ctx, s.DB, o.setup); err != nil {
		return err
	}
	switch {
	case before.cache && o.setup.Force:
		done.Result = "recreated"
	case !before.cache:
		done.Result = "created"
	case before.version == want:
		done.Result = "unchanged"
	default:
		done.Result = "upgraded"
	}
	if done.rights, err = s.rights(ctx, table{version: want}); err != nil {
		return err
	}
	return o.tell(out, done)
}

// setup is what a set-up did. It is unchanged where the tables were as they are now; who
// may use them may have changed all the same.
type setup struct {
	Schema   string `json:"schema"`
	Database string `json:"database"`
	Host     string `json:"host,omitempty"`
	Result   string `json:"result"`  // created, unchanged, upgraded, recreated
	Deleted  int64  `json:"deleted"` // entries, by --force
	rights

	was   rights
	where string
}

func (done *setup) print(w io.Writer) {
	switch done.Result {
	case "created":
		fmt.Fprintf(w, "Set up in %s.\n", done.where)
	case "recreated":
		fmt.Fprintf(w, "Set up anew in %s; %s deleted.\n", done.where, count(done.Deleted, "entry was", "entries were"))
	case "unchanged":
		fmt.Fprintf(w, "Already set up in %s; every entry is still there.\n", done.where)
	case "upgraded":
		fmt.Fprintf(w, "Upgraded in %s; every entry is still there.\n", done.where)
	}
	was := done.was.sentences()
	for i, text := range done.sentences() {
		switch was[i] {
		case text:
		case "":
			fmt.Fprintf(w, "%s.\n", text)
		default:
			fmt.Fprintf(w, "%s. (Before: %s.)\n", text, was[i])
		}
	}
}

// table is what bears the name of the cache's table.
type table struct {
	found   bool // some table
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

// old is the error where the table is one of the Python library's.
func (t table) old(o *options) error {
	if t.version > 0 {
		return nil
	}
	return &adviceError{"the table is the Python library's", "Upgrade it, with every entry kept: " + o.setUp()}
}

// versionText says it to people; want is the current one.
func (t table) versionText(want int) string {
	switch t.version {
	case 0:
		return "of the Python library"
	case want:
		return fmt.Sprintf("version %d (current)", t.version)
	}
	return fmt.Sprintf("version %d (current is %d)", t.version, want)
}
