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

func TestThePythonLibrarysStatements(t *testing.T) {
	l := newLab(t)
	l.setup(l.admin, fastpgcache.SetupConfig{})
	user, db := l.role()
	c := l.cache(db, fastpgcache.Config{})
	ctx := t.Context()
	const set, get, del = `SELECT cache_set($1, $2, $3, $4)`, `SELECT cache_get($1, $2)`, `SELECT cache_delete($1, $2)`
	const exists, ttl = `SELECT cache_exists($1, $2)`, `SELECT cache_ttl($1, $2)`

	// What Go writes, they see.
	for key, value := range map[string]any{"text": "väl\"ue", "json": map[string]int{"a": 1}, "bytes": []byte{0, 255}, "empty": ""} {
		if err := c.Set(ctx, key, value, time.Minute); err != nil {
			t.Fatal(err)
		}
		l.want(db, true, exists, user, key)
		l.want(db, int64(60), ttl, user, key)
	}
	l.want(db, "väl\"ue", get, user, "text")
	l.want(db, `{"a":1}`, get, user, "json")
	l.want(db, "", get, user, "empty")
	l.want(db, nil, get, user, "bytes")
	l.want(db, nil, get, user, "absent")
	l.want(db, int64(-2), ttl, user, "absent")

	// What they write, Go sees.
	l.want(db, true, set, user, "bytes", "text now", nil)
	l.want(db, true, `SELECT cache_set($1, $2, $3)`, user, "python", `{"b": 2}`)
	l.want(db, true, `SELECT cache_set(p_user_id => $1, p_key => 'named', p_value => 'v', p_ttl_seconds => 100)`, user)
	var text string
	if found, err := c.Get(ctx, "bytes", &text); err != nil || !found || text != "text now" {
		t.Errorf("got %q, %v, %v", text, found, err)
	}
	var parsed struct{ B int }
	if found, err := c.Get(ctx, "python", &parsed); err != nil || !found || parsed.B != 2 {
		t.Errorf("got %+v, %v, %v", parsed, found, err)
	}
	if left, found, err := c.TTL(ctx, "named"); err != nil || !found || left <= 99*time.Second || left > 100*time.Second {
		t.Errorf("got %v, %v, %v", left, found, err)
	}
	l.want(db, int64(-1), ttl, user, "python")
	l.want(db, true, del, user, "python")
	l.want(db, false, del, user, "python")

	// An expired entry is none, for either.
	for _, seconds := range []int{0, -1} {
		l.want(db, true, set, user, "expired", "v", seconds)
		l.want(db, nil, get, user, "expired")
		l.want(db, false, exists, user, "expired")
		l.want(db, int64(-2), ttl, user, "expired")
		l.want(db, false, del, user, "expired")
		if found, err := c.Exists(ctx, "expired"); err != nil || found {
			t.Errorf("got %v, %v", found, err)
		}
	}
	l.want(db, int64(1), `SELECT cache_cleanup()`)
	l.want(db, int64(0), `SELECT cache_cleanup()`)

	// The longest lives.
	if err := c.Set(ctx, "long", "v", 200*365*24*time.Hour); err != nil {
		t.Fatal(err)
	}
	l.want(db, int64(1<<31-1), ttl, user, "long")
	l.want(db, true, set, user, "longest int", "v", 1<<31-1)
	l.want(db, int64(1<<31-1), ttl, user, "longest int")
	l.exec(db, `UPDATE cache SET expires_at = 'infinity' WHERE key = 'long'`)
	l.want(db, int64(-1), ttl, user, "long")
	l.exec(db, `UPDATE cache SET expires_at = statement_timestamp() + interval '1.5 s' WHERE key = 'long'`)
	l.want(db, int64(2), ttl, user, "long")
	if _, err := db.Exec(set, user, "k", nil, nil); sqlState(err) != "23514" {
		t.Errorf("a NULL value: %v", err)
	}
}

