package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"
)

// usersShown is how many users status lists, those with the most entries.
const usersShown = 20

// status is what the command tells, as --json prints it.
type status struct {
	Schema     string `json:"schema"`
	Database   string `json:"database"`
	Host       string `json:"host,omitempty"`
	PostgreSQL string `json:"postgresql"`
	Version    int    `json:"version"` // of the schema; 0 is the Python library's
	Current    int    `json:"current_version"`
	Unlogged   bool   `json:"unlogged"`
	Citus      bool   `json:"citus"` // keeps the tables, on one of its nodes
	Owner      string `json:"owner"`
	rights
	Bytes      int64      `json:"bytes"` // tables and indexes
	TableBytes int64      `json:"table_bytes"`
	IndexBytes int64      `json:"index_bytes"`
	FeedBytes  int64      `json:"feed_bytes"`
	FeedRows   int64      `json:"feed_rows"` // about
	Updates    int64      `json:"updates"`
	HOT        int64      `json:"hot_updates"`
	Vacuumed   *time.Time `json:"autovacuum"`
	CleanedUp  *time.Time `json:"last_cleanup"` // by a service's CleanupInterval
	Confined   bool       `json:"confined"`     // to the entries of Role
	Role       string     `json:"role"`
	Dead       int64      `json:"dead"` // rows, about
	users
	Problem string   `json:"problem,omitempty"`
	Hints   []string `json:"hints"`

	where string
	table string // its version, for people
	now   time.Time
	pid   int        // of the session whose transaction keeps dead rows, or 0
	since *time.Time // when that began, if that may be known
}

const healthSQL = `
SELECT current_setting('server_version'), pg_total_relation_size(c.oid), pg_relation_size(c.oid), pg_indexes_size(c.oid),
  coalesce(pg_total_relation_size(f.oid), 0), coalesce(fs.n_live_tup + fs.n_dead_tup, 0),
  coalesce(s.n_tup_upd, 0), coalesce(s.n_tup_hot_upd, 0), coalesce(s.n_dead_tup, 0),
  s.last_autovacuum, row_security_active(c.oid), current_user, statement_timestamp()
FROM pg_class c LEFT JOIN pg_stat_all_tables s ON s.relid = c.oid
LEFT JOIN pg_class f ON f.relnamespace = c.relnamespace AND f.relname = 'cache_change'
LEFT JOIN pg_stat_all_tables fs ON fs.relid = f.oid
WHERE c.oid = $1::regclass`

const cleanedUpSQL = `SELECT max(walked_at) FROM %s.cache_epoch`

// Who may not see what other roles' sessions do sees no backend_xmin.
const oldestTransactionSQL = `
SELECT pid, xact_start FROM pg_stat_activity
WHERE backend_xmin IS NOT NULL AND pid <> pg_backend_pid() AND backend_type = 'client backend' AND datname = current_database()
ORDER BY age(backend_xmin) DESC LIMIT 1`

// runStatus fails where something is wrong, after it has told what it found.
func runStatus(ctx context.Context, o *options, out, _ io.Writer) error {
	want, err := schemaVersion()
	if err != nil {
		return err
	}
	s, t, err := open(ctx, o)
	if err != nil {
		return err
	}
	defer s.Close()
	st, err := s.status(ctx, o, t)
	if err != nil {
		return err
	}
	st.Current, st.table = want, t.versionText(want)
	st.Hints = st.hints(s.schema)
	problem := t.problem(want, s, o)
	if problem != nil {
		st.Problem = problem.Error()
	}
	return errors.Join(o.tell(out, st), problem)
}

