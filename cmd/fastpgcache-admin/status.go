package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/lib/pq"

	"github.com/fastpgcache/fastpgcache"
)

// usersShown is how many users status lists, those with the most entries.
const usersShown = 20

// status is what the command tells, as --json prints it.
type status struct {
	Schema     string     `json:"schema"`
	Database   string     `json:"database"`
	Host       string     `json:"host,omitempty"`
	PostgreSQL string     `json:"postgresql"`
	Version    int        `json:"version"` // of the schema; 0 is the Python library's
	Current    int        `json:"current_version"`
	Unlogged   bool       `json:"unlogged"`
	Owner      string     `json:"owner"`
	Grantee    []string   `json:"grantee"` // who may use it, each login confined
	Service    []string   `json:"service"` // who may act for any user
	Limits     []limit    `json:"limits"`
	Bytes      int64      `json:"bytes"` // tables and indexes
	TableBytes int64      `json:"table_bytes"`
	IndexBytes int64      `json:"index_bytes"`
	FeedBytes  int64      `json:"feed_bytes"`
	Updates    int64      `json:"updates"`
	HOT        int64      `json:"hot_updates"`
	Vacuumed   *time.Time `json:"autovacuum"`
	Confined   bool       `json:"confined"` // to the entries of Role
	Role       string     `json:"role"`
	Live       int64      `json:"live"`
	Expired    int64      `json:"expired"`
	UserCount  int64      `json:"user_count"`
	Users      []user     `json:"users"` // with the most entries
	Problem    string     `json:"problem,omitempty"`
}

// limit is what the entries of a user may take, or of each user without one of their own.
type limit struct {
	User     string `json:"user"`
	MaxBytes int64  `json:"max_bytes"`
}

type user struct {
	User    string `json:"user"`
	Live    int64  `json:"live"`
	Expired int64  `json:"expired"`
	Bytes   int64  `json:"bytes"` // keys and values of live ones, as they are stored
}

const healthSQL = `
SELECT current_setting('server_version'), pg_total_relation_size(c.oid), pg_relation_size(c.oid), pg_indexes_size(c.oid),
  coalesce(pg_total_relation_size(f.oid), 0),
  coalesce(s.n_tup_upd, 0), coalesce(s.n_tup_hot_upd, 0), s.last_autovacuum, row_security_active(c.oid), current_user
FROM pg_class c LEFT JOIN pg_stat_all_tables s ON s.relid = c.oid
LEFT JOIN pg_class f ON f.relnamespace = c.relnamespace AND f.relname = 'cache_change'
WHERE c.oid = $1::regclass`

const rolesSQL = `
SELECT CASE WHEN r = 0 THEN 'PUBLIC' ELSE r::regrole::text END
FROM pg_policy p, unnest(p.polroles) r WHERE p.polrelid = $1::regclass AND p.polname = $2`

const limitsSQL = `SELECT user_id, max_bytes FROM %s.cache_limit ORDER BY user_id LIMIT 1000`