// Neither search_path nor temporary objects of a caller's change what the
// functions do, and none runs with the owner's rights.
func TestTheFunctionsLookNowhereElse(t *testing.T) {
	l := newLab(t)
	owner, admin := l.administrator()
	l.setup(admin, fastpgcache.SetupConfig{Schema: "app"})
	l.exec(admin, `INSERT INTO app.cache (user_id, key, value, expires_at) SELECT 'u', 'k' || g, 'v', now() - interval '1 s' FROM generate_series(1, 3) g`)
	l.exec(l.admin, `CREATE SCHEMA workshop; GRANT ALL ON SCHEMA workshop TO PUBLIC`)
	user, mallory := l.role()
	mallory.SetMaxOpenConns(1)
	l.exec(mallory, `
		CREATE FUNCTION workshop.spy() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'ran as %', current_user; END $$;
		CREATE FUNCTION workshop.txid_current() RETURNS bigint LANGUAGE sql AS 'SELECT 1::bigint';
		CREATE FUNCTION workshop.statement_timestamp() RETURNS timestamptz LANGUAGE sql AS $$ SELECT '-infinity'::timestamptz $$;
		CREATE FUNCTION workshop.concat(text, bigint, text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE 'ran as %', current_user; END $$;
		CREATE FUNCTION workshop.eq(text, text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE 'ran as %', current_user; END $$;
		CREATE OPERATOR workshop.= (FUNCTION = workshop.eq, LEFTARG = text, RIGHTARG = text);
		CREATE TEMP TABLE cache (LIKE app.cache INCLUDING ALL);
		CREATE TEMP TABLE cache_lease (LIKE app.cache_lease INCLUDING ALL);
		CREATE TEMP TABLE cache_epoch (LIKE app.cache_epoch INCLUDING ALL);
		CREATE TRIGGER spy BEFORE INSERT OR UPDATE OR DELETE ON cache FOR EACH STATEMENT EXECUTE FUNCTION workshop.spy();
		CREATE TRIGGER spy BEFORE INSERT OR UPDATE OR DELETE ON cache_lease FOR EACH STATEMENT EXECUTE FUNCTION workshop.spy();
		CREATE TRIGGER spy BEFORE INSERT OR UPDATE OR DELETE ON cache_epoch FOR EACH STATEMENT EXECUTE FUNCTION workshop.spy();
		SET search_path = pg_temp, workshop, pg_catalog, app`)
	l.want(mallory, int64(3), `SELECT app.cache_cleanup()`)
	l.want(mallory, int64(0), `SELECT removed FROM app.cache_cleanup_blocks(0, 1, interval '0')`)
	l.want(mallory, true, `SELECT app.cache_set($1, 'k', 'v', 100)`, user)
	l.want(mallory, "v", `SELECT app.cache_get($1, 'k')`, user)
	l.want(mallory, true, `SELECT app.cache_exists($1, 'k')`, user)
	l.want(mallory, int64(100), `SELECT app.cache_ttl($1, 'k')`, user)
	l.want(l.admin, false, `SELECT created_xid = 1 FROM app.cache`)
	l.want(mallory, true, `SELECT app.cache_delete($1, 'k')`, user)
	l.want(l.admin, int64(0), `SELECT count(*) FROM pg_proc WHERE pronamespace = 'app'::regnamespace AND prosecdef AND proowner <> $1::text::regrole`, owner)
	l.want(l.admin, int64(0), `SELECT count(*) FROM pg_proc WHERE pronamespace = 'app'::regnamespace
		AND proconfig IS DISTINCT FROM '{"search_path=pg_catalog, pg_temp"}'`)
}

