package fastpgcache

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lib/pq"
)

// statement is one SQL text and, on first use, its prepared form, which
// database/sql prepares again on each connection that it meets.
type statement struct {
	text string
	keys int64 // that one run of it is about, for Stats

	preparing atomic.Bool
	prepared  atomic.Pointer[sql.Stmt]
}

// newStatement completes a text for one cache. {schema} is the quoted schema.
// {user} is whose entries: the connection's role, or, with a label, the argument
// after the n others. It stands bare beside its column: row-level security keeps an
// expression that may leak, such as COALESCE of the two, from the index.
func newStatement(text, schema, label string, n int) *statement {
	user := "current_user"
	if label != "" {
		user = fmt.Sprintf("$%d", n+1)
	}
	text = strings.NewReplacer("{schema}", pq.QuoteIdentifier(schema), "{user}", user).Replace(text)
	return &statement{text: text}
}

// prepare returns the prepared statement, or nil while another caller prepares
// it, since nobody should wait on another's context. A failure is not kept: the
// next caller tries again.
func (s *statement) prepare(ctx context.Context, db *sql.DB) (*sql.Stmt, error) {
	if p := s.prepared.Load(); p != nil {
		return p, nil
	}
	if !s.preparing.CompareAndSwap(false, true) {
		return nil, nil
	}
	defer s.preparing.Store(false)
	p, err := db.PrepareContext(ctx, s.text)
	if err != nil {
		return nil, err
	}
	s.prepared.Store(p)
	return p, nil
}

// close releases the prepared form.
func (s *statement) close() {
	if p := s.prepared.Swap(nil); p != nil {
		p.Close()
	}
}

// args completes a statement's arguments by the user label, if there is one, and
// gives arrays the form that the driver does best with.
func (c *core) args(args ...any) []any {
	for i, arg := range args {
		switch a, ok := arg.(array); {
		case !ok || c.pq:
		case c.pgx:
			args[i] = a.slice()
		default: // a wrapped pgx would take apart what a Valuer gives
			args[i], _ = a.Value()
		}
	}
	if c.cfg.User == "" {
		return args
	}
	return append(args, c.cfg.User)
}

// query runs s and calls scan for each of its rows, from the first row again
// after a retry.
func (c *Cache) query(ctx context.Context, s *statement, args []any, scan func(*sql.Rows) error) error {
	return c.retry(ctx, func(to *caller) error {
		rows, err := c.queryOnce(ctx, s, args)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			if err := to.deliver(func() error { return scan(rows) }); err != nil {
				return err
			}
		}
		return rows.Err()
	})
}

// query runs s and returns what scan makes of its rows.
func query[T any](ctx context.Context, c *Cache, s *statement, args []any, scan func(*sql.Rows) (T, error)) ([]T, error) {
	var all []T
	err := c.query(ctx, s, args, func(rows *sql.Rows) error {
		v, err := scan(rows)
		all = append(all, v)
		return err
	})
	return all, err
}

func (c *Cache) queryOnce(ctx context.Context, s *statement, args []any) (*sql.Rows, error) {
	p, err := c.prepared(ctx, s)
	if err != nil {
		return nil, err
	}
	c.stats.sent(s)
	switch {
	case p != nil:
		return p.QueryContext(ctx, args...)
	case c.tx != nil:
		return c.tx.QueryContext(ctx, s.text, args...)
	}
	return c.db.QueryContext(ctx, s.text, args...)
}

// row runs s, which has at most one row, and scans it into dest.
func (c *Cache) row(ctx context.Context, s *statement, args []any, dest ...any) (found bool, err error) {
	err = c.query(ctx, s, args, func(rows *sql.Rows) error {
		found = true
		return rows.Scan(dest...)
	})
	return found && err == nil, err
}

// exec runs s and returns how many rows it affected.
func (c *Cache) exec(ctx context.Context, s *statement, args ...any) (affected int64, err error) {
	err = c.retry(ctx, func(to *caller) error {
		result, err := c.execOnce(ctx, s, args)
		if err != nil {
			return err
		}
		return to.deliver(func() error {
			affected, err = result.RowsAffected()
			return err
		})
	})
	return affected, err
}

func (c *Cache) execOnce(ctx context.Context, s *statement, args []any) (sql.Result, error) {
	p, err := c.prepared(ctx, s)
	if err != nil {
		return nil, err
	}
	c.stats.sent(s)
	switch {
	case p != nil:
		return p.ExecContext(ctx, args...)
	case c.tx != nil:
		return c.tx.ExecContext(ctx, s.text, args...)
	}
	return c.db.ExecContext(ctx, s.text, args...)
}

// prepared returns the prepared form of s, or nil where the text itself is to run.
func (c *Cache) prepared(ctx context.Context, s *statement) (*sql.Stmt, error) {
	switch {
	case c.closed.Load():
		return nil, ErrClosed
	case c.cfg.DisablePrepare:
		return nil, nil
	case c.tx == nil:
		return s.prepare(ctx, c.db)
	}
	if p, ok := c.inTx.Load(s); ok {
		return p.(*sql.Stmt), nil
	}
	p := s.prepared.Load()
	if p == nil {
		return nil, nil // to prepare it takes a connection: there may be none but tx's
	}
	p = c.tx.StmtContext(ctx, p)
	c.inTx.Store(s, p)
	return p, nil
}