const entriesSQL = `
SELECT user_id, live, expired, bytes, sum(live) OVER (), sum(expired) OVER (), count(*) OVER ()
FROM (
  SELECT user_id, count(*) FILTER (WHERE expires_at IS NULL OR expires_at > statement_timestamp()) AS live,
    count(*) FILTER (WHERE expires_at <= statement_timestamp() AND expires_at > '-infinity') AS expired,
    coalesce(sum(octet_length(key) + coalesce(pg_column_size(value), 0)%s)
      FILTER (WHERE expires_at IS NULL OR expires_at > statement_timestamp()), 0) AS bytes
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
		return s.elsewhere(ctx)
	}
	if !t.cache {
		return fmt.Errorf("%w, in %s", fastpgcache.ErrForeignTable, s.where)
	}
	if err := s.trust(ctx); err != nil {
		return err
	}
	st, err := s.status(ctx, o, t)
	if err != nil {
		return err
	}
	st.Current = want
	err = t.problem(want, s, o)
	if err != nil {
		st.Problem = err.Error()
	}
	if o.json {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		if failed := e.Encode(st); failed != nil {
			return failed
		}
		return err
	}
	st.print(out, s.where, t.versionText(want))
	return err
}

// elsewhere is the error where there is no cache in the schema: it tells where there is one.
func (s *server) elsewhere(ctx context.Context) error {
	rows, err := s.QueryContext(ctx, `SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relname = 'cache' AND c.relkind = 'r' AND obj_description(c.oid, 'pg_class') LIKE 'fastpgcache schema %' ORDER BY 1 LIMIT 10`)
	if err != nil {
		return err
	}
	schemas, err := texts(rows)
	if err != nil {
		return err
	}
	missing := fmt.Errorf("%w: no table in %s", fastpgcache.ErrNotSetUp, s.where)
	if len(schemas) == 0 {
		return missing
	}
	return &adviceError{missing.Error(), "There is one in schema " + strings.Join(schemas, ", ") + ": --schema " + shellWord(schemas[0])}
}

func texts(rows *sql.Rows) (all []string, err error) {
	defer rows.Close()
	for rows.Next() {
		var text string
		if err := rows.Scan(&text); err != nil {
			return nil, err
		}
		all = append(all, text)
	}
	return all, rows.Err()
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
	st := &status{Schema: s.name, Database: o.database, Host: o.host, Version: t.version, Unlogged: t.kind == "u", Owner: t.owner,
		Grantee: []string{}, Service: []string{}, Limits: []limit{}, Users: []user{}}
	cache := s.schema + ".cache"
	var vacuumed sql.NullTime
	err := s.QueryRowContext(ctx, healthSQL, cache).Scan(&st.PostgreSQL, &st.Bytes, &st.TableBytes, &st.IndexBytes, &st.FeedBytes,
		&st.Updates, &st.HOT, &vacuumed, &st.Confined, &st.Role)
	if err != nil {
		return nil, err
	}
	if vacuumed.Valid {
		st.Vacuumed = &vacuumed.Time
	}
	for policy, roles := range map[string]*[]string{"cache_own_rows": &st.Grantee, "cache_any_rows": &st.Service} {
		rows, err := s.QueryContext(ctx, rolesSQL, cache, policy)
		if err != nil {
			return nil, err
		}
		found, err := texts(rows)
		if err != nil {
			return nil, err
		}
		*roles = append(*roles, found...)
	}
	more := ""
	if t.version > 0 {
		more = " + coalesce(pg_column_size(value_bytes), 0)"
		if err := s.limits(ctx, st); err != nil {
			return nil, err
		}
	}
	rows, err := s.QueryContext(ctx, fmt.Sprintf(entriesSQL, more, s.schema), usersShown)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var u user
		if err := rows.Scan(&u.User, &u.Live, &u.Expired, &u.Bytes, &st.Live, &st.Expired, &st.UserCount); err != nil {
			return nil, err
		}
		st.Users = append(st.Users, u)
	}
	return st, rows.Err()
}

func (s *server) limits(ctx context.Context, st *status) error {
	rows, err := s.QueryContext(ctx, fmt.Sprintf(limitsSQL, s.schema))
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var l limit
		if err := rows.Scan(&l.User, &l.MaxBytes); err != nil {
			return err
		}
		st.Limits = append(st.Limits, l)
	}
	return rows.Err()
}

// print tells it to people.
func (st *status) print(out io.Writer, where, version string) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	defer w.Flush()
	kind := "LOGGED"
	if st.Unlogged {
		kind = "UNLOGGED"
	}
	fmt.Fprintf(w, "cache\t%s, PostgreSQL %s\n", where, st.PostgreSQL)
	fmt.Fprintf(w, "table\t%s, %s, owned by %s\n", kind, version, st.Owner)
	fmt.Fprintf(w, "grantee\t%s\n", nameList(st.Grantee))
	fmt.Fprintf(w, "service\t%s\n", nameList(st.Service))
	fmt.Fprintf(w, "limit\t%s\n", st.limitText())
	fmt.Fprintf(w, "size\t%s: table %s, indexes %s, long values %s; feed %s\n", bytes(st.Bytes), bytes(st.TableBytes), bytes(st.IndexBytes),
		bytes(max(0, st.Bytes-st.TableBytes-st.IndexBytes)), bytes(st.FeedBytes))
	if st.Updates == 0 {
		fmt.Fprintf(w, "updates\tnone\n")
	} else {
		fmt.Fprintf(w, "updates\t%d, %.1f %% HOT\n", st.Updates, 100*float64(st.HOT)/float64(st.Updates))
	}
	if st.Vacuumed != nil {
		fmt.Fprintf(w, "autovacuum\t%s\n", st.Vacuumed.Format(time.DateTime+" -07:00"))
	} else {
		fmt.Fprintf(w, "autovacuum\tnever yet\n")
	}
	note := ""
	if st.Confined {
		note = fmt.Sprintf(" (those that %s may see)", st.Role)
	}
	if st.UserCount == 0 {
		fmt.Fprintf(w, "entries\tnone%s\n", note)
		return
	}
	fmt.Fprintf(w, "entries\t%d live, %d expired%s\n", st.Live, st.Expired, note)
	for _, u := range st.Users {
		fmt.Fprintf(w, "  %s\t%d live, %d expired, %s\n", u.User, u.Live, u.Expired, bytes(u.Bytes))
	}
	if more := st.UserCount - int64(len(st.Users)); more > 0 {
		fmt.Fprintf(w, "  and %s\n", count(more, "user more", "users more"))
	}
}

func nameList(roles []string) string {
	if len(roles) == 0 {
		return "nobody"
	}
	return strings.Join(roles, ", ")
}

// limitText says what the entries of a user may take.
func (st *status) limitText() string {
	text, others := "none", []string{}
	for _, l := range st.Limits {
		if l.User == "" {
			text = bytes(l.MaxBytes) + " a user"
		} else {
			others = append(others, fmt.Sprintf("%s %s", pq.QuoteIdentifier(l.User), bytes(l.MaxBytes)))
		}
	}
	if len(others) > 5 {
		others = append(others[:5], "…")
	}
	return strings.Join(append([]string{text}, others...), ", ")
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
