package fastpgcache_test

import (
	"context"
	"database/sql/driver"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/DATA-DOG/go-sqlmock"

	"github.com/fastpgcache/fastpgcache"
)

// serverError is what a driver reports from the server.
type serverError struct{ state string }

func (e *serverError) Error() string {
	switch e.state {
	case "08P01":
		return "bind message supplies 1 parameters, but prepared statement \"\" requires 2"
	case "0A000":
		return "cannot access temporary or unlogged relations during recovery"
	}
	return "server says " + e.state
}
func (e *serverError) SQLState() string { return e.state }

// checkFault checks what an operation returned that failed for cause.
func checkFault(t *testing.T, op operation, got any, err, cause error) {
	t.Helper()
	if !errors.Is(err, cause) {
		t.Fatalf("got %v, want an error that wraps %v", err, cause)
	}
	words := strings.ToLower(wordPattern.ReplaceAllString(op.name, "$1 $2"))
	prefix := "fastpgcache: " + words + ": "
	if !strings.HasPrefix(err.Error(), prefix) || strings.Count(err.Error(), "fastpgcache: ") != 1 {
		t.Errorf("got %q, want the prefix %q once", err, prefix)
	}
	if want := zero(op.answers[0].want); !reflect.DeepEqual(got, want) {
		t.Errorf("with the error: got %v, want %v", got, want)
	}
}

func zero(v any) any {
	if v == nil {
		return nil
	}
	return reflect.Zero(reflect.TypeOf(v)).Interface()
}

var sentinels = []error{
	fastpgcache.ErrClosed, fastpgcache.ErrInvalidKey, fastpgcache.ErrInvalidTTL, fastpgcache.ErrInvalidConfig, fastpgcache.ErrValueTooLarge,
	fastpgcache.ErrNotSetUp, fastpgcache.ErrNotPermitted, fastpgcache.ErrNotInteger, fastpgcache.ErrForeignTable,
}

func TestErrorsMatchTheirSentinelAndSayWhatToDo(t *testing.T) {
	t.Parallel()
	setUp := "run fastpgcache-admin --schema public, or call fastpgcache.Setup"
	pooler := "set Config.DisablePrepare"
	for _, fault := range []struct {
		cause error
		is    error // the only sentinel it matches
		says  string
	}{
		{cause: errors.New("boom")},
		{cause: &serverError{"XX000"}},
		{cause: &serverError{"42P01"}, is: fastpgcache.ErrNotSetUp, says: setUp},
		{cause: &serverError{"42703"}, is: fastpgcache.ErrNotSetUp, says: setUp},
		{cause: &serverError{"42883"}, is: fastpgcache.ErrNotSetUp, says: setUp},
		{cause: &serverError{"3F000"}, is: fastpgcache.ErrNotSetUp, says: setUp},
		{cause: fmt.Errorf("wrapped: %w", &serverError{"42P01"}), is: fastpgcache.ErrNotSetUp, says: setUp},
		{cause: &serverError{"42501"}, is: fastpgcache.ErrNotPermitted},
		{cause: &serverError{"26000"}, says: pooler},
		{cause: &serverError{"42P05"}, says: pooler},
		{cause: &serverError{"08P01"}, says: pooler},
		{cause: &serverError{"0A000"}, says: "connect to the primary"},
		{cause: &serverError{"25006"}, says: "the cache needs the primary and a transaction that may write"},
	} {
		t.Run(fault.cause.Error(), func(t *testing.T) {
			eachOperation(t, func(t *testing.T, op operation, mode mockMode) {
				m := newMocked(t, mode)
				m.expect(t, op, op.answers[0], fault.cause)
				got, err := m.run(t.Context(), t, op)
				checkFault(t, op, got, err, fault.cause)
				for _, sentinel := range sentinels {
					if errors.Is(err, sentinel) != (sentinel == fault.is) {
						t.Errorf("%v: errors.Is(err, %q) is %t", err, sentinel, errors.Is(err, sentinel))
					}
				}
				if !strings.Contains(fmt.Sprint(err), fault.says) {
					t.Errorf("got %v, want it to say %q", err, fault.says)
				}
			})
		})
	}
}

