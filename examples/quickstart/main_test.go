package main

import (
	"bytes"
	"database/sql"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// want is what the steps say, each line a pattern.
var want = []string{
	`found is true: it is anna's session, with 3 things in the cart\.`,
	`Of session 43, found is false and the error <nil>: a miss is no error\.`,
	`Session 42 has another 30m0s to live\.`,
	`What lives for 50 ms is there after 60 ms: false\.`,
	`A statement for each call: [\d,]+ calls a second in [\d,]+ statements\.`,
	`Merged: [\d,]+ calls a second in [\d,]+ statements\.`,
	`A million Gets took \S+, \S+ each, and \d+ statements\.`,
	`The new price was seen after \d+ms\. The promise is 100 ms at most\.`,
	`Product 7 is a teapot\. Nobody had it: this call waited for load\.`,
	`With what it is loaded from down, it still is a teapot, at once and for up to a day\.`,
	`OnError heard: fastpgcache: get or refresh: .*the shop's database is down`,
	`The cached product was there before the commit: true; after it: false\.`,
	`The row and its cache changed together, or neither would have\.`,
	`Bob finds Alice's secret: false\.`,
	`In SQL he counts 0 rows: .*`,
	`If he says that he is Alice: ErrNotPermitted true\.`,
	`PostgreSQL is down: GetOrSet gives "from the source", error <nil>\.`,
	`It is up again, .*: found false\.`,
	`Nothing needs to be done: .* found true\.`,
}

// checkTour compares what was said, and that all code was shown.
func checkTour(t *testing.T, out string, want []string) {
	t.Helper()
	var said []string
	for _, m := range regexp.MustCompile(`(?m)^→ (.*)$`).FindAllStringSubmatch(out, -1) {
		said = append(said, m[1])
	}
	for i := range max(len(want), len(said)) {
		if i >= len(want) || i >= len(said) || !regexp.MustCompile("^"+want[i]+"$").MatchString(said[i]) {
			t.Fatalf("result %d is not as wanted, in:\n%s", i+1, out)
		}
	}
	for _, code := range []string{"    err := sessions.Set(ctx, ", "    // Another process sets another price.\n", "\nNext\n"} {
		if !strings.Contains(out, code) {
			t.Errorf("%q is not in:\n%s", code, out)
		}
	}
	for _, not := range []string{"t.say", "\x1b"} {
		if strings.Contains(out, not) {
			t.Errorf("%q is in:\n%s", not, out)
		}
	}
}

const load = 200 * time.Millisecond

func TestTourOnItsOwnServer(t *testing.T) {
	var out bytes.Buffer
	if err := run(t.Context(), "", load, &screen{Writer: &out}); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(out.String(), "A throwaway PostgreSQL ") {
		t.Errorf("it begins otherwise: %s", out.String())
	}
	checkTour(t, out.String(), want)
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
	if err := run(t.Context(), server.DSN("postgres"), load, &screen{Writer: &out}); err != nil {
		t.Fatal(err)
	}
	checkTour(t, out.String(), want[:len(want)-3])
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

func TestWithoutAServerTheCommandForRootIsSaid(t *testing.T) {
	t.Setenv("FASTPGCACHE_TEST_BINDIR", t.TempDir())
	t.Setenv("FASTPGCACHE_PG_CACHE", t.TempDir())
	t.Setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:1") // nothing is fetched
	err := run(t.Context(), "", load, &screen{Writer: new(bytes.Buffer)})
	if err == nil || !strings.HasPrefix(err.Error(), "no PostgreSQL could be started. As root, run:\n\n  ") {
		t.Errorf("got %v, want what to install", err)
	}
}

func TestColoursChangeNoLetter(t *testing.T) {
	text, err := source(setAndGet)
	if err != nil {
		t.Fatal(err)
	}
	coloured := (&screen{terminal: true}).highlight(text)
	if plain := regexp.MustCompile("\x1b\\[[0-9]*m").ReplaceAllString(coloured, ""); plain != text || coloured == text {
		t.Errorf("got %q\nfor %q", coloured, text)
	}
}
