//go:build unix

package pgtest

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/lib/pq"
)

func TestSettingsHBAAndFilesArriveInTheServer(t *testing.T) {
	s := Own(t, Config{
		Settings: map[string]string{"application_name": `it's a \ test`, "max_connections": "17", "password_encryption": "scram-sha-256"},
		HBA:      "host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n",
		Files:    map[string][]byte{"server.key": []byte("secret")},
	})
	dsn := s.Database(t)
	db := open(t, dsn)
	for name, want := range map[string]string{
		"application_name": `it's a \ test`, "max_connections": "17", "fsync": "off", "synchronous_commit": "off",
		"full_page_writes": "off", "max_prepared_transactions": "10", "server_encoding": "UTF8", "lc_collate": "C",
		"data_directory": s.DataDir(), "server_version_num": strconv.Itoa(s.Version()),
	} {
		if name == "lc_collate" && s.Version() >= 160000 {
			continue // no setting any more
		}
		if got := query[string](t, db, `SELECT current_setting($1)`, name); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}

	role := Role(t, dsn)
	if got := query[string](t, open(t, WithUser(dsn, role)), `SELECT current_user`); got != role {
		t.Errorf("with the password: got %s, want %s", got, role)
	}
	err := open(t, dsn+" user="+role+" password=wrong").Ping()
	if refused := (*pq.Error)(nil); !errors.As(err, &refused) || refused.Code != "28P01" {
		t.Errorf("with a wrong password: got %v, want SQLSTATE 28P01", err)
	}

	info, err := os.Stat(filepath.Join(s.DataDir(), "server.key"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("server.key: got %v %v, want mode 0600", info, err)
	}
	if got := query[string](t, db, `SELECT pg_read_file('server.key')`); got != "secret" {
		t.Errorf("server.key: got %q", got)
	}
	if log, err := s.Log(); err != nil || !strings.Contains(log, "ready to accept connections") {
		t.Errorf("Log: got %q, %v", log, err)
	}
}

func TestDurableLeavesDurabilityOn(t *testing.T) {
	conf := settings(Config{Durable: true})
	for _, name := range []string{"fsync", "synchronous_commit", "full_page_writes"} {
		if strings.Contains(conf, name) {
			t.Errorf("%s is set", name)
		}
	}
}

func TestStartIsReadyThoughNobodyIsAdmitted(t *testing.T) {
	s := Own(t, Config{HBA: "host all all all reject\n"})
	err := open(t, s.DSN("postgres")).Ping()
	if refused := (*pq.Error)(nil); !errors.As(err, &refused) || refused.Code != "28000" {
		t.Errorf("got %v, want SQLSTATE 28000", err)
	}
}

func TestRestartKeepsUnloggedRowsAndCrashLosesThem(t *testing.T) {
	ctx := context.Background()
	s := Own(t, Config{})
	dsn := s.DSN("postgres")
	db := open(t, dsn)
	run(t, db, `CREATE UNLOGGED TABLE u AS SELECT 1`, `CREATE TABLE l AS SELECT 1`, `CHECKPOINT`)
	rows := func(table string) int {
		// A pool of its own: those of before hold broken connections.
		return query[int](t, open(t, dsn), `SELECT count(*) FROM `+table)
	}

	if err := s.Restart(ctx); err != nil {
		t.Fatal(err)
	}
	if u, l := rows("u"), rows("l"); u != 1 || l != 1 {
		t.Errorf("after Restart: got %d unlogged, %d logged rows, want 1, 1", u, l)
	}

	pid := s.proc.Pid
	children, err := childrenOf(pid)
	if err != nil || len(children) == 0 {
		t.Fatalf("children: got %v, %v", children, err)
	}
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	for _, pid := range append(children, pid) {
		if runs(pid) {
			t.Errorf("after Kill: process %d runs", pid)
		}
	}
	if err := open(t, dsn).Ping(); err == nil {
		t.Error("after Kill: the server answers")
	}
	if err := s.StartAgain(ctx); err != nil {
		t.Fatal(err)
	}
	if u, l := rows("u"), rows("l"); u != 0 || l != 1 {
		t.Errorf("after Kill: got %d unlogged, %d logged rows, want 0, 1", u, l)
	}
	if err := s.StartAgain(ctx); err == nil {
		t.Error("StartAgain of a running server: got no error")
	}
	if err := s.Crash(ctx); err != nil {
		t.Fatal(err)
	}
	if got := rows("l"); got != 1 {
		t.Errorf("after Crash: got %d rows, want 1", got)
	}
}

func TestStopLeavesNothing(t *testing.T) {
	s := Own(t, Config{})
	dir, pid := s.dir, s.proc.Pid
	open(t, s.DSN("postgres")).Ping() // a session does not hold it up
	for range 2 {
		if err := s.Stop(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: got %v, want it removed", dir, err)
	}
	if runs(pid) {
		t.Error("the server runs")
	}
	if err := s.StartAgain(context.Background()); err == nil {
		t.Error("StartAgain after Stop: got no error")
	}
}

func TestStopAfterKillLeavesNothing(t *testing.T) {
	s := Own(t, Config{})
	if err := errors.Join(s.Kill(), s.Stop()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: got %v, want it removed", s.dir, err)
	}
}

func TestServerOutlivesItsLastReference(t *testing.T) {
	dsn, watch := func() (string, <-chan struct{}) {
		s, err := Start(context.Background(), Config{})
		if err != nil {
			t.Fatal(err)
		}
		return s.DSN("postgres"), s.watch.done
	}()
	for range 3 {
		runtime.GC()
	}
	select {
	case <-watch:
		t.Error("the watchdog has ended")
	case <-time.After(100 * time.Millisecond):
	}
	if err := open(t, dsn).Ping(); err != nil {
		t.Error(err)
	}
	// Unreachable now, it ends with this process.
}

func TestFailedStartShowsTheLogAndLeavesNothing(t *testing.T) {
	t.Setenv("FASTPGCACHE_TEST_DIR", tempDir(t))
	_, err := Start(context.Background(), Config{Settings: map[string]string{"no_such_setting": "1"}})
	if err == nil || !strings.Contains(err.Error(), `unrecognized configuration parameter "no_such_setting"`) {
		t.Errorf("got %v, want the server's words", err)
	}
	wantEmpty(t, os.Getenv("FASTPGCACHE_TEST_DIR"))
}

func TestStartEndsWithItsContext(t *testing.T) {
	t.Setenv("FASTPGCACHE_TEST_DIR", tempDir(t))
	for _, after := range []time.Duration{0, 50 * time.Millisecond, 400 * time.Millisecond} {
		ctx, cancel := context.WithTimeout(context.Background(), after)
		began := time.Now()
		s, err := Start(ctx, Config{})
		cancel()
		if err == nil {
			if after < 400*time.Millisecond {
				t.Errorf("after %v: got no error", after)
			}
			err = s.Stop()
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("after %v: took %v: %v", after, took, err)
		}
		wantEmpty(t, os.Getenv("FASTPGCACHE_TEST_DIR"))
	}
}

func TestLaunchTellsATakenPort(t *testing.T) {
	s := Own(t, Config{})
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	host, port := s.Addr()
	l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(port)))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := s.StartAgain(context.Background()); !errors.Is(err, errPortTaken) {
		t.Errorf("got %v, want %v", err, errPortTaken)
	}
}

func TestParseVersion(t *testing.T) {
	for line, want := range map[string]int{
		"postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n": 150018,
		"postgres (PostgreSQL) 17.10\n":                          170010,
		"postgres (PostgreSQL) 19beta1\n":                        190000,
		"postgres (PostgreSQL) 19devel\n":                        190000,
	} {
		if got, err := parseVersion(line); got != want || err != nil {
			t.Errorf("%q: got %d, %v, want %d", line, got, err, want)
		}
	}
	if _, err := parseVersion("nonsense"); err == nil {
		t.Error("nonsense: got no error")
	}
}

// tempDir is one that every user may enter, for the server may be another's.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pgtest-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return dir
}

func wantEmpty(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) > 0 {
		t.Errorf("%s: got %v, %v, want it empty", dir, entries, err)
	}
}
