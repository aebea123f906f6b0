package fastpgcache_test

import (
	"database/sql"
	"fmt"
	"os/exec"
	"testing"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// fit does bites of cache_fit until its end, or n of them.
func (l *lab) fit(db *sql.DB, user string, n int) (evicted int64) {
	l.Helper()
	for next := (sql.NullInt64{Valid: true}); next.Valid && n != 0; n-- {
		var gone sql.NullInt64
		if err := db.QueryRow(`SELECT evicted, next_bite FROM cache_fit($1, $2)`, user, next.Int64).Scan(&gone, &next); err != nil {
			l.Fatal(err)
		}
		evicted += gone.Int64
	}
	return evicted
}

// write stores entries from to to of user, in a transaction each of hundred.
func (l *lab) write(db *sql.DB, from, to int) {
	l.Helper()
	for ; from < to; from += 100 {
		l.exec(db, `INSERT INTO cache (key, value, mark) SELECT 'k' || g, repeat('v', 100), txid_current() FROM generate_series($1::integer, $2::integer) g`, from, from+99)
	}
}

// entryBytes is about what one of write's takes.
const entryBytes = 100 + 5 + 128

func TestTheOldestGoFirstAndWhatWasReadLater(t *testing.T) {
	l := newLab(t)
	l.setup(l.admin, fastpgcache.SetupConfig{MaxBytes: 2000 * entryBytes})
	user, db := l.role()
	l.write(db, 0, 1000)
	l.exec(db, `UPDATE cache SET mark = 0 WHERE key IN ('k1', 'k2', 'k3')`)
	l.want(db, int64(0), `SELECT count(*) FROM cache_change WHERE keys <> ARRAY[]::text[] AND 'k1' = ANY (keys) AND cardinality(keys) > 1`)
	l.write(db, 1000, 4000)
	if evicted := l.fit(db, user, -1); evicted < 1900 || evicted > 2300 {
		t.Errorf("evicted %d", evicted)
	}
	l.want(db, int64(3), `SELECT count(*) FROM cache WHERE key IN ('k1', 'k2', 'k3')`)
	l.want(db, int64(1000), `SELECT count(*) FROM cache WHERE substr(key, 2)::integer >= 3000`)
	l.want(db, true, `SELECT (SELECT count(*) FROM cache WHERE substr(key, 2)::integer BETWEEN 4 AND 1000) < 100`)
	l.want(db, true, `SELECT evicted = 4000 - entries AND bytes < 2000 * 233 FROM cache_epoch`)
	// The feed has heard of each.
	l.want(db, true, `SELECT count(DISTINCT k) = (SELECT evicted FROM cache_epoch) FROM cache_change, unnest(keys) k WHERE k NOT IN (SELECT key FROM cache)`)
	if evicted := l.fit(db, user, -1); evicted != 0 {
		t.Errorf("evicted %d more", evicted)
	}
	// The command line of those who know only SQL, and the owner's.
	l.write(db, 4000, 8000)
	l.want(l.admin, int64(0), `SELECT cache_cleanup()`)
	l.want(db, true, `SELECT sum(octet_length(key) + pg_column_size(value) + 128) <= 2000 * 233 FROM cache`)
}

// One transaction that wrote more than all there may be loses a share, chosen by chance.
func TestABulkLoadLosesAShare(t *testing.T) {
	l := newLab(t)
	l.setup(l.admin, fastpgcache.SetupConfig{MaxBytes: 2000 * entryBytes})
	user, db := l.role()
	l.exec(db, `INSERT INTO cache (key, value, mark) SELECT 'k' || g, repeat('v', 100), txid_current() FROM generate_series(1, 20000) g`)
	l.fit(db, user, -1)
	var left, early int
	if err := db.QueryRow(`SELECT count(*), count(*) FILTER (WHERE substr(key, 2)::integer <= 10000) FROM cache`).Scan(&left, &early); err != nil {
		t.Fatal(err)
	}
	if left < 1700 || left > 2000 || early < left/3 || early > left*2/3 {
		t.Errorf("%d are left, %d of the first half", left, early)
	}
	// Each time others: those that the last one left are not safe.
	for from := 30_000; from < 32_000; from += 500 {
		l.write(db, from, from+500)
		l.fit(db, user, 100)
		l.want(db, true, `SELECT count(*) BETWEEN 1700 AND 2000 FROM cache`)
	}
}

// over writes twice as much as there may be, and fails unless a cleanup removes the rest.
func (l *lab) over(db *sql.DB, name string) {
	l.Helper()
	l.exec(db, `DELETE FROM cache`)
	l.write(db, 0, 4000)
	l.exec(db, `UPDATE cache_epoch SET sized_at = sized_at - interval '2 s' WHERE sized_at < now()`)
	l.want(l.admin, int64(0), `SELECT cache_cleanup()`)
	if left := l.text(db, `SELECT count(*) BETWEEN 1700 AND 2000 FROM cache`); left != "true" {
		l.Errorf("%s: %s are left", name, l.text(db, `SELECT count(*) FROM cache`))
	}
}

// A process that dies in the middle of a walk, a row that another server wrote, and what a
// hostile user puts there stop nobody, nor does it make the owner fail.
func TestNothingOfAWalkIsStuck(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.setup(l.admin, fastpgcache.SetupConfig{MaxBytes: 2000 * entryBytes})
	// It moves rows to pages that a walk has behind it: see below.
	l.exec(l.admin, `ALTER TABLE cache SET (autovacuum_enabled = off)`)
	user, db := l.role()
	l.over(db, "nothing")
	for _, bites := range []int{1, 3, 5} {
		l.write(db, 10000, 14000)
		l.fit(db, user, bites)
		l.over(db, fmt.Sprintf("died after %d bites", bites))
	}
	// What is written to pages that the dead process had walked, the next walk finds.
	l.write(db, 10000, 14000)
	l.fit(db, user, 3)
	l.exec(db, `DELETE FROM cache`)
	l.exec(l.admin, `VACUUM cache`)
	l.write(db, 0, 4000)
	l.exec(db, `UPDATE cache_epoch SET sized_at = sized_at - interval '2 s'`)
	for range 2 {
		l.want(l.admin, int64(0), `SELECT cache_cleanup()`)
	}
	l.want(db, true, `SELECT count(*) BETWEEN 1700 AND 2000 FROM cache`)

	l.fit(db, user, 1) // another process is at it
	l.write(db, 20000, 24000)
	l.want(db, nil, `SELECT removed FROM cache_fit(current_user, 7)`)
	for _, state := range []string{
		`sizing = 'b0', sized_at = now() + interval '1 year', bites = 1`,
		`sizing = 'b0', sized_at = now() - interval '1 year', bites = 1`,
		`sizing = 'b0', sized_at = now() - interval '5 s', bites = 1, since = 9000000000000, sums = array_fill(0::real, ARRAY[128]), counted = 1, cut = ARRAY[9e12, 9e12, 65536, 9e12, 9e12, 65536, 0]`,
		`sizing = 'what', sized_at = now() - interval '5 s'`,
		`sizing = 'b9999999999', sized_at = now() - interval '5 s', bites = 5, since = 10, sums = array_fill(0::real, ARRAY[128]), counted = 1`,
		`sizing = 'k999999999999999:', sized_at = now() - interval '5 s', bites = 999999999, since = 10, sums = array_fill('1e15'::real, ARRAY[128]), counted = 1000000000000000`,
		`sizing = 'k0:', sized_at = now() - interval '5 s', bites = 5, since = 10, sums = array_fill(0::real, ARRAY[128], ARRAY[0]), counted = 1`,
		`sizing = 'k0:', sized_at = now() - interval '5 s', bites = 5, since = 10, sums = array_fill('NaN'::real, ARRAY[128]), counted = 1`,
		`sizing = 'k0:', sized_at = now() - interval '5 s', bites = 5, since = 10, sums = array_fill(0::real, ARRAY[128]), counted = 1, cut = '{NaN,NaN,NaN,NaN,NaN,NaN,NaN}'`,
		`sizing = 'k0:', sized_at = now() - interval '5 s', bites = 5, since = 10, sums = array_fill(0::real, ARRAY[128]), counted = 1, cut = '{1e300,-1e300,Infinity,1,1,1,1}'`,
		`evicted = 9223372036854775807, entries = -1, bytes = 9223372036854775807, half = -9223372036854775807, written = 9223372036854775807, begun = 9223372036854775807, growth = 'NaN'`,
		`evicted = -9223372036854775808, entries = 9223372036854775807, bytes = -9223372036854775808, written = -9223372036854775808, begun = -9223372036854775808, growth = '-Infinity'`,
	} {
		if _, err := db.Exec(`UPDATE cache_epoch SET ` + state); err != nil {
			t.Logf("%s: %v", state, err)
		}
		l.exec(l.admin, `SELECT cache_cleanup()`) // may finish, or throw away, what it finds
		l.over(db, state)
	}
	// Locked, by a login that leaves.
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec(`SELECT FROM cache_epoch FOR UPDATE`); err != nil {
		t.Fatal(err)
	}
	l.want(l.admin, int64(0), `SELECT cache_cleanup()`)
}

// Neither a crash of the server in the middle of a walk, nor a restart, nor a dump that was
// made then and is restored, leaves something stuck.
func TestAWalkThatTheServerDidNotOutlive(t *testing.T) {
	t.Parallel()
	dump, err := exec.LookPath("pg_dump")
	if err != nil {
		t.Skip(err)
	}
	ctx := t.Context()
	server := pgtest.Own(t, pgtest.Config{})
	l := labOn(t, server.Database(t))
	l.setup(l.admin, fastpgcache.SetupConfig{MaxBytes: 2000 * entryBytes})
	user, db := l.role()
	l.admin.SetMaxIdleConns(0)
	db.SetMaxIdleConns(0)
	halfway := func() {
		l.write(db, 10000, 14000)
		l.fit(db, user, 3)
		l.want(db, true, `SELECT sizing IS NOT NULL FROM cache_epoch`)
	}
	halfway()
	if err := server.Restart(ctx); err != nil {
		t.Fatal(err)
	}
	l.want(db, true, `SELECT sizing IS NOT NULL FROM cache_epoch`)
	l.over(db, "restarted")
	halfway()
	text, err := exec.CommandContext(ctx, dump, "-d", l.dsn, "--inserts").Output()
	if err != nil {
		t.Skipf("%v: %s", err, err.(*exec.ExitError).Stderr)
	}
	if err := server.Crash(ctx); err != nil {
		t.Fatal(err)
	}
	l.over(db, "crashed")
	restored := labOn(t, server.Database(t))
	restored.restore(string(text))
	theirs := restored.open(pgtest.WithUser(restored.dsn, user))
	restored.want(theirs, true, `SELECT sizing IS NOT NULL FROM cache_epoch`)
	restored.over(theirs, "restored")
}

// What is being loaded is neither touched nor evicted: the load looks whether it changes,
// and whether a write came in between.
func TestALeaseKeepsWhatItIsAbout(t *testing.T) {
	l := newLab(t)
	l.setup(l.admin, fastpgcache.SetupConfig{MaxBytes: 2000 * entryBytes})
	user, db := l.role()
	l.write(db, 0, 4000)
	l.exec(db, `INSERT INTO cache_lease (key, holder, expires_at) VALUES ('k1', 'h', now() + interval '10 s')`)
	l.fit(db, user, -1)
	l.want(db, int64(1), `SELECT count(*) FROM cache WHERE key = 'k1'`)
	l.want(db, int64(1), `SELECT count(*) FROM cache_lease`)
}
