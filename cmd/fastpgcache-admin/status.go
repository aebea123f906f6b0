package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

// usersShown is how many users status lists, those with the most entries.
const usersShown = 20

const healthSQL = `
SELECT current_setting('server_version'), pg_total_relation_size(c.oid), pg_relation_size(c.oid), pg_indexes_size(c.oid),
  coalesce(s.n_tup_upd, 0), coalesce(s.n_tup_hot_upd, 0), s.last_autovacuum, row_security_active(c.oid), current_user
FROM pg_class c LEFT JOIN pg_stat_all_tables s ON s.relid = c.oid
WHERE c.oid = $1::regclass`

const entriesSQL = `
SELECT user_id, live, expired, sum(live) OVER (), sum(expired) OVER (), count(*) OVER ()
FROM (
  SELECT user_id, count(*) FILTER (WHERE expires_at IS NULL OR expires_at > statement_timestamp()) AS live,
    count(*) FILTER (WHERE expires_at <= statement_timestamp()) AS expired
  FROM %s.cache GROUP BY user_id) users
ORDER BY live + expired DESC, user_id LIMIT $1`

// runStatus fails where something is wrong, after it has told what it found.
func runStatus(ctx context.Context, o *options, out, _ io.Writer) error {
	want, err := schemaVersion()
	if err != nil {
		return err
	}
	s, err := connect(ctx, o)
	if err != nil {
		return err
	}
	defer s.Close()
	t, err := s.table(ctx)
	if err != nil {
		return err
	}
	if !t.found {
		return fmt.Errorf("%w: no table in %s", fastpgcache.ErrNotSetUp, s.where)
	}
	if !t.cache {
		return fmt.Errorf("%w, in %s", fastpgcache.ErrForeignTable, s.where)
	}

	var version, role string
	var total, heap, indexes, updates, hot int64
	var vacuumed sql.NullTime
	var confined bool
	err = s.QueryRowContext(ctx, healthSQL, s.schema+".cache").
		Scan(&version, &total, &heap, &indexes, &updates, &hot, &vacuumed, &confined, &role)
	if err != nil {
		return err
	}

	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	defer w.Flush()
	fmt.Fprintf(w, "cache\t%s, PostgreSQL %s\n", s.where, version)
	fmt.Fprintf(w, "table\t%s, %s, owned by %s\n", t.persistence(), t.versionText(want), t.owner)
	fmt.Fprintf(w, "size\t%s: table %s, indexes %s, long values %s\n", bytes(total), bytes(heap), bytes(indexes), bytes(max(0, total-heap-indexes)))
	if updates == 0 {
		fmt.Fprintf(w, "updates\tnone\n")
	} else {
		fmt.Fprintf(w, "updates\t%d, %.1f %% HOT\n", updates, 100*float64(hot)/float64(updates))
	}
	if vacuumed.Valid {
		fmt.Fprintf(w, "autovacuum\t%s\n", vacuumed.Time.Format(time.DateTime+" -07:00"))
	} else {
		fmt.Fprintf(w, "autovacuum\tnever yet\n")
	}
	note := ""
	if confined {
		note = fmt.Sprintf(" (those that %s may see)", role)
	}
	if err := s.entries(ctx, w, note); err != nil {
		return err
	}
	switch {
	case t.version > want:
		return errors.New("the table is of a newer fastpgcache: update this command")
	case t.version < want:
		return &adviceError{fmt.Sprintf("the table has version %d, this command %d", t.version, want), "Upgrade it, with every entry kept: " + o.setUp()}
	case t.kind != "u":
		return &adviceError{"the table is not UNLOGGED: each write is slower, and replicas get it", "ALTER TABLE " + s.schema + ".cache SET UNLOGGED;"}
	}
	return nil
}

// entries prints how many there are, in all and per user.
func (s *server) entries(ctx context.Context, w io.Writer, note string) error {
	rows, err := s.QueryContext(ctx, fmt.Sprintf(entriesSQL, s.schema), usersShown)
	if err != nil {
		return err
	}
	defer rows.Close()
	var n, users int64
	for ; rows.Next(); n++ {
		var user string
		var live, expired, allLive, allExpired int64
		if err := rows.Scan(&user, &live, &expired, &allLive, &allExpired, &users); err != nil {
			return err
		}
		if n == 0 {
			fmt.Fprintf(w, "entries\t%d live, %d expired%s\n", allLive, allExpired, note)
		}
		fmt.Fprintf(w, "  %s\t%d live, %d expired\n", user, live, expired)
	}
	if n == 0 {
		fmt.Fprintf(w, "entries\tnone%s\n", note)
	}
	if users > n {
		fmt.Fprintf(w, "  and %s\n", count(users-n, "user more", "users more"))
	}
	return rows.Err()
}

func (t table) persistence() string {
	switch t.kind {
	case "u":
		return "UNLOGGED"
	case "p":
		return "LOGGED"
	}
	return "temporary"
}

func (t table) versionText(want int) string {
	switch t.version {
	case 0:
		return "of the Python library"
	case want:
		return fmt.Sprintf("version %d (current)", t.version)
	}
	return fmt.Sprintf("version %d (current is %d)", t.version, want)
}

// bytes is a size for people.
func bytes(n int64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	value, suffix := float64(n)/unit, 0
	for ; value >= unit && suffix < 3; suffix++ {
		value /= unit
	}
	return fmt.Sprintf("%.1f %ciB", value, "KMGT"[suffix])
}
