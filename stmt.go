package fastpgcache

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"time"

	"github.com/lib/pq"
)

// statement is one SQL text and, on first use, its prepared form, which
// database/sql prepares again on each connection that it meets.
type statement struct {
	op      string // for errors
	text    string
	keyless bool // not about one key, for Stats

	preparing atomic.Bool
	prepared  atomic.Pointer[sql.Stmt]
}

// newStatement completes a text for one cache. {schema} is the quoted schema.
// {user} is whose entries: the connection's role, or, with a label, the argument
// after the n others. It must stand bare beside its column: a cast of
// current_user is not leakproof, and row-level security would keep it from the
// index.
func newStatement(op, text, schema, label string, n int) *statement {
	user := "current_user"
	if label != "" {
		user = fmt.Sprintf("$%d", n+1)
	}
	text = strings.NewReplacer("{schema}", pq.QuoteIdentifier(schema), "{user}", user).Replace(text)
	return &statement{op: op, text: text}
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

// query runs s and calls scan for each of its rows, from the first row again
// after a retry.
func (c *Cache) query(ctx context.Context, s *statement, args []any, scan func(*sql.Rows) error) error {
	return c.retry(ctx, s, func(p *sql.Stmt) error {
		var rows *sql.Rows
		var err error
		switch {
		case c.tx != nil:
			rows, err = c.tx.QueryContext(ctx, s.text, args...)
		case p != nil:
			rows, err = p.QueryContext(ctx, args...)
		default:
			rows, err = c.db.QueryContext(ctx, s.text, args...)
		}
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			if err := scan(rows); err != nil {
				return err
			}
		}
		return rows.Err()
	})
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
	err = c.retry(ctx, s, func(p *sql.Stmt) error {
		var result sql.Result
		var err error
		switch {
		case c.tx != nil:
			result, err = c.tx.ExecContext(ctx, s.text, args...)
		case p != nil:
			result, err = p.ExecContext(ctx, args...)
		default:
			result, err = c.db.ExecContext(ctx, s.text, args...)
		}
		if err != nil {
			return err
		}
		affected, err = result.RowsAffected()
		return err
	})
	return affected, err
}

// maxAttempts is how often a statement runs that keeps losing to concurrent ones.
const maxAttempts = 5

// retry calls run with the prepared form of s, or nil where the text itself is to
// run, and again when the server undid the statement in favour of a concurrent
// one. What it returns is ready for the caller.
func (c *Cache) retry(ctx context.Context, s *statement, run func(*sql.Stmt) error) error {
	for attempt := 1; ; attempt++ {
		err := c.attempt(ctx, s, run)
		if err == nil {
			return nil
		}
		if c.tx != nil || attempt == maxAttempts || !lostToConcurrent(err) || !sleep(ctx, backoff(attempt)) {
			return c.fail(ctx, s.op, err)
		}
	}
}

func (c *Cache) attempt(ctx context.Context, s *statement, run func(*sql.Stmt) error) error {
	if c.closed.Load() {
		return ErrClosed
	}
	c.stats.statements.Add(1)
	if !s.keyless {
		c.stats.keys.Add(1)
	}
	if c.tx != nil || c.cfg.DisablePrepare {
		return run(nil)
	}
	p, err := s.prepare(ctx, c.db)
	if err != nil {
		return err
	}
	return run(p)
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

// fail turns err, of operation op, into what the caller gets: prefixed once,
// naming the operation, and matching the sentinels.
func (c *Cache) fail(ctx context.Context, op string, err error) error {
	c.stats.errors.Add(1)
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
	return fmt.Errorf("fastpgcache: %s: %w", op, err)
}