func (t table) problem(want int, s *server, o *options) error {
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

// status looks everything up.
func (s *server) status(ctx context.Context, o *options, t table) (*status, error) {
	st := &status{Schema: s.name, Database: o.database, Host: o.host, Version: t.version, Unlogged: t.kind == "u", Owner: t.owner, where: s.where}
	err := s.QueryRowContext(ctx, healthSQL, s.schema+".cache").Scan(&st.PostgreSQL, &st.Bytes, &st.TableBytes, &st.IndexBytes, &st.FeedBytes, &st.FeedRows,
		&st.Updates, &st.HOT, &st.Dead, &st.Vacuumed, &st.Confined, &st.Role, &st.now)
	if err != nil {
		return nil, err
	}
	if st.Citus, err = s.distributed(ctx, s.name); err == nil && st.Citus {
		err = s.citusSizes(ctx, st)
	}
	if err != nil {
		return nil, err
	}
	if st.rights, err = s.rights(ctx, t); err != nil {
		return nil, err
	}
	if t.version > 0 {
		if err := s.QueryRowContext(ctx, fmt.Sprintf(cleanedUpSQL, s.schema)).Scan(&st.CleanedUp); err != nil {
			return nil, err
		}
	}
	if err := s.QueryRowContext(ctx, oldestTransactionSQL).Scan(&st.pid, &st.since); err != nil && !errors.Is(err, sql.ErrNoRows) {
		return nil, err
	}
	st.users, err = s.users(ctx, t, "", byEntries, usersShown)
	return st, err
}

// print tells it to people.
func (st *status) print(out io.Writer) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	defer w.Flush()
	kind := "LOGGED"
	if st.Unlogged {
		kind = "UNLOGGED"
	}
	if st.Citus {
		kind += ", on a node of Citus"
	}
	fmt.Fprintf(w, "cache\t%s, PostgreSQL %s\n", st.where, st.PostgreSQL)
	fmt.Fprintf(w, "table\t%s, %s, owned by %s\n", kind, st.table, st.Owner)
	fmt.Fprintf(w, "grantee\t%s\n", nameList(st.Grantee))
	fmt.Fprintf(w, "service\t%s\n", nameList(st.Service))
	fmt.Fprintf(w, "limit\t%s\n", st.limitText())
	fmt.Fprintf(w, "size\t%s: table %s, indexes %s, long values %s\n", bytes(st.Bytes), bytes(st.TableBytes), bytes(st.IndexBytes),
		bytes(max(0, st.Bytes-st.TableBytes-st.IndexBytes)))
	fmt.Fprintf(w, "feed\t%s, about %s\n", bytes(st.FeedBytes), count(st.FeedRows, "row", "rows"))
	switch {
	case st.Citus: // the node has its statistics
	case st.Updates == 0:
		fmt.Fprintf(w, "updates\tnone\n")
	default:
		fmt.Fprintf(w, "updates\t%d, %.1f %% HOT\n", st.Updates, 100*float64(st.HOT)/float64(st.Updates))
	}
	if !st.Citus {
		fmt.Fprintf(w, "autovacuum\t%s\n", st.ago(st.Vacuumed, "never yet"))
	}
	fmt.Fprintf(w, "cleanup\t%s\n", st.ago(st.CleanedUp, "none yet by a service's CleanupInterval; others are not recorded"))
	fmt.Fprintf(w, "entries\t%s%s\n", st.shares(), seenBy(st.Confined, st.Role))
	if st.Absent > 0 {
		fmt.Fprintf(w, "absences\t%d remembered\n", st.Absent)
	}
	for _, u := range st.Users {
		fmt.Fprintf(w, "  %s\t%d live, %d expired, %s%s\n", printable(u.User), u.Live, u.Expired, bytes(u.Bytes), u.limitText())
	}
	fmt.Fprint(w, st.more())
	w.Flush()
	for _, hint := range st.Hints {
		fmt.Fprintf(w, "hint: %s\n", hint)
	}
}

// shares says what the rows of the table are. Dead ones are of nobody.
func (st *status) shares() string {
	rows := st.Live + st.Expired + st.Absent
	if rows == 0 && (st.Confined || st.Dead == 0) {
		return "none"
	}
	if !st.Confined {
		rows += st.Dead
	}
	text := fmt.Sprintf("%d live (%s), %d expired (%s)", st.Live, share(st.Live, rows), st.Expired, share(st.Expired, rows))
	if !st.Confined {
		text += fmt.Sprintf(", %d dead (%s)", st.Dead, share(st.Dead, rows))
	}
	return text
}

// ago is a time for people.
func (st *status) ago(t *time.Time, never string) string {
	if t == nil {
		return never
	}
	return fmt.Sprintf("%s ago, %s", span(st.now.Sub(*t)), t.Format(time.DateTime+" -07:00"))
}