// TestFaultAfterTheStatement breaks the answer, not the statement.
func TestFaultAfterTheStatement(t *testing.T) {
	boom := errors.New("boom")
	eachOperation(t, func(t *testing.T, op operation, mode mockMode) {
		m := newMocked(t, mode)
		text, args := m.text(t, op)
		columns := m.page[op.name].columns
		m.expectBefore(op)
		if columns == nil {
			m.ExpectExec(text).WithArgs(args...).WillReturnResult(sqlmock.NewErrorResult(boom))
			got, err := m.run(t.Context(), t, op)
			checkFault(t, op, got, err, boom)
			return
		}
		a := op.answers[0]
		m.ExpectQuery(text).WithArgs(args...).WillReturnRows(rows(columns, a).RowError(0, boom))
		got, err := m.run(t.Context(), t, op)
		checkFault(t, op, got, err, boom)

		// A row, then the fault.
		m.expectBefore(op)
		a.rows = append(append([][]driver.Value{}, a.rows...), a.rows[0])
		m.ExpectQuery(text).WithArgs(args...).WillReturnRows(rows(columns, a).RowError(len(a.rows)-1, boom))
		_, err = m.run(t.Context(), t, op)
		if !errors.Is(err, boom) {
			t.Errorf("after a row: got %v, want %v", err, boom)
		}

		// Columns that nothing asked for.
		m.expectBefore(op)
		m.ExpectQuery(text).WithArgs(args...).WillReturnRows(sqlmock.NewRows(make([]string, 9)).AddRow(1, 2, 3, 4, 5, 6, 7, 8, 9))
		if _, err = m.run(t.Context(), t, op); err == nil {
			t.Error("other columns: got no error")
		}
	})
}

// TestLostToConcurrentStatements covers deadlocks and serialization failures: up
// to five attempts, and one where the transaction is the caller's.
func TestLostToConcurrentStatements(t *testing.T) {
	t.Parallel()
	for _, state := range []string{"40001", "40P01"} {
		cause := &serverError{state}
		t.Run(state, func(t *testing.T) {
			eachOperation(t, func(t *testing.T, op operation, mode mockMode) {
				attempts := 5
				if mode.tx {
					attempts = 1
				}
				m := newMocked(t, mode)
				m.expectBefore(op)
				for range attempts {
					m.expectOnly(t, op, op.answers[0], cause)
				}
				got, err := m.run(t.Context(), t, op)
				checkFault(t, op, got, err, cause)
				if mode.tx {
					return
				}
				m.expectBefore(op)
				m.expectOnly(t, op, op.answers[0], cause)
				m.expectOnly(t, op, op.answers[0], cause)
				m.expectOnly(t, op, op.answers[0], nil)
				if got, err := m.run(t.Context(), t, op); err != nil || !reflect.DeepEqual(got, op.answers[0].want) {
					t.Errorf("third attempt: got %v, %v, want %v", got, err, op.answers[0].want)
				}
			})
		})
	}
}

// TestBadConnectionIsReplaced relies on database/sql, which tries three times.
func TestBadConnectionIsReplaced(t *testing.T) {
	eachOperation(t, func(t *testing.T, op operation, mode mockMode) {
		if mode.tx {
			return
		}
		m := newMocked(t, mode)
		// The mock is gone when its last connection is closed.
		conn, err := m.DB().Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		m.expectBefore(op)
		m.expectOnly(t, op, op.answers[0], driver.ErrBadConn)
		m.expectOnly(t, op, op.answers[0], nil)
		if got, err := m.run(t.Context(), t, op); err != nil || !reflect.DeepEqual(got, op.answers[0].want) {
			t.Errorf("one bad connection: got %v, %v, want %v", got, err, op.answers[0].want)
		}
		m.expectBefore(op)
		for range 3 {
			m.expectOnly(t, op, op.answers[0], driver.ErrBadConn)
		}
		got, err := m.run(t.Context(), t, op)
		checkFault(t, op, got, err, driver.ErrBadConn)
	})
}

// canceller is an argument that ends the caller's context when the statement is
// sent.
type canceller struct{ cancel context.CancelFunc }

func (c canceller) Match(driver.Value) bool {
	c.cancel()
	return true
}

func TestContextThatEndedIsTheError(t *testing.T) {
	eachOperation(t, func(t *testing.T, op operation, mode mockMode) {
		m := newMocked(t, mode)
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		got, err := m.run(ended, t, op)
		checkFault(t, op, got, err, context.Canceled)

		// In flight. The mock then has an error of its own, as drivers have. Only in a
		// transaction does the call wait for it, and then it stands in the chain, too.
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		text, args := m.text(t, op)
		args = append([]driver.Value{canceller{cancel}}, args[1:]...)
		m.expectBefore(op)
		if columns := m.page[op.name].columns; columns != nil {
			m.ExpectQuery(text).WithArgs(args...).WillDelayFor(time.Hour).WillReturnRows(rows(columns, op.answers[0]))
		} else {
			m.ExpectExec(text).WithArgs(args...).WillDelayFor(time.Hour).WillReturnResult(sqlmock.NewResult(0, 1))
		}
		got, err = m.run(ctx, t, op)
		checkFault(t, op, got, err, context.Canceled)
		if mode.tx && !errors.Is(err, sqlmock.ErrCancelled) {
			t.Errorf("got %v, want it to wrap the driver's error, too", err)
		}
	})
}

