package fastpgcache_test

import (
	"context"
	"database/sql"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// fill stores n entries, of every user u0 to u9, expired where the number is even.
func (l *lab) fill(n int) {
	l.Helper()
	l.exec(l.admin, `INSERT INTO cache (user_id, key, value, expires_at)
		SELECT 'u' || g % 10, 'k' || g, repeat('v', 20), CASE WHEN g % 2 = 0 THEN now() - interval '1 s' WHEN g % 3 = 0 THEN now() + interval '1 h' END
		FROM generate_series(1, $1::integer) g`, n)
}

func TestCleanupByManyAtOnceRemovesWhatExpiredAndNothingElse(t *testing.T) {
	l := newLab(t)
	l.setup(l.admin, fastpgcache.SetupConfig{})
	n := 20_000
	if pgtest.Long() {
		n = 200_000
	}
	l.fill(n)
	var removed atomic.Int64
	var wg sync.WaitGroup
	start := time.Now()
	for range 8 {
		c := l.cache(l.open(l.dsn), fastpgcache.Config{})
		wg.Go(func() {
			n, err := c.Cleanup(t.Context())
			if err != nil {
				t.Error(err)
			}
			removed.Add(int64(n))
		})
	}
	wg.Wait()
	t.Logf("%d of %d removed in %v", removed.Load(), n, time.Since(start))
	if got, want := removed.Load(), int64(n/2); got != want {
		t.Errorf("removed %d, want %d", got, want)
	}
	l.want(l.admin, int64(n/2), `SELECT count(*) FROM cache WHERE expires_at IS NULL OR expires_at > now()`)
	l.want(l.admin, int64(n/2), `SELECT count(*) FROM cache`)
}

// Writers revive expired keys while cleanups run: what they have stored is there.
func TestCleanupNeverRemovesAFreshEntry(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.setup(l.admin, fastpgcache.SetupConfig{})
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	var checks, removed atomic.Int64
	for w := range 4 {
		c := l.cache(l.open(l.dsn), fastpgcache.Config{User: fmt.Sprint("w", w)})
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				key := fmt.Sprint("k", rand.IntN(50))
				if err := c.Set(t.Context(), key, "old", time.Millisecond); err != nil {
					t.Error(err)
				}
				if err := c.Set(t.Context(), key, "fresh", time.Hour); err != nil {
					t.Error(err)
				}
				var got string
				if found, err := c.Get(t.Context(), key, &got); err != nil || !found || got != "fresh" {
					t.Errorf("got %q, %v, %v", got, found, err)
					return
				}
				checks.Add(1)
			}
		})
	}
	for range 2 {
		c := l.cache(l.open(l.dsn), fastpgcache.Config{})
		wg.Go(func() {
			for ctx.Err() == nil {
				n, err := c.Cleanup(t.Context())
				if err != nil {
					t.Error(err)
				}
				removed.Add(int64(n))
			}
		})
	}
	wg.Wait()
	if checks.Load() < 100 || removed.Load() == 0 {
		t.Errorf("%d checks, %d removed: nothing raced", checks.Load(), removed.Load())
	}
	t.Logf("%d checks, %d removed", checks.Load(), removed.Load())
}