func TestCreatedXIDIsTheTransactionThatMadeTheKeyVisible(t *testing.T) {
	l := newLab(t)
	_, admin := l.administrator()
	user, db := l.role()
	l.setup(admin, fastpgcache.SetupConfig{})
	stamped := func(db *sql.DB, want bool, key string, statements ...string) {
		t.Helper()
		tx, err := db.Begin()
		if err != nil {
			t.Fatal(err)
		}
		defer tx.Rollback()
		for _, statement := range append(statements, `SELECT`) {
			if _, err := tx.Exec(statement); err != nil {
				t.Fatalf("%s: %v", statement, err)
			}
		}
		var got bool
		if err := tx.QueryRow(`SELECT created_xid = txid_current() FROM cache WHERE key = $1`, key).Scan(&got); err != nil || got != want {
			t.Errorf("%q: got %v, %v; want %v", statements, got, err, want)
		}
		if err := tx.Commit(); err != nil {
			t.Fatal(err)
		}
	}
	stamped(db, true, "a", `INSERT INTO cache (key, value) VALUES ('a', 'v')`)
	stamped(db, true, "b", `SAVEPOINT s`, `SELECT cache_set('`+user+`', 'b', 'v')`, `RELEASE s`)
	stamped(db, false, "a", `SELECT cache_set('`+user+`', 'a', 'w')`) // a refresh makes nothing visible
	stamped(db, false, "a", `UPDATE cache SET expires_at = now() - interval '1 s' WHERE key = 'a'`)
	stamped(db, false, "a", `SELECT cache_set('`+user+`', 'a', 'revived')`) // nor does a revival: who reads keys reads expired ones
	stamped(db, true, "a", `DELETE FROM cache WHERE key = 'a'`, `SELECT cache_set('`+user+`', 'a', 'v')`)
	stamped(admin, true, "c", `INSERT INTO cache (key, value, created_xid) VALUES ('c', 'v', 1)`)
	stamped(admin, true, "d", `INSERT INTO cache (key, value, created_xid) VALUES ('d', 'v', 9223372036854775807)`)
	stamped(admin, true, "renamed", `UPDATE cache SET key = 'renamed' WHERE key = 'd'`)
	stamped(admin, true, "c", `UPDATE cache SET user_id = 'someone' WHERE key = 'c'`)
	stamped(admin, true, "c", `UPDATE cache SET created_xid = 1 WHERE key = 'c'`)
	stamped(admin, true, "c", `INSERT INTO cache (user_id, key, value) VALUES ('someone', 'c', 'v') ON CONFLICT (user_id, key) DO UPDATE SET created_xid = 7`)
	stamped(l.admin, true, "e", `SET LOCAL session_replication_role = replica`, `INSERT INTO cache (key, value, created_xid) VALUES ('e', 'v', 1)`)
	stamped(l.admin, true, "e", `SET LOCAL session_replication_role = replica`, `UPDATE cache SET created_xid = 5 WHERE key = 'e'`)
	if pgtest.Shared(t).Version() >= 150000 {
		stamped(admin, true, "f", `MERGE INTO cache USING (VALUES (1)) v ON key = 'f' WHEN NOT MATCHED THEN INSERT (key, value, created_xid) VALUES ('f', 'v', 3)`)
		stamped(admin, true, "g", `MERGE INTO cache USING (VALUES (1)) v ON key = 'f' WHEN MATCHED THEN UPDATE SET key = 'g'`)
	}
	tx, err := admin.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	stmt, err := tx.Prepare(`COPY cache (key, value, created_xid) FROM STDIN`)
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]any{{"copied", "v", 1}, {}} {
		if _, err := stmt.Exec(args...); err != nil {
			t.Fatal(err)
		}
	}
	stmt.Close()
	var got bool
	if err := tx.QueryRow(`SELECT created_xid = txid_current() FROM cache WHERE key = 'copied'`).Scan(&got); err != nil || !got {
		t.Errorf("COPY: %v, %v", got, err)
	}
}

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
	n := 200_000
	if testing.Short() {
		n = 20_000
	}
	l.fill(n)
	var removed atomic.Int64
	var wg sync.WaitGroup
	start := time.Now()
	for range 8 {
		_, db := l.role() // confined, and cleaning up everyone's
		c := l.cache(db, fastpgcache.Config{})
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
	// The very text of the function, with its variables as a plan has them.
	body := l.text(l.admin, `SELECT prosrc FROM pg_proc WHERE oid = 'cache_cleanup_blocks'::regproc`)
	from := strings.Index(body, "DELETE FROM public.cache\n")
	if from < 0 {
		t.Fatal(body)
	}
	text := strings.NewReplacer("p_first", "$1", "next_block", "$2").Replace(body[from : from+strings.Index(body[from:], ";")])
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
	exec(`PREPARE bite(bigint, bigint) AS ` + text)
	for _, state := range []string{`SET plan_cache_mode = force_generic_plan`, `SET plan_cache_mode = force_custom_plan`, `ANALYZE cache`} {
		exec(state)
		rows, err := conn.QueryContext(t.Context(), `EXPLAIN (COSTS OFF) EXECUTE bite(10, 20)`)
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
		if got := plan.String(); !strings.Contains(got, "Tid Range Scan on cache") || !strings.Contains(got, "Tid Scan on cache") || strings.Contains(got, "Seq Scan") {
			t.Errorf("%s:\n%s", state, got)
		}
	}
	// It removes what expired in its range, and no more.
	const inRange = `SELECT count(*) FROM cache WHERE expires_at <= now() AND ctid >= '(40,0)' AND ctid < '(50,0)'`
	var expired int64
	if err := conn.QueryRowContext(t.Context(), inRange).Scan(&expired); err != nil || expired == 0 {
		t.Fatal(expired, err)
	}
	l.want(l.admin, expired, `SELECT removed FROM cache_cleanup_blocks(40, 10)`)
	l.want(l.admin, 10_000-expired, `SELECT count(*) FROM cache WHERE expires_at <= now()`)
}

