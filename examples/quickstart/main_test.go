package main

import (
	"bytes"
	"database/sql"
	"strings"
	"testing"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

const want = `
A session, for half an hour
  Get: "user=anna", found true
  TTL, after Expire gave it an hour: 1h0m0s
  Delete: true
  Exists, after a TTL of a millisecond: false

Values as JSON
  Get into a struct: {Name:Ben Roles:[editor admin]}
  Get into a string: {"name":"Ben","roles":["editor","admin"]}
  cache_get in SQL:  {"name":"Ben","roles":["editor","admin"]}

A batch
  SetMany: 500 prices
  GetMany: price:001 is 101
  GetMany: price:499 is 599
  GetMany: price:500 is a miss, and left out
  DeleteMany: 500

Missing keys
  Get: found false, no error, and dest is untouched
  10000 of them, with a filter: a query for one in a hundred at most, true
  Get, once that key is set: found true

Two users
  Bob gets Alice's key:          found false
  Bob deletes it:                false
  Bob counts rows in the table:  0
  Bob writes under Alice's name: not permitted true
  Bob sets a key of that name;   Alice still gets "alice's"

That was the tour.
`

func TestTourOnItsOwnServer(t *testing.T) {
	var out bytes.Buffer
	if err := run(t.Context(), "", &out); err != nil {
		t.Fatal(err)
	}
	start, got, _ := strings.Cut(out.String(), "\n")
	if !strings.HasPrefix(start, "A throwaway PostgreSQL ") || got != want {
		t.Errorf("got:\n%s\nwant:\n%s", out.String(), want)
	}
}

func TestTourLeavesAGivenServerAsItWas(t *testing.T) {
	server := pgtest.Own(t, pgtest.Config{})
	db := open(t, server.DSN("postgres"))
	objects := func() (n int) {
		t.Helper()
		err := db.QueryRow("SELECT (SELECT count(*) FROM pg_class) + (SELECT count(*) FROM pg_roles) + (SELECT count(*) FROM pg_namespace)").Scan(&n)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := objects()
	var out bytes.Buffer
	if err := run(t.Context(), server.DSN("postgres"), &out); err != nil {
		t.Fatal(err)
	}
	if out.String() != want {
		t.Errorf("got:\n%s\nwant:\n%s", out.String(), want)
	}
	if after := objects(); after != before {
		t.Errorf("%d objects before, %d after", before, after)
	}
}

func open(t *testing.T, dsn string) *sql.DB {
	t.Helper()
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func TestNothingToRun(t *testing.T) {
	t.Setenv("FASTPGCACHE_TEST_BINDIR", t.TempDir())
	t.Setenv("HOME", t.TempDir())
	t.Setenv("TMPDIR", t.TempDir())               // the download leaves a log there
	t.Setenv("HTTPS_PROXY", "http://127.0.0.1:1") // nothing is downloaded
	err := run(t.Context(), "", new(bytes.Buffer))
	if err == nil || !strings.HasPrefix(err.Error(), "install PostgreSQL (apt-get install postgresql") || strings.Contains(err.Error(), "\n") {
		t.Errorf("got %v, want a line that says what to install", err)
	}
}
