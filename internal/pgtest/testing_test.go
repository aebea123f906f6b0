package pgtest

import (
	"database/sql"
	"os"
	"strings"
	"testing"
)

func TestMain(m *testing.M) { os.Exit(Main(m)) }

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
