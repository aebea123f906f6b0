package conformance

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

var errorTests = []test{
	{name: "AMissIsNeverAnError", run: testMiss},
	{name: "AnEndedContextIsItsError", run: testEndedContext},
	{name: "AContextThatEndsDuringAStatementIsItsError", run: testContextDuringStatement, lone: true, here: true},
	{name: "TheServersErrorHasItsSQLSTATE", run: testSQLState, lone: true},
	{name: "TheConnectorsErrorIsWrapped", run: testConnectorsError, lone: true},
	{name: "WithoutATableIsErrNotSetUp", run: testNotSetUp, lone: true, here: true},
	{name: "WithoutRightsIsErrNotPermitted", run: testNotPermitted, lone: true},
	{name: "ReadsWriteNothing", run: testReadsWriteNothing, lone: true},
	{name: "KilledSessionsAreReplaced", run: testKilledSessions, lone: true},
	{name: "ALiveCacheOutlivesAForcedSetup", run: testForcedSetup},
	{name: "AFailedPrepareIsNotKept", run: testFailedPrepare, lone: true},
}

func testMiss(s *suite, t *testing.T) {
	c := s.cache(t)
	eachOperation(t, func(t *testing.T, op operation) {
		if op.stores {
			return
		}
		if found, err := op.run(bounded(t), c, "absent"); err != nil || found {
			t.Errorf("got %t, %v, want nothing found", found, err)
		}
	})
}

// endedContexts are contexts that have ended, under their errors.
func endedContexts(t *testing.T) map[error]context.Context {
	t.Helper()
	cancelled, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("a cause"))
	deadline, cancel2 := context.WithDeadline(t.Context(), time.Now())
	cancel2()
	return map[error]context.Context{context.Canceled: cancelled, context.DeadlineExceeded: deadline}
}

func testEndedContext(s *suite, t *testing.T) {
	c := s.cache(t)
	for _, warm := range []bool{false, true} {
		if warm {
			runEach(t, c, 1)
		}
		eachOperation(t, func(t *testing.T, op operation) {
			for want, ctx := range endedContexts(t) {
				_, err := op.run(ctx, c, "k")
				wantError(t, op.name, err, want)
			}
		})
	}
}

// endingContext ends when it is told to, as if its deadline had passed.
type endingContext struct {
	context.Context
	done chan struct{}
}

func (c *endingContext) Done() <-chan struct{} { return c.done }

func (c *endingContext) Err() error {
	select {
	case <-c.done:
		return context.DeadlineExceeded
	default:
		return nil
	}
}

// testContextDuringStatement ends each context when the server has the statement.
// Not before: where a context ends just as lib/pq sends its statement, the request
// to cancel it may come first, and then lib/pq waits for the statement to end.
func testContextDuringStatement(s *suite, t *testing.T) {
	dsn, role := s.role(t)
	c := s.open(t, dsn)
	eachOperation(t, func(t *testing.T, op operation) {
		for _, want := range []error{context.DeadlineExceeded, context.Canceled} {
			ctx, end := context.WithCancelCause(bounded(t))
			stop := func() { end(errors.New("a cause")) }
			if want == context.DeadlineExceeded {
				ending := &endingContext{t.Context(), make(chan struct{})}
				ctx, stop = ending, func() { close(ending.done) }
			}
			unlock := s.lock(t)
			done := make(chan error, 1)
			go func() {
				_, err := op.run(ctx, c, "k")
				done <- err
			}()
			statements := 1
			if op.all {
				statements = len(s.schemas)
			}
			await(t, "the statement waits", func() bool { return s.waiting(t, role) == statements })
			stop()
			select {
			case err := <-done:
				wantError(t, op.name, err, want)
			case <-time.After(patience):
				t.Fatal("never returned")
			}
			await(t, "the server gives up what nobody waits for", func() bool { return s.waiting(t, role) == 0 })
			unlock()
			// The first time round this prepares it, so that the second cancels
			// what is prepared.
			if _, err := op.run(bounded(t), c, "k"); err != nil {
				t.Errorf("after the lock: %v", err)
			}
		}
	})
}

