package conformance

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

var txTests = []test{
	{name: "ATransactionsWritesAreSeenOnCommit", run: testCommit},
	{name: "ATransactionsWritesAreGoneOnRollback", run: testRollback},
	{name: "ATransactionsCacheUsesItsConnectionAlone", run: testTxConnection, lone: true},
	{name: "ClosingATransactionsCacheDoesNothing", run: testTxClose},
	{name: "CleanupInATransactionIsAnError", run: testTxCleanup},
	{name: "BadInputLeavesTheTransactionAlive", run: testTxBadInput},
	{name: "AFinishedTransactionIsAnError", run: testTxDone},
	{name: "NothingIsRetriedInATransaction", run: testTxNoRetry, lone: true, here: true},
	{name: "ASerializationFailureIsRetried", run: testSerializationFailure, lone: true, here: true},
	{name: "ADeadlockIsRetried", run: testDeadlock, lone: true, here: true},
	{name: "AnEndedContextSpoilsNothingInATransaction", run: testTxEndedContext},
	{name: "ATransactionMayBeOfAnotherPool", run: testTxOfAnotherPool},
	{name: "WithoutATransactionEveryOperationIsAnError", run: testTxNil},
	{name: "RetriesEnd", run: testRetriesEnd, lone: true, here: true},
	{name: "RetriesLeaveStrictIsolation", run: testRetriesLeaveStrictIsolation, lone: true, here: true},
	{name: "RetriesEndWithTheContext", run: testRetriesEndWithContext, lone: true, here: true},
}

func begin(t *testing.T, c *fastpgcache.Cache) (*sql.Tx, *fastpgcache.Cache) {
	t.Helper()
	tx, err := c.DB().BeginTx(bounded(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tx.Rollback() })
	return tx, c.WithTx(tx)
}

func testCommit(s *suite, t *testing.T) {
	c := s.cache(t)
	mustSet(t, c, "gone", "v", 0)
	mustSet(t, c, "changed", "old", time.Hour)
	tx, in := begin(t, c)
	if deleted, err := in.Delete(bounded(t), "gone"); err != nil || !deleted {
		t.Errorf("delete: got %t, %v", deleted, err)
	}
	mustSet(t, in, "new", "v", 0)
	mustSet(t, in, "changed", "new", 0)
	wantMiss(t, in, "gone")
	wantHit(t, in, "new", "v")
	wantHit(t, in, "changed", "new")

	wantHit(t, c, "gone", "v")
	wantMiss(t, c, "new")
	wantHit(t, c, "changed", "old")
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	wantMiss(t, c, "gone")
	wantHit(t, c, "new", "v")
	wantHit(t, c, "changed", "new")
	wantTTL(t, c, "changed", fastpgcache.NoExpiry)
}

func testRollback(s *suite, t *testing.T) {
	c := s.cache(t)
	mustSet(t, c, "kept", "old", time.Hour)
	tx, in := begin(t, c)
	mustSet(t, in, "new", "v", 0)
	mustSet(t, in, "kept", "new", 0)
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	wantMiss(t, c, "new")
	wantHit(t, c, "kept", "old")
	wantTTL(t, c, "kept", time.Hour)
}