// maxAttempts is how often a statement runs that keeps losing to concurrent ones.
const maxAttempts = 5

// driverFrom reports whether d comes from the module at path: a few drivers are known
// to do more than database/sql asks of them.
func driverFrom(d driver.Driver, path string) bool {
	t := reflect.TypeOf(d)
	if t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return t != nil && strings.HasPrefix(t.PkgPath()+"/", path+"/")
}

// retry calls run, and again when the server undid its work in favour of a
// concurrent transaction's. It ends with ctx even where the driver does not, as
// lib/pq, whose cancel request the server may miss: then run goes on alone, and
// what it would still deliver is dropped.
func (c *Cache) retry(ctx context.Context, run func(to *caller) error) error {
	if ctx.Done() == nil || c.tx != nil || c.pgx {
		return c.attempts(ctx, nil, run)
	}
	to := &caller{}
	ended := make(chan error, 1)
	go func() { ended <- c.attempts(ctx, to, run) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		to.leave()
		return ctx.Err()
	}
}

func (c *Cache) attempts(ctx context.Context, to *caller, run func(to *caller) error) error {
	for attempt := 1; ; attempt++ {
		err := run(to)
		if err == nil || c.tx != nil || attempt == maxAttempts || !lostToConcurrent(err) || !sleep(ctx, backoff(attempt)) {
			return err
		}
	}
}

// caller is who waits for a statement, as long as it does; nil, who waits to the end.
type caller struct {
	mu   sync.Mutex
	left bool // guarded by mu
}

// deliver calls f, which may write to what the caller reads or read what it may
// write, unless it left.
func (to *caller) deliver(f func() error) error {
	if to == nil {
		return f()
	}
	to.mu.Lock()
	defer to.mu.Unlock()
	if to.left {
		return context.Canceled
	}
	return f()
}

func (to *caller) leave() {
	to.mu.Lock()
	defer to.mu.Unlock()
	to.left = true
}

// lostToConcurrent reports whether the server rolled a statement back only
// because of concurrent ones, so that running it again is right.
func lostToConcurrent(err error) bool {
	state := sqlState(err)
	return state == deadlockDetected || state == serializationFailure
}

// backoff is the pause after a failed attempt: 1 to 2 ms, then twice that, and so on.
func backoff(attempt int) time.Duration {
	base := time.Millisecond << (attempt - 1)
	return base + rand.N(base)
}

// sleep reports whether d went by before ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// sqlState is the SQLSTATE of a server's error, whichever driver reports it, or
// empty.
func sqlState(err error) string {
	var e interface{ SQLState() string }
	if errors.As(err, &e) {
		return e.SQLState()
	}
	return ""
}

// SQLSTATEs, PostgreSQL's manual, appendix A.
const (
	invalidSchemaName     = "3F000"
	undefinedTable        = "42P01"
	undefinedColumn       = "42703"
	undefinedFunction     = "42883"
	insufficientPrivilege = "42501"
	serializationFailure  = "40001"
	deadlockDetected      = "40P01"
	unknownStatement      = "26000"
	duplicateStatement    = "42P05"
)

// causedByData reports whether the statement failed for the data of one of its
// rows, so that the others may do without it.
func causedByData(err error) bool {
	state := sqlState(err)
	if len(state) != 5 {
		return false
	}
	switch state[:2] {
	case "22", "23", "54", "XX": // data, integrity, limits; corruption
		return true
	}
	return false
}

// fail turns err, of operation op, into what the caller gets: prefixed once,
// naming the operation, and matching the sentinels. It stands at the public
// boundary, and nowhere below.
func (c *core) fail(ctx context.Context, op string, err error) error {
	if err == nil {
		return nil
	}
	c.stats.errors.Add(1)
	if p, ok := err.(prefixedError); ok { // the Connector's, through database/sql
		err = p.err
	}
	if ctxErr := ctx.Err(); ctxErr != nil && !errors.Is(err, ctxErr) {
		// A driver reports a cancelled query in words of its own.
		err = fmt.Errorf("%w: %w", ctxErr, err)
	}
	switch sqlState(err) {
	case undefinedTable, undefinedColumn, undefinedFunction, invalidSchemaName:
		err = fmt.Errorf("%w (run fastpgcache-admin --schema %s, or call fastpgcache.Setup): %w", ErrNotSetUp, c.cfg.schema(), err)
	case insufficientPrivilege:
		err = fmt.Errorf("%w: %w", ErrNotPermitted, err)
	case unknownStatement, duplicateStatement:
		err = fmt.Errorf("%w (is there a pooler that does not track prepared statements? set Config.DisablePrepare)", err)
	default:
		if c.closed.Load() && !errors.Is(err, ErrClosed) {
			err = fmt.Errorf("%w: %w", ErrClosed, err)
		}
	}
	return prefixed(op, err)
}

// A prefixedError is an error that leaves the package, however many of its layers
// it passes: "fastpgcache: " stands there once.
type prefixedError struct{ err error }

func (e prefixedError) Error() string { return "fastpgcache: " + e.err.Error() }
func (e prefixedError) Unwrap() error { return e.err }

func prefixed(op string, err error) error {
	if p, ok := err.(prefixedError); ok {
		err = p.err
	}
	return prefixedError{fmt.Errorf("%s: %w", op, err)}
}