// lock makes every statement on the table wait until unlock.
func (s *suite) lock(t *testing.T) (unlock func()) {
	t.Helper()
	tx, err := s.admin.BeginTx(bounded(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.each(tx, `LOCK TABLE {schema}.cache IN ACCESS EXCLUSIVE MODE`); err != nil {
		t.Fatal(err)
	}
	return func() { tx.Rollback() }
}

// waiting is how many of role's sessions wait for a lock.
func (s *suite) waiting(t *testing.T, role string) int {
	t.Helper()
	return one[int](t, s.admin, `SELECT count(*) FROM pg_stat_activity WHERE usename = $1 AND wait_event_type = 'Lock'`, role)
}

func testSQLState(s *suite, t *testing.T) {
	const queryCanceled = "57014"
	dsn, _ := s.role(t, "statement_timeout=20")
	c := s.open(t, dsn)
	defer s.lock(t)()
	eachOperation(t, func(t *testing.T, op operation) {
		_, err := op.run(bounded(t), c, "k")
		wantState(t, op.name, err, queryCanceled)
		for _, other := range []error{
			context.Canceled, context.DeadlineExceeded, fastpgcache.ErrClosed, fastpgcache.ErrNotSetUp, fastpgcache.ErrNotPermitted,
		} {
			if errors.Is(err, other) {
				t.Errorf("%v is %v", err, other)
			}
		}
	})
}

func testConnectorsError(s *suite, t *testing.T) {
	c, _ := s.offline(t)
	eachOperation(t, func(t *testing.T, op operation) {
		_, err := op.run(bounded(t), c, "k")
		wantError(t, op.name, err, errOffline)
	})
}

func testNotSetUp(s *suite, t *testing.T) {
	s.exec(t, `CREATE SCHEMA "not set up"`, `GRANT ALL ON SCHEMA "not set up" TO PUBLIC`)
	t.Cleanup(func() { s.exec(t, `DROP SCHEMA "not set up" CASCADE`) })
	dsn, _ := s.role(t)
	for _, schema := range []string{"not set up", "not even a schema"} {
		c := s.open(t, dsn, inSchema(schema))
		for range 2 { // what fails at first is tried again
			for _, op := range operations() {
				_, err := op.run(bounded(t), c, "k")
				wantError(t, op.name, err, fastpgcache.ErrNotSetUp)
				for _, want := range []string{"fastpgcache-admin", "fastpgcache.Setup", schema} {
					if err != nil && !strings.Contains(err.Error(), want) {
						t.Errorf("%s: got error %q, want it to name %q", op.name, err, want)
					}
				}
				var e interface{ SQLState() string }
				if !errors.As(err, &e) {
					t.Errorf("%s: got error %v, want it to wrap the driver's", op.name, err)
				}
			}
		}
	}

	// The same cache works once it is set up.
	c := s.open(t, dsn, inSchema("not set up"))
	if _, err := c.Exists(bounded(t), "k"); !errors.Is(err, fastpgcache.ErrNotSetUp) {
		t.Errorf("got %v, want ErrNotSetUp", err)
	}
	s.setup(t, fastpgcache.SetupConfig{Schema: "not set up"})
	runEach(t, c, 1)
}

func testNotPermitted(s *suite, t *testing.T) {
	_, grantee := s.role(t)
	stranger, _ := s.role(t)
	s.setup(t, fastpgcache.SetupConfig{Schema: "granted", Grantee: grantee})
	t.Cleanup(func() { s.exec(t, `DROP SCHEMA granted CASCADE`) })
	for _, usage := range []bool{false, true} {
		if usage {
			s.exec(t, `GRANT USAGE ON SCHEMA granted TO PUBLIC`)
		}
		c := s.open(t, stranger, inSchema("granted"))
		for _, op := range operations() {
			_, err := op.run(bounded(t), c, "k")
			wantError(t, op.name, err, fastpgcache.ErrNotPermitted)
			wantState(t, op.name, err, "42501")
		}
	}
}

func testReadsWriteNothing(s *suite, t *testing.T) {
	dsn, role := s.role(t)
	c := s.open(t, dsn)
	mustSet(t, c, "k", "v", time.Hour)
	mustSet(t, c, "expired", "v", time.Hour)
	s.expire(t, c, "expired")
	// A row's place and its transactions tell every change and every lock.
	stamp := `SELECT string_agg(row, ', ' ORDER BY row) FROM ` +
		s.union(`SELECT concat_ws(' ', key, ctid, xmin, xmax) AS row FROM {schema}.cache WHERE user_id = $1`)
	before := one[string](t, s.admin, stamp, role)

	readOnly := s.open(t, dsn+" default_transaction_read_only=on")
	eachOperation(t, func(t *testing.T, op operation) {
		for _, key := range []string{"k", "expired", "absent"} {
			if !op.reads {
				if op.name == "set many" && len(s.schemas) > 1 {
					continue // its transaction sets that it may write
				}
				if _, err := op.run(bounded(t), readOnly, key); op.keyed {
					wantState(t, op.name, err, "25006") // so the setting holds
				}
				continue
			}
			for _, c := range []*fastpgcache.Cache{c, readOnly} {
				if _, err := op.run(bounded(t), c, key); err != nil {
					t.Errorf("%s: %v", key, err)
				}
			}
		}
	})
	if after := one[string](t, s.admin, stamp, role); after != before {
		t.Errorf("got rows %s, want %s", after, before)
	}
}

func testKilledSessions(s *suite, t *testing.T) {
	dsn, role := s.role(t)
	c := s.open(t, dsn)
	for range 3 {
		runEach(t, c, 1)
		// Not those that come: the cache may open one in the background.
		pids := one[string](t, s.admin, `SELECT coalesce(array_agg(pid), '{}')::text FROM pg_stat_activity WHERE usename = $1`, role)
		s.exec(t, `SELECT pg_terminate_backend(pid) FROM unnest('`+pids+`'::integer[]) pid`)
		await(t, "the sessions have ended", func() bool {
			return one[int](t, s.admin, `SELECT count(*) FROM pg_stat_activity WHERE pid = ANY ($1::integer[])`, pids) == 0
		})
		// A driver may notice only when it sends, and then nobody knows what the
		// server did: an error for each connection it held, at most.
		failed := 0
		await(t, "the cache works again", func() bool {
			_, err := c.Get(bounded(t), "k", nil)
			if err != nil {
				failed++
				wantForm(t, "get", err)
			}
			return err == nil
		})
		if failed > 10 {
			t.Errorf("got %d failures, want at most one per connection", failed)
		}
	}
}

func testForcedSetup(s *suite, t *testing.T) {
	s.setup(t, fastpgcache.SetupConfig{Schema: "forced"})
	t.Cleanup(func() { s.exec(t, `DROP SCHEMA forced CASCADE`) })
	c := s.cache(t, inSchema("forced"))
	for range 2 {
		runEach(t, c, 1)
		mustSet(t, c, "k", "v", time.Hour)
		if s.callers == 0 { // the crowd would see its entries vanish
			s.setup(t, fastpgcache.SetupConfig{Schema: "forced", Force: true})
			wantMiss(t, c, "k")
		}
	}
	runEach(t, c, 1)
}

func testFailedPrepare(s *suite, t *testing.T) {
	dsn, _ := s.role(t)
	c := s.open(t, dsn)
	for want, ctx := range endedContexts(t) {
		_, err := c.Exists(ctx, "k")
		wantError(t, "exists", err, want)
	}
	runEach(t, c, 1)
}
