package fastpgcache

import (
	"context"
	"database/sql"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/lib/pq"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

func TestAnotherProcessesWritesAreSeenWithinMaxStaleness(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	const staleness = 20 * time.Millisecond
	c := openFiltered(t, dsn, Config{MaxStaleness: staleness})
	other := openCache(t, dsn, Config{})
	for i := range 20 {
		key := fmt.Sprint(i)
		wantMiss(t, c, key)
		check(t, other.Set(ctx, key, 1, 0))
		for committed := time.Now(); time.Since(committed) <= staleness; { // asks all the while
			_, err := c.Get(ctx, key, nil)
			check(t, err)
		}
		wantHit(t, c, key)
	}
	if s := c.Stats(); s.Local.Misses < 20 || s.Local.CatchUps < 5 {
		t.Errorf("the filter took no part: %+v", s)
	}
}

// Keys come with the commit of their transaction, and however late that is.
func TestLateCommitsAreCaughtUp(t *testing.T) {
	dsn, _ := setUp(t)
	c := openFiltered(t, dsn, Config{MaxStaleness: hour})
	db := openDB(t, dsn)
	begin := func(statements ...string) *sql.Tx {
		tx, err := db.Begin()
		check(t, err)
		t.Cleanup(func() { tx.Rollback() })
		for _, s := range statements {
			if _, err := tx.Exec(s); err != nil {
				t.Fatal(s, err)
			}
		}
		return tx
	}
	insert := func(key string) string { return `INSERT INTO cache (key, value) VALUES ('` + key + `', '')` }

	long := begin(insert("long"))
	back := begin(insert("back"))
	nested := begin(insert("nested"), `SAVEPOINT a`, insert("in savepoint"), `SAVEPOINT b`, insert("rolled back to savepoint"), `ROLLBACK TO b`)
	begin(insert("prepared"), `PREPARE TRANSACTION 'late'`).Commit()
	t.Cleanup(func() { db.Exec(`ROLLBACK PREPARED 'late'`) })
	begin(`SELECT 1`, insert("short")).Commit()
	for range 3 { // the later snapshots run only from these on
		begin(`SELECT txid_current()`).Commit()
		catchUp(t, c)
	}
	wantHit(t, c, "short")
	before := c.Stats().Statements
	for _, key := range []string{"long", "back", "nested", "in savepoint", "prepared"} {
		wantMiss(t, c, key)
	}
	if got := c.Stats().Statements - before; got != 0 {
		t.Errorf("uncommitted keys are in the filter: got %d statements, want none", got)
	}
	check(t, long.Commit())
	check(t, back.Rollback())
	catchUp(t, c)
	wantHit(t, c, "long")
	wantMiss(t, c, "back")
	check(t, nested.Commit())
	_, err := db.Exec(`COMMIT PREPARED 'late'`)
	check(t, err)
	catchUp(t, c)
	for _, key := range []string{"nested", "in savepoint", "prepared"} {
		wantHit(t, c, key)
	}
	wantMiss(t, c, "rolled back to savepoint")
}

func TestAnExpiredEntryThatIsRevivedIsSeen(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	other := openCache(t, dsn, Config{})
	check(t, other.Set(ctx, "k", 1, time.Millisecond))
	eventually(t, "expiry", func() bool {
		found, _ := other.Get(ctx, "k", nil)
		return !found
	})
	c := openFiltered(t, dsn, Config{MaxStaleness: hour})
	wantMiss(t, c, "k") // which must not take it out of the filter
	check(t, other.Set(ctx, "k", 2, 0))
	wantHit(t, c, "k")
}

func TestANewEpochMakesANewFilter(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	server := pgtest.Own(t, pgtest.Config{Settings: map[string]string{"synchronous_commit": "on"}}) // the tables survive
	dsn := server.Database(t)
	db := openDB(t, dsn)
	db.SetMaxIdleConns(0)
	exec := func(statements ...string) {
		t.Helper()
		for _, s := range statements {
			if _, err := db.Exec(s); err != nil {
				t.Fatal(s, err)
			}
		}
	}
	check(t, Setup(ctx, db, SetupConfig{}))
	// Rows of which nobody hears.
	const restore = `
		ALTER TABLE cache DISABLE TRIGGER ALL;
		INSERT INTO cache (key, value) VALUES ('restored', '');
		ALTER TABLE cache ENABLE ALWAYS TRIGGER cache_changed_insert;
		ALTER TABLE cache ENABLE ALWAYS TRIGGER cache_changed_update;
		ALTER TABLE cache ENABLE ALWAYS TRIGGER cache_moved;
		ALTER TABLE cache ENABLE ALWAYS TRIGGER cache_deleted`
	c := openCache(t, dsn, Config{MaxStaleness: hour, OnError: func(err error) { t.Log(err) }})
	check(t, c.Set(ctx, "before", 1, 0))
	for _, change := range []struct {
		name string
		make func()
	}{
		{"SIGKILL", func() { check(t, server.Crash(ctx)) }},
		{"a clean restart", func() { check(t, server.Restart(ctx)) }},
		{"Setup with Force", func() { check(t, Setup(ctx, db, SetupConfig{Force: true})) }},
		{"DROP and CREATE of the table alone", func() {
			exec(`CREATE TABLE copy (LIKE cache INCLUDING ALL)`, `DROP TABLE cache`, `ALTER TABLE copy RENAME TO cache`)
			_, err := db.Exec(`COMMENT ON TABLE cache IS 'fastpgcache schema 1'`)
			check(t, err)
			check(t, Setup(ctx, db, SetupConfig{}))
		}},
		{"an epoch that is gone", func() { exec(`DELETE FROM cache_epoch`) }},
		{"another epoch", func() { exec(`UPDATE cache_epoch SET id = gen_random_uuid()`) }},
	} {
		t.Run(change.name, func(t *testing.T) {
			loadFilterAfter(t, c)
			check(t, c.Set(ctx, "kept", 1, 0))
			wantHit(t, c, "kept")
			change.make()
			outdate(c)
			eventually(t, "an answer", func() bool { // of what there is now
				found, err := c.Get(ctx, "kept", nil)
				if err != nil {
					return false
				}
				for range 20 { // from memory, too
					if again, err := c.Get(ctx, "kept", nil); again != found || err != nil {
						t.Errorf("got %v, %v, then %v", found, err, again)
					}
				}
				var there bool
				check(t, db.QueryRow(`SELECT EXISTS (SELECT FROM cache WHERE key = 'kept')`).Scan(&there))
				if found != there {
					t.Errorf("got %v, want %v", found, there)
				}
				return true
			})
			exec(`DELETE FROM cache WHERE key = 'restored'`, restore)
			eventually(t, "a filter of what is there now", func() bool {
				outdate(c)
				c.Get(ctx, "no such key", nil)
				found, err := c.Get(ctx, "restored", nil)
				return found && err == nil
			})
		})
	}
}

// loadFilterAfter waits for a filter that answers, whatever the last one met with.
func loadFilterAfter(t testing.TB, c *Cache) {
	t.Helper()
	before := c.Stats().Local.Misses
	eventually(t, "a filter that answers", func() bool {
		c.Get(context.Background(), "no such key", nil)
		return c.Stats().Local.Misses > before
	})
}

func TestXidsThatRunAgainMakeANewFilter(t *testing.T) {
	dsn, _ := setUp(t)
	c := openFiltered(t, dsn, Config{MaxStaleness: hour})
	eventually(t, "the goroutine's end", func() bool { return c.feed.busy.CompareAndSwap(false, true) })
	c.feed.position.snapshot.xmax += 1000
	c.feed.busy.Store(false)
	before := c.Stats().Local.FilterLoads
	catchUp(t, c)
	if got := c.Stats().Local.FilterLoads - before; got != 1 {
		t.Errorf("got %d rebuilds, want 1", got)
	}
}

func TestALookupThatEndsBehindACatchUpStartsNone(t *testing.T) {
	dsn, _ := setUp(t)
	c := openFiltered(t, dsn, Config{MaxStaleness: hour})
	eventually(t, "the goroutine's end", func() bool { return !c.feed.busy.Load() })
	before := c.Stats()
	c.feed.refresh()
	eventually(t, "the goroutine's end", func() bool { return !c.feed.busy.Load() })
	if after := c.Stats(); after.Local.CatchUps != before.Local.CatchUps || after.Local.FilterLoads != before.Local.FilterLoads {
		t.Errorf("got %d catch-ups and %d rebuilds more", after.Local.CatchUps-before.Local.CatchUps, after.Local.FilterLoads-before.Local.FilterLoads)
	}
}

func TestManyNewKeysAreCaughtUp(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dsn, _ := setUp(t)
	other := openCache(t, dsn, Config{})
	set := func(prefix string, n int) {
		items := make(map[string]any)
		for i := range n {
			items[fmt.Sprint(prefix, i)] = i
		}
		check(t, other.SetMany(ctx, items, 0))
	}
	set("at first ", 3000)
	c := openCache(t, dsn, Config{MaxStaleness: hour})
	c.local.misses.grown = 200000 // so that the filter need not grow
	loadFilter(t, c)
	want := func(resets int64, prefix string, n int) {
		t.Helper()
		before := c.Stats().Local.Resets
		catchUp(t, c)
		for i := 0; i < n; i += 97 {
			wantHit(t, c, fmt.Sprint(prefix, i))
		}
		if got := c.Stats().Local.Resets - before; got != resets {
			t.Errorf("%s: got %d resets, want %d", prefix, got, resets)
		}
	}
	for i := range 13 {
		set(fmt.Sprint("in short transactions ", i, " "), 999)
	}
	want(0, "in short transactions 12 ", 999)
	set("in one transaction ", newsKeys-1)
	want(0, "in one transaction ", newsKeys-1)
	if got, most := c.local.soon.Load(), c.local.latest()/2; got > int64(most) {
		t.Errorf("the next catch-up is due after %v, want sooner than %v", time.Duration(got), most)
	}
	set("in one too large ", newsKeys)
	want(1, "in one too large ", newsKeys)

	for _, n := range []int{newsKeys - 1, newsKeys} {
		tx, err := other.db.BeginTx(ctx, nil)
		check(t, err)
		items := make(map[string]any)
		for i := range n {
			items[fmt.Sprint("in one late transaction ", i)] = i
		}
		check(t, other.WithTx(tx).SetMany(ctx, items, 0))
		set("another ", 1)
		want(0, "another ", 1)
		check(t, tx.Commit())
		want(int64(n-(newsKeys-1)), "in one late transaction ", n)
	}
}

// A catch-up reads what is new and nothing else, whatever the planner knows.
func TestACatchUpReadsOnlyWhatIsNew(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dsn, admin := setUp(t)
	owner := openDB(t, admin)
	role := openDB(t, dsn)
	var user string
	check(t, role.QueryRow(`SELECT current_user`).Scan(&user))
	_, err := owner.Exec(`INSERT INTO cache (user_id, key, value) SELECT $1, 'k' || i, repeat('x', 100) FROM generate_series(1, 100000) i`, user)
	check(t, err)
	_, err = owner.Exec(`INSERT INTO cache_change (user_id, keys) SELECT $1, ARRAY['k' || i] FROM generate_series(1, 100000) i`, user)
	check(t, err)
	// A transaction that has put in as much and is not through.
	open, err := owner.Begin()
	check(t, err)
	defer open.Rollback()
	_, err = open.Exec(`INSERT INTO cache (user_id, key, value) SELECT $1, 'open' || i, repeat('x', 100) FROM generate_series(1, 30000) i`, user)
	check(t, err)
	var late int64
	check(t, open.QueryRow(`SELECT txid_current()`).Scan(&late))
	var ended int64
	check(t, owner.QueryRow(`SELECT txid_current()`).Scan(&ended))

	explain := func(db *sql.DB, label string) {
		t.Helper()
		conn, err := db.Conn(ctx)
		check(t, err)
		defer conn.Close()
		text := newStatements(Config{User: label}).new(newsSQL).text
		for _, mode := range []string{"force_custom_plan", "force_generic_plan"} {
			for _, literal := range []string{"PREPARE s(bigint, text, text, text) AS ", "PREPARE s(bigint, text, text, text, text) AS "} {
				if (label == "") != strings.Contains(literal, "(bigint, text, text, text)") {
					continue
				}
				var xmax int64
				check(t, conn.QueryRowContext(ctx, `SELECT txid_snapshot_xmax(txid_current_snapshot())`).Scan(&xmax))
				args := fmt.Sprintf(`%d, '%d,%d', '"public".cache', '"public".cache_change'`, xmax, late, ended)
				if label != "" {
					args += ", " + pq.QuoteLiteral(label)
				}
				for _, s := range []string{`SET plan_cache_mode = ` + mode, literal + text} {
					_, err := conn.ExecContext(ctx, s)
					check(t, err)
				}
				rows, err := conn.QueryContext(ctx, `EXPLAIN (ANALYZE, BUFFERS) EXECUTE s(`+args+`)`)
				check(t, err)
				var plan strings.Builder
				buffers := -1
				for rows.Next() {
					var line string
					check(t, rows.Scan(&line))
					plan.WriteString(line + "\n")
					if hit, ok := strings.CutPrefix(strings.TrimSpace(line), "Buffers: shared "); ok && buffers < 0 {
						buffers = 0
						for _, field := range strings.Fields(hit) {
							var n int
							if _, count, ok := strings.Cut(field, "="); ok {
								fmt.Sscan(count, &n)
								buffers += n
							}
						}
					}
				}
				check(t, rows.Err())
				if buffers < 0 || buffers > 50 || strings.Contains(plan.String(), "Seq Scan on cache") {
					t.Errorf("%s, label %q: %d buffers:\n%s", mode, label, buffers, plan.String())
				}
				_, err = conn.ExecContext(ctx, `DEALLOCATE s`)
				check(t, err)
			}
		}
	}
	for _, state := range []string{"", `ANALYZE cache, cache_change`, `VACUUM cache, cache_change`} {
		if state != "" {
			_, err := owner.Exec(state)
			check(t, err)
		}
		explain(role, "")
		explain(owner, user)
		explain(owner, "")
	}
}

// PostgreSQL rounds what it sends as text: a value would outlive its TTL. Found by scripts/prove.
func TestNothingIsAnsweredFromMemoryWhereTimesAreRounded(t *testing.T) {
	dsn, admin := setUp(t)
	for _, digits := range []string{"0", "-15", "1", "3"} {
		_, err := openDB(t, admin).Exec(`ALTER ROLE ` + roleOf(t, dsn) + ` SET extra_float_digits = ` + digits)
		check(t, err)
		c := openCache(t, dsn, Config{MaxStaleness: hour, OnError: func(error) {}})
		check(t, c.Set(t.Context(), "k", "v", time.Hour))
		err = c.feed.catchUp(t.Context())
		if rounded := digits < "1"; (err != nil) != rounded || (c.local.kept.current.Load() == nil) != rounded {
			t.Errorf("%s: got %v", digits, err)
		}
	}
}