// Processes that clean up in turn share one walk, and nobody confined can make
// them believe that it was done.
func TestASharedCleanup(t *testing.T) {
	l := newLab(t)
	_, admin := l.administrator()
	l.setup(admin, fastpgcache.SetupConfig{})
	_, mallory := l.role()
	l.fill(10_000)
	pages := int64(10)
	bite := func(db *sql.DB, first int64, every string) (removed, next sql.NullInt64) {
		t.Helper()
		err := db.QueryRow(`SELECT removed, next_block FROM cache_cleanup_blocks($1, $2, $3::interval)`, first, pages, every).Scan(&removed, &next)
		if err != nil {
			t.Fatal(err)
		}
		return removed, next
	}
	total, calls := int64(0), 0
	for next := (sql.NullInt64{Valid: true}); next.Valid; calls++ {
		var removed sql.NullInt64
		if calls%2 == 0 {
			removed, next = bite(mallory, 1_000_000, "1 hour") // a lie
		} else {
			removed, next = bite(l.admin, 0, "1 hour")
		}
		if !removed.Valid {
			t.Fatalf("call %d: not done", calls)
		}
		total += removed.Int64
	}
	if total != 5000 || calls < 5 {
		t.Errorf("removed %d in %d calls, want 5000", total, calls)
	}
	if removed, next := bite(l.admin, 0, "1 hour"); removed.Valid || next.Valid {
		t.Errorf("done again too soon: %v, %v", removed, next)
	}
	if removed, _ := bite(l.admin, 0, "0"); !removed.Valid {
		t.Errorf("not done again")
	}
	l.exec(l.admin, `UPDATE cache_epoch SET cleanup_block = 0, cleaned_at = NULL`)

	// While one is at it, others leave it to that one.
	tx, err := l.admin.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec(`SELECT cache_cleanup_blocks(0, 1, interval '1 hour')`); err != nil {
		t.Fatal(err)
	}
	if removed, next := bite(mallory, 0, "1 hour"); removed.Valid || next.Valid {
		t.Errorf("two at once: %v, %v", removed, next)
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	// After a crash the epoch's row is missing.
	l.exec(l.admin, `TRUNCATE cache_epoch`)
	if removed, _ := bite(mallory, 0, "1 hour"); !removed.Valid {
		t.Error("not done without an epoch")
	}
	l.exec(l.admin, `INSERT INTO cache_lease VALUES ('u', 'k', 'h', now() - interval '1 s'), ('u', 'l', 'h', now() + interval '1 h')`)
	l.exec(mallory, `SELECT cache_cleanup()`)
	l.want(l.admin, "l", `SELECT string_agg(key, ',') FROM cache_lease`)
}

func TestTheEpochTellsOneCacheFromAnother(t *testing.T) {
	server := pgtest.Own(t, pgtest.Config{})
	l := labOn(t, server.Database(t))
	l.setup(l.admin, fastpgcache.SetupConfig{})
	_, db := l.role()
	const token = `SELECT concat_ws(' ', (SELECT id FROM cache_epoch), to_regclass('cache')::oid, pg_postmaster_start_time())`
	seen := map[string]string{}
	differs := func(what string) {
		t.Helper()
		// A server that comes back ends the old connections first.
		var got string
		for range 50 {
			if err := db.QueryRow(token).Scan(&got); err == nil {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		if before, ok := seen[got]; ok || got == "" {
			t.Errorf("%s: %q as %s", what, got, before)
		}
		seen[got] = what
	}
	set := func() { l.want(l.admin, true, `SELECT cache_set('u', 'k', 'v')`) }
	again := func() {
		for range 50 {
			if l.admin.Ping() == nil {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	differs("the first")
	set()
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	again()
	l.want(l.admin, "v", `SELECT cache_get('u', 'k')`)
	differs("after a restart")
	if err := server.Crash(t.Context()); err != nil {
		t.Fatal(err)
	}
	again()
	l.want(l.admin, int64(0), `SELECT count(*) FROM cache`)
	l.want(l.admin, int64(0), `SELECT count(*) FROM cache_epoch`)
	differs("after a crash")
	set()
	var wg sync.WaitGroup
	for range 20 { // whoever finds it missing makes it anew, and one does
		wg.Go(func() {
			if _, err := db.Exec(`INSERT INTO cache_epoch (only_row) VALUES (true) ON CONFLICT DO NOTHING`); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	l.want(l.admin, int64(1), `SELECT count(*) FROM cache_epoch`)
	differs("made anew")
	l.setup(l.admin, fastpgcache.SetupConfig{Force: true})
	differs("Force")
	l.exec(l.admin, `DROP TABLE cache`)
	l.setup(l.admin, fastpgcache.SetupConfig{})
	differs("the table alone dropped and created")
	l.want(l.admin, int64(3), `SELECT count(*) FROM pg_class WHERE relname LIKE 'cache%' AND relkind = 'r' AND relpersistence = 'u'`)
}

// Refreshed entries stay where they are, in the table and its indexes.
func TestRefreshesAreHOT(t *testing.T) {
	l := newLab(t)
	l.setup(l.admin, fastpgcache.SetupConfig{})
	writer := l.open(l.dsn)
	writer.SetMaxOpenConns(1)
	exec := func(statement string) { t.Helper(); l.exec(writer, statement) }
	exec(`INSERT INTO cache (key, value) SELECT 'k' || g, repeat('v', CASE g % 2 WHEN 0 THEN 100 ELSE 1400 END) FROM generate_series(1, 10000) g`)
	loaded := l.text(l.admin, `SELECT pg_table_size('cache')`)
	const round, rounds = 200, 75
	for i := range rounds {
		exec(fmt.Sprintf(`DO $$ BEGIN FOR i IN 1 .. %d LOOP
			PERFORM cache_set(current_user, 'k' || k, repeat('w', CASE k %% 2 WHEN 0 THEN 100 ELSE 1400 END), 1000)
			FROM (SELECT 1 + (random() * 9999)::int AS k) k;
		END LOOP; END $$`, round))
		if i%10 == 9 {
			exec(`VACUUM cache`)
		}
	}
	writer.Close() // which sends its last statistics
	for range 100 {
		if l.text(l.admin, `SELECT coalesce(n_tup_upd, 0) >= $1 FROM pg_stat_user_tables WHERE relname = 'cache'`, round*rounds) == "true" {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Log(l.text(l.admin, `SELECT format('%s of %s updates HOT, size %s after %s', n_tup_hot_upd, n_tup_upd, pg_table_size('cache'), $1::text)
		FROM pg_stat_user_tables WHERE relname = 'cache'`, loaded))
	l.want(l.admin, true, `SELECT n_tup_upd >= $1 AND n_tup_hot_upd >= 0.95 * n_tup_upd FROM pg_stat_user_tables WHERE relname = 'cache'`, round*rounds)
	l.want(l.admin, true, `SELECT pg_table_size('cache') <= 1.5 * $1::bigint`, loaded)
	for _, columns := range []string{"expires_at", "value"} {
		l.want(l.admin, int64(0), `SELECT count(*) FROM pg_index WHERE indrelid = 'cache'::regclass AND pg_get_indexdef(indexrelid) LIKE '%' || $1 || '%'`, columns)
	}
}
