package cachetest_test

import (
	"context"
	"database/sql"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	_ "github.com/lib/pq"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/cachetest"
)

// There is no TestMain: none is needed.

func TestTwoCachesShareNothing(t *testing.T) {
	t.Parallel()
	a, b := cachetest.New(t), cachetest.New(t)
	if err := a.Set(t.Context(), "k", "a", 0); err != nil {
		t.Fatal(err)
	}
	if found, err := a.Get(t.Context(), "k", nil); !found || err != nil {
		t.Errorf("got %t, %v, want the entry", found, err)
	}
	if found, err := b.Get(t.Context(), "k", nil); found || err != nil {
		t.Errorf("got %t, %v, want nothing", found, err)
	}
}

func TestTheLoginIsConfinedAndMayHaveTables(t *testing.T) {
	t.Parallel()
	cache := cachetest.New(t)
	if err := cache.Ping(t.Context()); err != nil {
		t.Error(err)
	}
	var super bool
	if err := cache.DB().QueryRow(`SELECT rolsuper FROM pg_roles WHERE rolname = current_user`).Scan(&super); super || err != nil {
		t.Errorf("superuser: %t, %v", super, err)
	}
	if _, err := cache.DB().Exec(`CREATE TABLE product (id bigint)`); err != nil {
		t.Error(err)
	}
}

func TestConfigAndDSN(t *testing.T) {
	t.Parallel()
	cache := cachetest.NewConfig(t, fastpgcache.Config{MaxStaleness: time.Minute})
	if err := cache.Set(t.Context(), "k", 1, 0); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); cache.Stats().Local.Hits == 0; time.Sleep(time.Millisecond) {
		if _, err := cache.Get(t.Context(), "k", nil); err != nil || time.Now().After(deadline) {
			t.Fatal("MaxStaleness did nothing", err)
		}
	}

	dsn, schema := cachetest.DSN(t)
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	another, err := fastpgcache.New(db, fastpgcache.Config{Schema: schema})
	if err != nil {
		t.Fatal(err)
	}
	defer another.Close()
	if err := another.Set(t.Context(), "k", 1, 0); err != nil {
		t.Error(err)
	}
}

// recorder is a test that goes on after an error.
type recorder struct {
	testing.TB
	errors   []any
	cleanups []func()
}

func (r *recorder) Error(args ...any) { r.errors = append(r.errors, args...) }
func (r *recorder) Cleanup(f func())  { r.cleanups = append(r.cleanups, f) }

func TestWhatGetOrSetGoesOnWithoutFailsTheTest(t *testing.T) {
	t.Parallel()
	tb := &recorder{TB: t}
	cache := cachetest.New(tb)
	cache.DB().Close()
	var got string
	err := cache.GetOrSet(t.Context(), "k", &got, 0, func(context.Context) (any, error) { return "loaded", nil })
	if err != nil || got != "loaded" {
		t.Errorf("got %q, %v, want what was loaded", got, err)
	}
	for _, f := range slices.Backward(tb.cleanups) {
		f()
	}
	if len(tb.errors) == 0 {
		t.Error("the test did not fail")
	}
}

func TestWithoutPostgreSQLATestFailsAndIsNotSkipped(t *testing.T) {
	if os.Getenv("CACHETEST_CHILD") != "" {
		cachetest.New(t)
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run", t.Name(), "-test.v")
	cmd.Env = append(os.Environ(), "CACHETEST_CHILD=1", "FASTPGCACHE_TEST_DSN=", "FASTPGCACHE_TEST_BINDIR="+t.TempDir())
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "initdb and postgres are not") {
		t.Errorf("got %v, %s, want a failure that tells what is missing", err, out)
	}
}
