//go:build unix

package pgtest

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
)

func TestMain(m *testing.M) {
	if how := os.Getenv("PGTEST_CHILD"); how != "" {
		child(how)
	}
	os.Exit(Main(m))
}

func open(tb testing.TB, dsn string) *sql.DB {
	tb.Helper()
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { db.Close() })
	return db
}

func query[T any](tb testing.TB, db *sql.DB, statement string, args ...any) (v T) {
	tb.Helper()
	if err := db.QueryRow(statement, args...).Scan(&v); err != nil {
		tb.Fatalf("%s: %v", statement, err)
	}
	return v
}

func run(tb testing.TB, db *sql.DB, statements ...string) {
	tb.Helper()
	for _, s := range statements {
		if _, err := db.Exec(s); err != nil {
			tb.Fatalf("%s: %v", s, err)
		}
	}
}

func TestDatabaseIsEmptyAndOfASuperuser(t *testing.T) {
	a, b := open(t, Database(t)), open(t, Database(t))
	run(t, a, `CREATE TABLE t (x int)`)
	run(t, b, `CREATE TABLE t (x int)`)
	if !query[bool](t, b, `SELECT rolsuper FROM pg_roles WHERE rolname = current_user`) {
		t.Error("not a superuser")
	}
}

func TestDatabaseAndRoleAreDropped(t *testing.T) {
	var dsn, role string
	t.Run("use", func(t *testing.T) {
		dsn = Database(t)
		role = Role(t, dsn, "CREATEDB")
		run(t, open(t, dsn), `GRANT CREATE ON SCHEMA public TO `+role)
		// Left open on purpose.
		db, err := sql.Open("postgres", WithUser(dsn, role))
		if err != nil {
			t.Fatal(err)
		}
		run(t, db, `CREATE TABLE t (x int)`)
		if got := query[string](t, db, `SELECT current_user`); got != role {
			t.Errorf("current_user: got %s, want %s", got, role)
		}
	})
	db := open(t, Shared(t).DSN("postgres"))
	_, name, _ := strings.Cut(dsn, "dbname=")
	if n := query[int](t, db, `SELECT count(*) FROM pg_database WHERE datname = $1`, name); n != 0 {
		t.Error("the database is still there")
	}
	if n := query[int](t, db, `SELECT count(*) FROM pg_roles WHERE rolname = $1`, role); n != 0 {
		t.Error("the role is still there")
	}
}

func TestPreparedIsACopyOfItsOwn(t *testing.T) {
	prepared := 0
	dsn := func() string {
		return Prepared(t, func(dsn string) error {
			prepared++
			return execute(dsn, `CREATE TABLE t (x int)`, `INSERT INTO t VALUES (1)`)
		})
	}
	first, second := dsn(), dsn()
	run(t, open(t, first), `DELETE FROM t`)
	if n := query[int](t, open(t, second), `SELECT x FROM t`); n != 1 || prepared != 1 {
		t.Errorf("got %d, prepared %d times", n, prepared)
	}
}

func TestExternalServerIsUsedButNotOwned(t *testing.T) {
	own := Shared(t)
	host, port := own.Addr()
	dsn := fmt.Sprintf("postgres://postgres:p%%40ss%%27w@%s:%d/template1?sslmode=disable&application_name=a%%20b", host, port)
	s, err := external(context.Background(), dsn)
	if err != nil {
		t.Fatal(err)
	}
	if gotHost, gotPort := s.Addr(); gotHost != host || gotPort != port || s.Version() != own.Version() {
		t.Errorf("got %s:%d version %d", gotHost, gotPort, s.Version())
	}
	db := open(t, s.Database(t))
	if got := query[string](t, db, `SELECT current_setting('application_name')`); got != "a b" {
		t.Errorf("application_name: got %q", got)
	}
	ctx := context.Background()
	for _, err := range []error{s.Stop(), s.Restart(ctx), s.Kill(), s.StartAgain(ctx), s.Crash(ctx)} {
		if !errors.Is(err, errNotOwned) {
			t.Errorf("got %v, want %v", err, errNotOwned)
		}
	}
	if s.Owned() || s.DataDir() != "" {
		t.Error("owned")
	}
}

func TestDSNOptionsOverride(t *testing.T) {
	s := Shared(t)
	role := Role(t, s.DSN("postgres"))
	db := open(t, s.DSN("postgres", "user="+role, "dbname=template1"))
	if got := query[string](t, db, `SELECT current_user || ' ' || current_database()`); got != role+" template1" {
		t.Errorf("got %s", got)
	}
}

func TestKeyValueHidesThePasswordOfABadURL(t *testing.T) {
	_, err := keyValue("postgres://u:secret@host:port/")
	if err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("got %v", err)
	}
}