// TestRetryEndsWithTheContext ends the context after the first of five attempts.
func TestRetryEndsWithTheContext(t *testing.T) {
	m := newMocked(t, mockMode{})
	ctx, cancel := context.WithCancel(t.Context())
	m.ExpectQuery(m.page["Get"].text).WithArgs(canceller{cancel}).WillReturnError(&serverError{"40001"})
	_, err := m.Get(ctx, "k", nil)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	if err := m.ExpectationsWereMet(); err != nil {
		t.Error(err)
	}
}

func TestClosedCacheSendsNothing(t *testing.T) {
	eachOperation(t, func(t *testing.T, op operation, mode mockMode) {
		if mode.tx {
			return
		}
		m := newMocked(t, mode)
		for range 2 {
			if err := m.Close(); err != nil {
				t.Fatal(err)
			}
		}
		got, err := m.run(t.Context(), t, op)
		checkFault(t, op, got, err, fastpgcache.ErrClosed)
	})
}

func TestBadArgumentsSendNothing(t *testing.T) {
	ctx := t.Context()
	for _, mode := range mockModes {
		m := newMocked(t, mode)
		for _, key := range []string{"", "a\x00b", "\xff", strings.Repeat("k", 1025)} {
			for name, err := range map[string]error{
				"set":         m.Set(ctx, key, "v", 0),
				"get":         second(m.Get(ctx, key, nil)),
				"delete":      second(m.Delete(ctx, key)),
				"exists":      second(m.Exists(ctx, key)),
				"expire":      second(m.Expire(ctx, key, time.Second)),
				"persist":     second(m.Persist(ctx, key)),
				"set many":    m.SetMany(ctx, map[string]any{"good": 1, key: 1}, 0),
				"get many":    second(m.GetMany(ctx, []string{"good", key})),
				"delete many": second(m.DeleteMany(ctx, []string{"good", key})),
			} {
				if !errors.Is(err, fastpgcache.ErrInvalidKey) || !strings.HasPrefix(err.Error(), "fastpgcache: "+name+": ") {
					t.Errorf("%s %.10q: got %v, want %v", name, key, err, fastpgcache.ErrInvalidKey)
				}
			}
			if _, _, err := m.TTL(ctx, key); !errors.Is(err, fastpgcache.ErrInvalidKey) {
				t.Errorf("ttl %.10q: got %v, want %v", key, err, fastpgcache.ErrInvalidKey)
			}
		}
		for _, ttl := range []time.Duration{-2, -time.Second, -1 << 63} {
			if err := m.Set(ctx, "k", "v", ttl); !errors.Is(err, fastpgcache.ErrInvalidTTL) {
				t.Errorf("set for %v: got %v, want %v", ttl, err, fastpgcache.ErrInvalidTTL)
			}
			if _, err := m.Expire(ctx, "k", ttl); !errors.Is(err, fastpgcache.ErrInvalidTTL) {
				t.Errorf("expire %v: got %v, want %v", ttl, err, fastpgcache.ErrInvalidTTL)
			}
		}
		if _, err := m.Expire(ctx, "k", 0); !errors.Is(err, fastpgcache.ErrInvalidTTL) {
			t.Errorf("expire 0: got %v, want %v", err, fastpgcache.ErrInvalidTTL)
		}
		if err := m.Set(ctx, "k", make(chan int), 0); !errors.As(err, new(*json.UnsupportedTypeError)) {
			t.Errorf("set of a channel: got %v, want json's error", err)
		}
		for _, dest := range []any{"text", (*string)(nil), (*[]byte)(nil), (*struct{})(nil), 1} {
			if _, err := m.Get(ctx, "k", dest); err == nil {
				t.Errorf("get into %T: got no error", dest)
			}
		}
	}
}

func second[T any](_ T, err error) error { return err }

// A server can undo a statement after its rows have come, at its commit.
func TestRowsOfAFailedAttemptCountForNothing(t *testing.T) {
	for _, op := range operations {
		switch op.name {
		case "Get", "TTL", "GetMany", "DeleteMany", "Delete", "Take", "Keys":
		default:
			continue
		}
		t.Run(op.name, func(t *testing.T) {
			m := newMocked(t, mockMode{name: "role"})
			text, args := m.text(t, op)
			columns := m.page[op.name].columns
			undone := rows(columns, op.answers[0]).AddRow(make([]driver.Value, len(columns))...)
			undone.RowError(len(op.answers[0].rows), &serverError{"40001"})
			nothing := op.answers[len(op.answers)-1]
			m.ExpectQuery(text).WithArgs(args...).WillReturnRows(undone)
			m.ExpectQuery(text).WithArgs(args...).WillReturnRows(rows(columns, nothing))
			if got, err := m.run(t.Context(), t, op); err != nil || !reflect.DeepEqual(got, nothing.want) {
				t.Errorf("got %v, %v, want %v", got, err, nothing.want)
			}
		})
	}
}