func TestCleanupPassesOverLockedRows(t *testing.T) {
	l := newLab(t)
	l.setup(l.admin, fastpgcache.SetupConfig{})
	l.fill(100)
	tx, err := l.admin.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec(`UPDATE cache SET expires_at = now() + interval '1 h' WHERE key = 'k2'`); err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(`SELECT FROM cache WHERE key = 'k4' FOR KEY SHARE`); err != nil {
		t.Fatal(err)
	}
	impatient := l.open(l.dsn + ` options='-c lock_timeout=1s -c default_transaction_isolation=serializable'`)
	if removed, err := l.cache(impatient, fastpgcache.Config{}).Cleanup(t.Context()); err != nil || removed != 48 {
		t.Errorf("got %d, %v; want 48", removed, err)
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	l.want(l.admin, int64(1), `SELECT cache_cleanup()`)
	l.want(l.admin, int64(51), `SELECT count(*) FROM cache`)
}

func TestCleanupReadsOnlyItsRange(t *testing.T) {
	l := newLab(t)
	l.setup(l.admin, fastpgcache.SetupConfig{})
	l.fill(20_000)
	body := l.text(l.admin, `SELECT prosrc FROM pg_proc WHERE oid = 'cache_walk'::regproc`)
	// part is the very text of the function, with its variables as a plan has them.
	part := func(from, to string) string {
		t.Helper()
		i := strings.Index(body, from)
		if i < 0 {
			t.Fatal(body)
		}
		text := body[i+len(from):]
		return strings.NewReplacer("block + 256", "$2::bigint", "block", "$1::bigint", "unnest(rows)", "unnest($1::tid[])").Replace(text[:strings.Index(text, to)])
	}
	conn, err := l.admin.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	exec := func(statement string) {
		t.Helper()
		if _, err := conn.ExecContext(t.Context(), statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
	exec(`PREPARE look AS ` + part("rows := ARRAY(", ");"))
	exec(`PREPARE remove AS WITH due AS MATERIALIZED (` + part("WITH due AS MATERIALIZED (", " INTO removed") + ` FROM gone`)
	for _, state := range []string{`SET plan_cache_mode = force_generic_plan`, `SET plan_cache_mode = force_custom_plan`, `ANALYZE cache`, `ANALYZE cache_lease`} {
		exec(state)
		for execute, want := range map[string]string{`look(10, 20)`: "Tid Range Scan on cache", `remove('{"(1,1)","(1,2)"}')`: "Tid Scan on cache"} {
			rows, err := conn.QueryContext(t.Context(), `EXPLAIN (COSTS OFF) EXECUTE `+execute)
			if err != nil {
				t.Fatal(err)
			}
			var plan strings.Builder
			for rows.Next() {
				var line string
				if err := rows.Scan(&line); err != nil {
					t.Fatal(err)
				}
				plan.WriteString(line + "\n")
			}
			if got := plan.String(); !strings.Contains(got, want) || strings.Contains(got, "Seq Scan on cache\n") || strings.Contains(got, "Seq Scan on cache c\n") {
				t.Errorf("%s, %s:\n%s", state, execute, got)
			}
		}
	}
	// It removes what expired in its range, and no more.
	const inRange = `SELECT count(*) FROM cache WHERE expires_at <= now() AND ctid >= '(40,0)' AND ctid < '(296,0)'`
	var expired int64
	if err := conn.QueryRowContext(t.Context(), inRange).Scan(&expired); err != nil || expired == 0 {
		t.Fatal(expired, err)
	}
	l.want(l.admin, expired, `SELECT removed FROM cache_walk('b40', NULL)`)
	l.want(l.admin, 10_000-expired, `SELECT count(*) FROM cache WHERE expires_at <= now()`)
}

// A login that is confined removes its own entries, by its keys while they are few and
// by the pages when they are many; owner, service and superuser remove everybody's.
func TestCleanupIsOfWhatARoleMayAct(t *testing.T) {
	l := newLab(t)
	_, admin := l.administrator()
	service, serviceDB := l.role()
	few, fewDB := l.role()
	many, manyDB := l.role()
	l.setup(admin, fastpgcache.SetupConfig{Service: service})
	fill := func(user string, n int) {
		l.exec(l.admin, `INSERT INTO cache (user_id, key, value, expires_at) SELECT $1, 'k' || g, 'v', CASE WHEN g % 2 = 0 THEN now() - interval '1 s' END
			FROM generate_series(1, $2::integer) g`, user, n)
	}
	fill(few, 300)
	fill(many, 5000)
	modes := func(db *sql.DB) (modes string) {
		t.Helper()
		for position := (sql.NullString{Valid: true}); position.Valid; {
			var removed int
			if err := db.QueryRow(`SELECT removed, next_position FROM cache_walk($1, NULL)`, position.String).Scan(&removed, &position); err != nil {
				t.Fatal(err)
			}
			if position.Valid {
				modes += position.String[:1]
			}
		}
		return modes
	}
	for _, step := range []struct {
		name  string
		db    *sql.DB
		modes string
		left  int64
	}{{"few", fewDB, "", 2500}, {"many", manyDB, "b", 0}} {
		if got := modes(step.db); got != step.modes {
			t.Errorf("%s: went by %q, want %q", step.name, got, step.modes)
		}
		l.want(l.admin, step.left, `SELECT count(*) FROM cache WHERE expires_at <= now()`)
	}
	for _, db := range []*sql.DB{serviceDB, admin, l.admin} {
		fill("other", 10)
		l.want(db, int64(5), `SELECT cache_cleanup()`)
		l.exec(l.admin, `DELETE FROM cache WHERE user_id = 'other'`)
	}
}

// What is being loaded keeps the entry that its load found, and a remembered absence
// keeps its row until its time.
func TestCleanupLeavesWhatIsStillNeeded(t *testing.T) {
	l := newLab(t)
	l.setup(l.admin, fastpgcache.SetupConfig{})
	_, db := l.role()
	l.exec(db, `INSERT INTO cache (key, value, expires_at) VALUES
		('loading', 'v', now() - interval '1 s'), ('was loading', 'v', now() - interval '1 s'), ('forged', 'v', now() - interval '1 s'),
		('absent', extract(epoch FROM now() + interval '1 h')::text, '-infinity'), ('absent 2', (extract(epoch FROM now())::float8 + 10)::text, '-infinity'),
		('was absent', extract(epoch FROM now() - interval '1 s')::text, '-infinity'), ('odd', 'no number', '-infinity'), ('huge', repeat('9', 400), '-infinity')`)
	l.exec(db, `INSERT INTO cache_lease (key, holder, expires_at) VALUES ('loading', 'h', now() + interval '10 s'),
		('was loading', 'h', now() - interval '1 s'), ('forged', 'h', 'infinity')`)
	l.want(db, int64(2), `SELECT cache_cleanup()`)
	l.want(db, "absent,absent 2,loading", `SELECT string_agg(key, ',' ORDER BY key) FROM cache`)
	l.want(db, "loading", `SELECT string_agg(key, ',') FROM cache_lease`)
}

// Leases of a hostile user's, or of a clock that was set back, do not stay.
func TestCleanupRemovesLeasesInBites(t *testing.T) {
	l := newLab(t)
	l.setup(l.admin, fastpgcache.SetupConfig{})
	_, db := l.role()
	l.exec(db, `INSERT INTO cache_lease (key, holder, expires_at) SELECT g::text, 'h', 'infinity' FROM generate_series(1, 15000) g`)
	l.want(db, "l", `SELECT next_position FROM cache_walk(NULL, NULL)`)
	l.want(db, nil, `SELECT next_position FROM cache_walk('l', NULL)`)
	l.want(db, int64(0), `SELECT count(*) FROM cache_lease`)
}

// Processes of one user clean up in turn and share one walk, whatever the clock did.
func TestASharedCleanup(t *testing.T) {
	l := newLab(t)
	_, admin := l.administrator()
	l.setup(admin, fastpgcache.SetupConfig{})
	_, mallory := l.role()
	n := 40_000
	l.fill(n)
	bite := func(db *sql.DB, position string, every string) (removed sql.NullInt64, next sql.NullString) {
		t.Helper()
		err := db.QueryRow(`SELECT removed, next_position FROM cache_walk($1, $2::interval)`, position, every).Scan(&removed, &next)
		if err != nil {
			t.Fatal(err)
		}
		return removed, next
	}
	total, calls := int64(0), 0
	for next := (sql.NullString{Valid: true}); next.Valid; calls++ {
		var removed sql.NullInt64
		removed, next = bite(admin, []string{"", "b1000000"}[calls%2], "1 hour") // whatever it is told
		if !removed.Valid {
			t.Fatalf("call %d: not done", calls)
		}
		total += removed.Int64
		if removed, _ := bite(mallory, "", "0"); !removed.Valid {
			t.Error("another user's walk is its own")
		}
	}
	if total != int64(n/2) || calls < 2 {
		t.Errorf("removed %d in %d calls, want %d", total, calls, n/2)
	}
	if removed, next := bite(admin, "", "1 hour"); removed.Valid || next.Valid {
		t.Errorf("done again too soon: %v, %v", removed, next)
	}
	if removed, _ := bite(admin, "", "0"); !removed.Valid {
		t.Errorf("not done again")
	}
	l.exec(l.admin, `UPDATE cache_epoch SET walked_at = now() + interval '1 year'`)
	if removed, _ := bite(admin, "", "1 hour"); !removed.Valid {
		t.Errorf("a time in the future is not due")
	}
	l.exec(l.admin, `UPDATE cache_epoch SET walked_at = NULL, walk_position = 'what is this'`)
	if removed, _ := bite(admin, "", "1 hour"); !removed.Valid {
		t.Errorf("an odd position stops it")
	}

	// While one is at it, others of the same user leave it to that one.
	l.exec(l.admin, `UPDATE cache_epoch SET walked_at = NULL`)
	tx, err := admin.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec(`SELECT cache_walk(NULL, interval '1 hour')`); err != nil {
		t.Fatal(err)
	}
	if removed, next := bite(admin, "", "0"); removed.Valid || next.Valid {
		t.Errorf("two at once: %v, %v", removed, next)
	}
	if removed, _ := bite(mallory, "", "0"); !removed.Valid {
		t.Error("another user waits for it")
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
}

// A store holds its lease and waits for the expired row that it overwrites. A walk that held
// the row and waited for the lease stopped everybody for deadlock_timeout, 22 times in two minutes.
func TestCleanupDoesNotWaitForALoadThatBeganSince(t *testing.T) {
	l := newLab(t)
	l.setup(l.admin, fastpgcache.SetupConfig{})
	l.exec(l.admin, `INSERT INTO cache (key, value, expires_at) VALUES ('k', 'old', now() - interval '1 minute')`)
	// The walk stops where it has chosen its rows.
	l.exec(l.admin, `CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN OLD; END $$`)
	l.exec(l.admin, `CREATE TRIGGER pause BEFORE DELETE ON cache FOR EACH ROW EXECUTE FUNCTION pause()`)
	begin := func() *sql.Tx {
		tx, err := l.admin.Begin()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { tx.Rollback() })
		return tx
	}
	gate, load := begin(), begin()
	if _, err := gate.Exec(`SELECT pg_advisory_xact_lock(1)`); err != nil {
		t.Fatal(err)
	}
	walked := make(chan error, 1)
	go func() {
		_, err := l.admin.Exec(`SELECT cache_cleanup()`)
		walked <- err
	}()
	waiting := `SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`
	for deadline := time.Now().Add(20 * time.Second); l.text(l.admin, waiting) != "1"; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the walk did not come to the row")
		}
	}
	l.exec(l.admin, `INSERT INTO cache_lease (key, holder, expires_at) VALUES ('k', 'h', now() + interval '10 s')`)
	if _, err := load.Exec(`SELECT FROM cache_lease FOR UPDATE`); err != nil {
		t.Fatal(err)
	}
	if err := gate.Rollback(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-walked:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the walk waits for the lease")
	}
	l.want(l.admin, int64(0), `SELECT count(*) FROM cache`)
	l.want(l.admin, int64(1), `SELECT count(*) FROM cache_lease`)
}
