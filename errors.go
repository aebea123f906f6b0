package fastpgcache

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// Errors that callers can tell apart with errors.Is. Every error of this
// package wraps its cause, too, so that errors.As finds the driver's own.
var (
	ErrClosed        = errors.New("the cache is closed")
	ErrInvalidKey    = errors.New("invalid key")
	ErrInvalidTTL    = errors.New("invalid TTL")
	ErrInvalidConfig = errors.New("invalid configuration")
	ErrValueTooLarge = errors.New("value too large")
	ErrNotSetUp      = errors.New("the cache is not set up in this database")
	ErrNotPermitted  = errors.New("not permitted")
	ErrNotInteger    = errors.New("value is not a 64-bit integer, or the result would not be")
	ErrForeignTable  = errors.New("a table that is not the cache's has its name")
	ErrNotFound      = errors.New("not found") // only from a load, see NotFoundFor
)

// SQLSTATEs, PostgreSQL's manual, appendix A.
const (
	protocolViolation     = "08P01"
	featureNotSupported   = "0A000"
	readOnlyTransaction   = "25006"
	unknownStatement      = "26000"
	invalidSchemaName     = "3F000"
	serializationFailure  = "40001"
	deadlockDetected      = "40P01"
	insufficientPrivilege = "42501"
	undefinedColumn       = "42703"
	undefinedFunction     = "42883"
	undefinedTable        = "42P01"
	duplicateStatement    = "42P05"
)

// sqlState is the SQLSTATE of a server's error, whichever driver reports it, or
// empty.
func sqlState(err error) string {
	var e interface{ SQLState() string }
	if errors.As(err, &e) {
		return e.SQLState()
	}
	return ""
}

// lostToConcurrent reports whether the server rolled a statement back only
// because of concurrent ones, so that running it again is right.
func lostToConcurrent(err error) bool {
	state := sqlState(err)
	return state == deadlockDetected || state == serializationFailure
}

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
	return prefixed(op, c.described(ctx, err))
}

// described is err with the sentinels that it matches, in words that help. That of a
// shard names it. It is done once, however many layers err passes.
func (c *core) described(ctx context.Context, err error) error {
	var done *shardError
	if errors.As(err, &done) {
		return err
	}
	if p, ok := err.(prefixedError); ok { // the Connector's, through database/sql
		err = p.err
	}
	if ctxErr := ctx.Err(); ctxErr != nil && !errors.Is(err, ctxErr) {
		// A driver reports a cancelled query in words of its own.
		err = fmt.Errorf("%w: %w", ctxErr, err)
	}
	if explained := c.explain(err); explained != nil {
		err = explained
	} else if c.ended() && !errors.Is(err, ErrClosed) {
		err = fmt.Errorf("%w: %w", ErrClosed, err)
	}
	if c.name.Load() != nil {
		err = &shardError{c, err}
	}
	return err
}

// explain wraps a server's error in the sentinel that it matches, or in words that help,
// and returns nil where it knows neither.
func (c *core) explain(err error) error {
	switch sqlState(err) {
	case undefinedTable, undefinedColumn, undefinedFunction, invalidSchemaName:
		return fmt.Errorf("%w (run fastpgcache-admin --schema %s, or call fastpgcache.Setup): %w", ErrNotSetUp, c.cfg.schema(), err)
	case insufficientPrivilege:
		return fmt.Errorf("%w: %w", ErrNotPermitted, err)
	case readOnlyTransaction:
		return fmt.Errorf("%w (a standby, or a read-only transaction or role: the cache needs the primary and a transaction that may write)", err)
	case featureNotSupported:
		if strings.Contains(err.Error(), "during recovery") {
			return fmt.Errorf("%w (this is a standby, where an unlogged table cannot be read: connect to the primary)", err)
		}
		if !c.cfg.Citus && (strings.Contains(err.Error(), "IMMUTABLE") || strings.Contains(err.Error(), "COPY FROM")) {
			return fmt.Errorf("%w (does Citus keep this schema on one of its nodes? set Config.Citus)", err)
		}
	case unknownStatement, duplicateStatement:
		return fmt.Errorf("%w (%s)", err, poolerHint)
	case protocolViolation:
		if strings.Contains(err.Error(), "bind message") {
			return fmt.Errorf("%w (%s)", err, poolerHint)
		}
	}
	return nil
}

const poolerHint = "is there a pooler that does not track prepared statements? set Config.DisablePrepare, " +
	"with lib/pq binary_parameters=yes, with pgx default_query_exec_mode=exec or simple_protocol"

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