func testTxConnection(s *suite, t *testing.T) {
	dsn, _ := s.role(t)
	c := s.open(t, dsn)
	c.DB().SetMaxOpenConns(1)
	tx, in := begin(t, c)
	for _, op := range operations() {
		if !op.keyed {
			continue
		}
		if _, err := op.run(bounded(t), in, "k"); err != nil {
			t.Errorf("%s: %v", op.name, err)
		}
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	runEach(t, c, 1)
}

func testTxClose(s *suite, t *testing.T) {
	c := s.cache(t)
	tx, in := begin(t, c)
	mustSet(t, in, "k", "v", 0)
	if err := in.Close(); err != nil {
		t.Error(err)
	}
	wantHit(t, in, "k", "v")
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	wantHit(t, c, "k", "v")
}

func testTxCleanup(s *suite, t *testing.T) {
	c := s.cache(t)
	tx, in := begin(t, c)
	mustSet(t, in, "k", "v", 0)
	_, err := in.Cleanup(bounded(t))
	wantForm(t, "cleanup", err)
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	wantHit(t, c, "k", "v")
}

func testTxBadInput(s *suite, t *testing.T) {
	c := s.cache(t)
	tx, in := begin(t, c)
	mustSet(t, in, "k", "no number", 0)
	wantError(t, "set", in.Set(bounded(t), "", "v", 0), fastpgcache.ErrInvalidKey)
	wantError(t, "set", in.Set(bounded(t), "k", "v", -2), fastpgcache.ErrInvalidTTL)
	wantForm(t, "set", in.Set(bounded(t), "k", func() {}, 0))
	found, err := in.Get(bounded(t), "k", new(int))
	wantForm(t, "get", err)
	if !found {
		t.Error("got a miss, want found")
	}
	_, err = in.Get(bounded(t), "k", "no pointer")
	wantForm(t, "get", err)
	wantHit(t, in, "k", "no number")
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	wantHit(t, c, "k", "no number")
}

func testTxDone(s *suite, t *testing.T) {
	c := s.cache(t)
	tx, in := begin(t, c)
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	for _, op := range operations() {
		if op.keyed {
			_, err := op.run(bounded(t), in, "k")
			wantError(t, op.name, err, sql.ErrTxDone)
		}
	}
}

// lose has the statement of run lose to a concurrent one: both write key, and the
// other commits first. Under repeatable read that is a serialization failure.
func (s *suite) lose(t *testing.T, role, key string, run func() error) error {
	t.Helper()
	tx, err := s.admin.BeginTx(bounded(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	const sql = `UPDATE {schema}.cache SET value = 'concurrent' WHERE user_id = $1 AND key = $2`
	if err := s.each(tx, sql, role, key); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- run() }()
	await(t, "the statement waits for the row", func() bool { return s.waiting(t, role) > 0 })
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	return <-done
}

func testTxNoRetry(s *suite, t *testing.T) {
	dsn, role := s.role(t)
	c := s.open(t, dsn)
	mustSet(t, c, "k", "v", 0)
	tx, err := c.DB().BeginTx(bounded(t), &sql.TxOptions{Isolation: sql.LevelRepeatableRead})
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	in := c.WithTx(tx)
	wantHit(t, in, "k", "v")
	err = s.lose(t, role, "k", func() error { return in.Set(bounded(t), "k", "mine", 0) })
	wantState(t, "set", err, "40001")
}

func testSerializationFailure(s *suite, t *testing.T) {
	for _, level := range []string{"'repeatable read'", "serializable"} {
		dsn, role := s.role(t, "default_transaction_isolation="+level)
		c := s.open(t, dsn)
		for _, op := range operations() {
			if !op.keyed || op.reads {
				continue
			}
			mustSet(t, c, "k", "v", time.Minute)
			err := s.lose(t, role, "k", func() error {
				found, err := op.run(bounded(t), c, "k")
				if err == nil && !op.stores && !found {
					return errors.New("found nothing")
				}
				return err
			})
			if err != nil {
				t.Errorf("%s: %s: %v", level, op.name, err)
			}
		}
		// The one that lost came after the one that won.
		mustSet(t, c, "k", "v", 0)
		if err := s.lose(t, role, "k", func() error { return c.Set(bounded(t), "k", "mine", 0) }); err != nil {
			t.Error(err)
		}
		wantHit(t, c, "k", "mine")
	}
}

// testDeadlock has the cache's statement close the circle, and so be the one that
// the server rolls back: a trigger makes it hold what another session waits for,
// and then it waits for a row of that session.
func testDeadlock(s *suite, t *testing.T) {
	s.setup(t, fastpgcache.SetupConfig{Schema: "deadlock"})
	t.Cleanup(func() { s.exec(t, `DROP SCHEMA deadlock CASCADE`) })
	s.exec(t,
		`CREATE TABLE deadlock.armed ()`,
		`INSERT INTO deadlock.armed DEFAULT VALUES`,
		`CREATE SEQUENCE deadlock.attempts`,
		// Of this database: others have the same test.
		`CREATE VIEW deadlock.meeting AS SELECT granted FROM pg_locks l JOIN pg_database d ON d.oid = l.database
		WHERE d.datname = current_database() AND l.locktype = 'advisory' AND l.objid = 42`,
		`CREATE FUNCTION deadlock.meet() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			PERFORM nextval('deadlock.attempts');
			WHILE EXISTS (SELECT FROM deadlock.armed) LOOP
				PERFORM pg_advisory_xact_lock(42);
				EXIT WHEN EXISTS (SELECT FROM deadlock.meeting WHERE NOT granted);
				PERFORM pg_sleep(0.001);
			END LOOP;
			RETURN NEW;
		END $$`)
	// As superuser, who alone may set it: whose deadlock_timeout runs out first, loses.
	c := s.open(t, s.dsn+" deadlock_timeout=10", inSchema("deadlock"))
	mustSet(t, c, "k", "old", 0)
	s.exec(t, `CREATE TRIGGER meet BEFORE INSERT ON deadlock.cache FOR EACH ROW EXECUTE FUNCTION deadlock.meet()`)

	tx, err := s.admin.BeginTx(bounded(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	for _, statement := range []string{
		`SET LOCAL deadlock_timeout = '1min'`,
		`DELETE FROM deadlock.armed`,
		`UPDATE deadlock.cache SET value = 'concurrent' WHERE key = 'k'`,
	} {
		if _, err := tx.Exec(statement); err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan error, 1)
	go func() { done <- c.Set(bounded(t), "k", "mine", 0) }()
	await(t, "the cache's statement has got to the trigger", func() bool {
		return one[bool](t, s.admin, `SELECT EXISTS (SELECT FROM deadlock.meeting)`)
	})
	if _, err := tx.Exec(`SELECT pg_advisory_xact_lock(42)`); err != nil {
		t.Fatalf("the wrong side lost: %v", err)
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	wantHit(t, c, "k", "mine")
	if got := one[int](t, s.admin, `SELECT last_value FROM deadlock.attempts`); got < 2 {
		t.Errorf("got %d attempt: this test saw no deadlock", got)
	}
}

// failing sets up a schema whose every write is a serialization failure, where the
// condition holds. The cache's sessions ask for serializable transactions.
func (s *suite) failing(t *testing.T, schema, condition string) *fastpgcache.Cache {
	t.Helper()
	s.setup(t, fastpgcache.SetupConfig{Schema: schema})
	t.Cleanup(func() { s.exec(t, `DROP SCHEMA `+schema+` CASCADE`) })
	s.exec(t,
		`CREATE SEQUENCE `+schema+`.attempts`,
		`CREATE FUNCTION `+schema+`.fail() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
		BEGIN
			PERFORM nextval('`+schema+`.attempts');
			IF `+condition+` THEN
				RAISE EXCEPTION 'lost again' USING ERRCODE = 'serialization_failure';
			END IF;
			RETURN NEW;
		END $$`,
		`CREATE TRIGGER fail BEFORE INSERT ON `+schema+`.cache FOR EACH ROW EXECUTE FUNCTION `+schema+`.fail()`)
	dsn, role := s.role(t)
	s.exec(t, `ALTER ROLE `+role+` SET default_transaction_isolation = 'serializable'`)
	return s.open(t, dsn, inSchema(schema))
}

// Beside many writers, serializable transactions that take long lose each time.
func testRetriesLeaveStrictIsolation(s *suite, t *testing.T) {
	c := s.failing(t, "strict", `current_setting('transaction_isolation') = 'serializable'`)
	if err := c.Set(bounded(t), "k", "v", 0); err != nil {
		t.Error("set: ", err)
	}
	items := map[string]any{}
	for i := range 3_000 { // more than a statement takes: one transaction
		items[fmt.Sprint("k", i)] = "v"
	}
	if err := c.SetMany(bounded(t), items, 0); err != nil {
		t.Error("set many: ", err)
	}
	if got := one[int](t, s.admin, `SELECT count(*) FROM strict.cache`); got != 3_001 {
		t.Errorf("%d entries, want 3,001", got)
	}
}

func testRetriesEnd(s *suite, t *testing.T) {
	c := s.failing(t, "failing", "true")
	wantState(t, "set", c.Set(bounded(t), "k", "v", 0), "40001")
	if got := one[int](t, s.admin, `SELECT last_value FROM failing.attempts`); got < 2 || got > 10 {
		t.Errorf("got %d attempts, want a few", got)
	}
}

func testRetriesEndWithContext(s *suite, t *testing.T) {
	c := s.failing(t, "failing2", "true")
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*time.Millisecond)
			defer cancel()
			for ctx.Err() == nil {
				if err := c.Set(ctx, fmt.Sprint(i), "v", 0); err == nil {
					t.Error("got no error")
				} else if ctx.Err() != nil {
					wantForm(t, "set", err)
				}
			}
			wantError(t, "set", c.Set(ctx, fmt.Sprint(i), "v", 0), context.DeadlineExceeded)
		})
	}
	wg.Wait()
}

func testTxEndedContext(s *suite, t *testing.T) {
	c := s.cache(t)
	mustSet(t, c, "k", "v", 0)
	wantHit(t, c, "k", "v") // both statements are prepared now
	tx, in := begin(t, c)
	ended, cancel := context.WithCancel(bounded(t))
	cancel()
	if _, err := in.Get(ended, "k", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("get: got %v, want %v", err, context.Canceled)
	}
	if err := in.Set(ended, "k", "v", 0); !errors.Is(err, context.Canceled) {
		t.Errorf("set: got %v, want %v", err, context.Canceled)
	}
	wantHit(t, in, "k", "v")
	mustSet(t, in, "k", "new", 0)
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	wantHit(t, c, "k", "new")
}

func testTxOfAnotherPool(s *suite, t *testing.T) {
	dsn, _ := s.role(t)
	c, other := s.open(t, dsn), s.open(t, dsn)
	for _, state := range []string{"cold", "prepared"} {
		tx, err := other.DB().BeginTx(bounded(t), nil)
		if err != nil {
			t.Fatal(err)
		}
		mustSet(t, c.WithTx(tx), "k", state, 0)
		wantHit(t, c.WithTx(tx), "k", state)
		if err := tx.Commit(); err != nil {
			t.Fatal(err)
		}
		wantHit(t, c, "k", state)
		mustSet(t, c, "k", "between", 0)
	}
}

func testTxNil(s *suite, t *testing.T) {
	c := s.cache(t)
	in := c.WithTx(nil)
	if err := in.Set(bounded(t), "k", "v", 0); err == nil {
		t.Error("set: got no error")
	}
	if _, err := in.Get(bounded(t), "k", nil); err == nil {
		t.Error("get: got no error")
	}
	if err := in.Close(); err != nil {
		t.Error(err)
	}
	wantMiss(t, c, "k")
	mustSet(t, c, "k", "v", 0)
}
