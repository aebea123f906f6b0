package fastpgcache_test

import (
	"database/sql"
	"fmt"
	"strings"
	"sync"
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
	l.want(db, true, set, user, "expired", "v", -1)
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
	_, admin := l.administrator()
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
		CREATE TEMP TABLE cache_change (user_id text DEFAULT current_user, xid bigint DEFAULT 0, keys text[]);
		CREATE TRIGGER spy BEFORE INSERT OR UPDATE OR DELETE ON cache FOR EACH STATEMENT EXECUTE FUNCTION workshop.spy();
		CREATE TRIGGER spy BEFORE INSERT OR UPDATE OR DELETE ON cache_lease FOR EACH STATEMENT EXECUTE FUNCTION workshop.spy();
		CREATE TRIGGER spy BEFORE INSERT OR UPDATE OR DELETE ON cache_epoch FOR EACH STATEMENT EXECUTE FUNCTION workshop.spy();
		CREATE TRIGGER spy BEFORE INSERT OR UPDATE OR DELETE ON cache_change FOR EACH STATEMENT EXECUTE FUNCTION workshop.spy();
		SET search_path = pg_temp, workshop, pg_catalog, app`)
	l.exec(admin, `UPDATE app.cache SET user_id = $1`, user)
	l.want(mallory, int64(3), `SELECT app.cache_cleanup()`)
	l.want(mallory, int64(0), `SELECT removed FROM app.cache_walk(NULL, interval '0')`)
	l.exec(mallory, `SELECT app.cache_trim(current_user, 1)`)
	l.exec(mallory, `INSERT INTO app.cache (key, value) VALUES ('raw', 'v'); UPDATE app.cache SET value = 'w'; DELETE FROM app.cache`)
	l.want(mallory, true, `SELECT app.cache_set($1, 'k', 'v', 100)`, user)
	l.want(mallory, "v", `SELECT app.cache_get($1, 'k')`, user)
	l.want(mallory, true, `SELECT app.cache_exists($1, 'k')`, user)
	l.want(mallory, int64(100), `SELECT app.cache_ttl($1, 'k')`, user)
	l.want(l.admin, false, `SELECT mark = 1 FROM app.cache`)
	l.want(mallory, true, `SELECT app.cache_delete($1, 'k')`, user)
	l.want(l.admin, int64(0), `SELECT count(*) FROM pg_proc WHERE pronamespace = 'app'::regnamespace AND prosecdef`)
	l.want(l.admin, int64(0), `SELECT count(*) FROM pg_proc WHERE pronamespace = 'app'::regnamespace
		AND array_position(proconfig, 'search_path=pg_catalog, pg_temp') IS NULL`)
}

// fed returns what the feed has gained of transactions from xid on, as "user:keys".
func (l *lab) fed(db *sql.DB, xid string) string {
	l.Helper()
	return l.text(db, `SELECT coalesce(string_agg(concat(user_id, ':', array_to_string(keys, ',', 'NULL')), ' ' ORDER BY user_id, keys), '')
		FROM cache_change WHERE xid >= $1::bigint`, xid)
}

// Whoever changes what a key answers leaves it in the feed, once, in the same
// transaction; what changes nothing leaves nothing.
func TestOtherPeoplesSQLFeeds(t *testing.T) {
	l := newLab(t)
	_, admin := l.administrator()
	user, db := l.role()
	l.setup(admin, fastpgcache.SetupConfig{})
	merge := pgtest.Shared(t).Version() >= 150000
	for _, step := range []struct {
		db   *sql.DB
		sql  string
		want string // with u for user
	}{
		{db, `INSERT INTO cache (key, value) VALUES ('a', 'v'), ('b', 'v')`, "u:a u:b"},
		{db, `INSERT INTO cache (key, value, expires_at) VALUES ('dead', 'v', now() - interval '1 h')`, "u:dead"},
		{db, `UPDATE cache SET value = 'w' WHERE key = 'a'`, "u:a"},
		{db, `UPDATE cache SET expires_at = now() + interval '1 h' WHERE key = 'a'`, "u:a"},
		{db, `UPDATE cache SET value = NULL, value_bytes = 'x' WHERE key = 'b'`, "u:b"},
		{db, `UPDATE cache SET mark = mark`, ""}, // a touch
		{db, `INSERT INTO cache (key, value) VALUES ('a', 'x') ON CONFLICT (user_id, key) DO UPDATE SET value = 'x'`, "u:a"},
		{db, `INSERT INTO cache (key, value) VALUES ('a', 'x') ON CONFLICT DO NOTHING`, ""},
		{db, `DELETE FROM cache WHERE key IN ('a', 'b', 'dead', 'absent')`, "u:a,b"}, // who expired is gone already
		{db, `SELECT cache_set(current_user, 'f', 'v', 100)`, "u:f"},
		{db, `SELECT cache_set(current_user, 'f', 'w')`, "u:f"},
		{db, `SELECT cache_delete(current_user, 'f')`, "u:f"},
		{db, `SELECT cache_delete(current_user, 'f')`, ""},
		{db, `SELECT cache_set(current_user, 'g', 'v'); UPDATE cache SET value = 'raw' WHERE key = 'g'`, "u:g"}, // the same transaction
		{db, `/*fastpgcache*/ WITH fed AS (INSERT INTO cache_change (keys) VALUES ('{g}')) DELETE FROM cache WHERE key = 'g'`, "u:g"},
		{db, ` /*fastpgcache*/ DELETE FROM cache`, ""}, // nothing there
		{db, `DO $$ BEGIN INSERT INTO cache (key, value) VALUES ('h', 'v'); DELETE FROM cache; END $$`, "u:h u:h"},
		{admin, `INSERT INTO cache (user_id, key, value) VALUES ('x', 'k', 'v'), ('y', 'k', 'v')`, "x:k y:k"},
		{admin, `UPDATE cache SET key = 'l' WHERE user_id = 'x'`, "x:k x:l"},
		{admin, `UPDATE cache SET user_id = 'z' WHERE user_id = 'x'`, "x:l z:l"},
		{admin, `UPDATE cache SET user_id = 'x', value = 'w', mark = txid_current() WHERE user_id = 'z'`, "x:l z:l"},
		{admin, `DELETE FROM cache`, "x:l y:k"},
		{l.admin, `SET LOCAL session_replication_role = replica; INSERT INTO cache (user_id, key, value) VALUES ('r', 'k', 'v'); DELETE FROM cache`, "r:k r:k"},
		{db, `MERGE INTO cache USING (VALUES (1)) v ON key = 'm' WHEN NOT MATCHED THEN INSERT (key, value) VALUES ('m', 'v')`, "u:m"},
		{db, `MERGE INTO cache USING (VALUES (1)) v ON key = 'm' WHEN MATCHED THEN UPDATE SET value = 'w'`, "u:m"},
		{db, `MERGE INTO cache USING (VALUES (1)) v ON key = 'm' WHEN MATCHED THEN DELETE`, "u:m"},
	} {
		if strings.HasPrefix(step.sql, "MERGE") && !merge {
			continue
		}
		before := l.text(l.admin, `SELECT txid_current()`)
		l.exec(step.db, step.sql)
		if got := strings.ReplaceAll(l.fed(l.admin, before), user, "u"); got != step.want {
			t.Errorf("%s\n got %q\nwant %q", step.sql, got, step.want)
		}
	}

	before := l.text(l.admin, `SELECT txid_current()`)
	tx, err := admin.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	stmt, err := tx.Prepare(`COPY cache (key, value) FROM STDIN`)
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]any{{"copied", "v"}, {}} {
		if _, err := stmt.Exec(args...); err != nil {
			t.Fatal(err)
		}
	}
	stmt.Close()
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	if got := l.fed(l.admin, before); !strings.HasSuffix(got, ":copied") {
		t.Errorf("COPY: got %q", got)
	}

	// Many at once come in rows that the feed takes.
	l.exec(db, `INSERT INTO cache (key, value) SELECT repeat('x', 1000) || g, 'v' FROM generate_series(10000, 14999) g`)
	before = l.text(l.admin, `SELECT txid_current()`)
	l.exec(db, `DELETE FROM cache`)
	l.want(l.admin, "5 rows, 5000 keys", `SELECT format('%s rows, %s keys', count(*), sum(cardinality(keys))) FROM cache_change WHERE xid >= $1::bigint`, before)
	for _, keys := range []string{`array_fill('k'::text, ARRAY[2001])`, `ARRAY[repeat('k', 2300000)]`} {
		if _, err := db.Exec(`INSERT INTO cache_change (keys) VALUES (` + keys + `)`); sqlState(err) != "23514" {
			t.Errorf("%s: got %v", keys, err)
		}
	}
	for _, statement := range []string{
		`INSERT INTO cache (key, value) VALUES ('', 'v')`,
		`INSERT INTO cache (key, value) VALUES (repeat('k', 1025), 'v')`,
		`INSERT INTO cache (key) VALUES ('none')`,
		`INSERT INTO cache (key, value, value_bytes) VALUES ('both', 'v', 'v')`,
		`UPDATE cache SET value_bytes = 'v'`,
		`UPDATE cache SET value = NULL`,
		`SELECT cache_set(current_user::text, '', 'v')`,
		`SELECT cache_set(current_user::text, repeat('k', 1025), 'v')`,
		`SELECT cache_set(current_user::text, 'none', NULL)`,
	} {
		l.exec(db, `SELECT cache_set(current_user::text, 'kept', 'v')`)
		if _, err := db.Exec(statement); sqlState(err) != "23514" {
			t.Errorf("%s: got %v", statement, err)
		}
	}
	if _, err := l.admin.Exec(`UPDATE cache SET key = ''`); sqlState(err) != "23514" {
		t.Errorf("an empty key: got %v", err)
	}
}

// What is being loaded must not be stored behind other people's DELETE.
func TestDeletionsEndLeases(t *testing.T) {
	l := newLab(t)
	_, admin := l.administrator()
	_, db := l.role()
	l.setup(admin, fastpgcache.SetupConfig{})
	for _, remove := range []string{`DELETE FROM cache`, `SELECT cache_delete(current_user, 'k')`} {
		for _, expires := range []string{"NULL", "now() - interval '1 h'"} {
			l.exec(db, `INSERT INTO cache (key, value, expires_at) VALUES ('k', 'v', `+expires+`)`)
			l.exec(db, `INSERT INTO cache_lease (key, holder, expires_at) VALUES ('k', 'h', now() + interval '10 s'), ('l', 'h', now() + interval '10 s')`)
			l.exec(db, remove)
			l.want(db, "l", `SELECT string_agg(key, ',') FROM cache_lease`)
			l.exec(db, `DELETE FROM cache_lease`)
		}
	}
}

// A user's feed loses what every process has had a minute to read, and keeps the rest,
// in whatever order transactions end.
func TestTrimmingKeepsWhatNobodyMayHaveRead(t *testing.T) {
	l := newLab(t)
	_, admin := l.administrator()
	user, db := l.role()
	l.setup(admin, fastpgcache.SetupConfig{})
	feed := func(want string) {
		t.Helper()
		l.want(l.admin, want, `SELECT coalesce(string_agg(array_to_string(keys, ','), ' ' ORDER BY keys), '') FROM cache_change WHERE user_id = $1`, user)
	}
	write := func(db interface {
		Exec(string, ...any) (sql.Result, error)
	}, key string) {
		t.Helper()
		if _, err := db.Exec(`INSERT INTO cache_change (user_id, keys) VALUES ($1, ARRAY[$2])`, user, key); err != nil {
			t.Fatal(err)
		}
	}
	trim := func(rows int, want any) {
		t.Helper()
		l.want(db, want, `SELECT cache_trim(current_user, $1)`, rows)
	}
	later := func() { // by a minute
		l.exec(l.admin, `UPDATE cache_epoch SET taken = ARRAY(SELECT t - interval '61 s' FROM unnest(taken) WITH ORDINALITY x(t, i) ORDER BY i)`)
	}
	write(db, "a")
	write(db, "b")
	trim(100, nil) // only now it begins to look
	trim(100, nil)
	write(db, "c")
	late, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer late.Rollback()
	write(late, "late")
	later()
	trim(1, int64(1)) // in bites
	feed("b c")
	trim(1, int64(1))
	trim(1, int64(0))
	trim(1, nil)
	feed("c")
	later() // past the second candidate, in which c is visible and late is not
	trim(100, int64(1))
	feed("")
	if err := late.Commit(); err != nil {
		t.Fatal(err)
	}
	trim(100, nil)
	feed("late")
	later()
	trim(100, int64(0)) // the candidate was taken while it was open
	feed("late")
	later()
	trim(100, int64(1))
	feed("")

	// Who holds a row holds up nobody, and it goes later.
	write(db, "held")
	l.exec(l.admin, `UPDATE cache_epoch SET taken = NULL, snapshots = NULL`)
	trim(100, nil)
	later()
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec(`SELECT FROM cache_change FOR UPDATE`); err != nil {
		t.Fatal(err)
	}
	trim(100, int64(0))
	feed("held")
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	trim(100, int64(1))
	feed("")

	// A clock that was set back stops nothing.
	write(db, "future")
	l.exec(l.admin, `UPDATE cache_epoch SET taken = ARRAY[now() + interval '1 year'], snapshots = ARRAY[txid_current_snapshot()]`)
	trim(100, int64(1))
	feed("")

	// Nor does an epoch of another server, whose transactions are yet to come here.
	write(db, "restored")
	l.exec(l.admin, `UPDATE cache_epoch SET trimmed = '90000000:90000000:', low = 90000000, snapshots = '{90000000:90000000:}', taken = ARRAY[now() - interval '1 h']`)
	trim(100, int64(0))
	l.want(l.admin, true, `SELECT txid_snapshot_xmax(trimmed) <= txid_snapshot_xmax(txid_current_snapshot()) FROM cache_epoch`)
	trim(100, int64(1))
	feed("")

	// Nobody waits for an epoch that a transaction has made and not committed.
	l.exec(l.admin, `DELETE FROM cache_epoch`)
	first, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer first.Rollback()
	if _, err := first.Exec(`INSERT INTO cache_epoch (user_id) VALUES (current_user)`); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	trim(100, nil)
	l.want(db, nil, `SELECT removed FROM cache_walk(NULL, '1 h')`)
	if took := time.Since(start); took > time.Second {
		t.Errorf("it took %v", took)
	}
}

func TestTheEpochTellsOneCacheFromAnother(t *testing.T) {
	t.Parallel()
	server := pgtest.Own(t, pgtest.Config{})
	l := labOn(t, server.Database(t))
	l.setup(l.admin, fastpgcache.SetupConfig{})
	_, db := l.role()
	const token = `SELECT concat_ws(' ', (SELECT id FROM cache_epoch WHERE user_id = current_user), to_regclass('cache')::oid, pg_postmaster_start_time())`
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
			if _, err := db.Exec(`INSERT INTO cache_epoch (user_id) VALUES (current_user) ON CONFLICT DO NOTHING`); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	l.want(db, int64(1), `SELECT count(*) FROM cache_epoch`)
	differs("made anew")
	l.setup(l.admin, fastpgcache.SetupConfig{Force: true})
	l.exec(db, `SELECT cache_trim(current_user, 1)`)
	differs("Force")
	l.exec(l.admin, `DROP TABLE cache`)
	l.setup(l.admin, fastpgcache.SetupConfig{})
	differs("the table alone dropped and created")
	l.want(l.admin, int64(4), `SELECT count(*) FROM pg_class WHERE relname LIKE 'cache%' AND relkind = 'r' AND relpersistence = 'u'`)
}

// Entries are small, and refreshed ones stay where they are, in the table and its index.
func TestRefreshesAreHOT(t *testing.T) {
	for _, c := range []struct {
		bytes, keys int
		hot         float64 // share of updates
		row         int     // bytes with its index, at most
	}{{100, 100_000, 0.98, 245}, {400, 20_000, 0.95, 650}, {1400, 20_000, 0.95, 2150}} {
		l := newLab(t)
		l.setup(l.admin, fastpgcache.SetupConfig{})
		writer := l.open(l.dsn)
		writer.SetMaxOpenConns(1)
		exec := func(statement string) { t.Helper(); l.exec(writer, statement) }
		keys := c.keys
		exec(fmt.Sprintf(`INSERT INTO cache (key, value, expires_at, mark) SELECT 'k' || g, repeat('v', %d), now() + interval '1 h', txid_current()
			FROM generate_series(1, %d) g`, c.bytes, keys))
		row := l.text(l.admin, `SELECT (pg_relation_size('cache') + pg_indexes_size('cache')) / $1::bigint`, keys)
		l.want(l.admin, true, `SELECT $1::bigint <= $2::bigint`, row, c.row)
		loaded := l.text(l.admin, `SELECT pg_table_size('cache')`)
		const round, rounds = 200, 75
		for i := range rounds {
			exec(fmt.Sprintf(`DO $$ BEGIN FOR i IN 1 .. %d LOOP
				PERFORM cache_set(current_user, 'k' || k, repeat('w', %d), 1000) FROM (SELECT 1 + (random() * %d)::int AS k) k;
				COMMIT;
			END LOOP; END $$`, round, c.bytes, keys-1))
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
		t.Log(l.text(l.admin, `SELECT format('%s bytes: %s a row with index; %s of %s updates HOT, size %s after %s', $2::text, $3::text, n_tup_hot_upd, n_tup_upd,
			pg_table_size('cache'), $1::text) FROM pg_stat_user_tables WHERE relname = 'cache'`, loaded, c.bytes, row))
		l.want(l.admin, true, `SELECT n_tup_upd >= $1 AND n_tup_hot_upd >= $2::float8 * n_tup_upd FROM pg_stat_user_tables WHERE relname = 'cache'`, round*rounds, c.hot)
		l.want(l.admin, true, `SELECT pg_table_size('cache') <= 1.5 * $1::bigint`, loaded)
		l.want(l.admin, "CREATE UNIQUE INDEX cache_pkey ON public.cache USING btree (user_id, key)",
			`SELECT string_agg(pg_get_indexdef(indexrelid), ';') FROM pg_index WHERE indrelid = 'cache'::regclass`)
	}
}
