package fastpgcache

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"regexp"
	"runtime"
	"strconv"
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
	keys int64 // that one run of it is about, for Stats; 0: its caller counts them

	preparing atomic.Bool
	prepared  atomic.Pointer[sql.Stmt]
	closed    atomic.Bool
}

// statements are those of one cache.
type statements struct {
	replacer func(text string) string
	all      []*statement
}

var argument = regexp.MustCompile(`\$([0-9]+)`)

// newStatements completes texts for one cache. {schema} is the quoted schema.
// {user} is whose entries: the connection's role, or, with a label, the argument
// after the text's others. It stands bare beside its column: row-level security keeps
// an expression that may leak, such as COALESCE of the two, from the index.
func newStatements(cfg Config) *statements {
	schema := pq.QuoteIdentifier(cfg.schema())
	return &statements{replacer: func(text string) string {
		if cfg.Citus {
			text = citusText(text)
		}
		user := "current_user"
		if cfg.User != "" {
			last := 0
			for _, m := range argument.FindAllStringSubmatch(text, -1) {
				n, _ := strconv.Atoi(m[1])
				last = max(last, n)
			}
			user = "$" + strconv.Itoa(last+1)
		}
		// The schema last: its name may be {user}.
		return strings.ReplaceAll(strings.ReplaceAll(text, "{user}", user), "{schema}", schema)
	}}
}

// new returns the statement of text, which may touch any number of keys.
func (ss *statements) new(text string) *statement {
	s := &statement{text: strings.TrimSpace(ss.replacer(text))}
	ss.all = append(ss.all, s)
	return s
}

// one returns the statement of text, which is about one key.
func (ss *statements) one(text string) *statement {
	s := ss.new(text)
	s.keys = 1
	return s
}

// closers are what releases the statements, each on all connections: a round trip for each.
func (ss *statements) closers() (steps []func() error) {
	for _, s := range ss.all {
		steps = append(steps, func() error { s.close(); return nil })
	}
	return steps
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
	if s.closed.Load() {
		s.close()
		return nil, ErrClosed
	}
	return p, nil
}

// close releases the prepared form, also one that is still on its way.
func (s *statement) close() {
	s.closed.Store(true)
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

// query runs s and returns what scan makes of each row, of the attempt that
// succeeded.
func query[T any](ctx context.Context, c *Cache, s *statement, args []any, scan func(*sql.Rows) (T, error)) ([]T, error) {
	return retry(ctx, c, func(c *Cache) ([]T, error) {
		p, err := c.prepared(ctx, s)
		if err != nil {
			return nil, err
		}
		c.stats.sent(s)
		defer c.stats.latency.add(time.Now())
		rows, err := c.queryOnce(ctx, s, p, args)
		if err != nil {
			return nil, err
		}
		defer rows.Close()
		var got []T
		for rows.Next() {
			row, err := scan(rows)
			if err != nil {
				return nil, err
			}
			got = append(got, row)
		}
		return got, rows.Err()
	})
}

// first is the only row of a query that has at most one.
func first[T any](rows []T, err error) (row T, found bool, _ error) {
	if err != nil || len(rows) == 0 {
		return row, false, err
	}
	return rows[0], true, nil
}

// queryOnce runs s, prepared as p unless that is nil.
func (c *Cache) queryOnce(ctx context.Context, s *statement, p *sql.Stmt, args []any) (*sql.Rows, error) {
	switch {
	case p != nil:
		return p.QueryContext(ctx, args...)
	case c.tx != nil:
		return c.tx.QueryContext(ctx, s.text, args...)
	}
	return c.db.QueryContext(ctx, s.text, args...)
}

// exec runs s and returns how many rows it affected or, if it is a query, gave.
func (c *Cache) exec(ctx context.Context, s *statement, args ...any) (int64, error) {
	return retry(ctx, c, func(c *Cache) (int64, error) {
		p, err := c.prepared(ctx, s)
		if err != nil {
			return 0, err
		}
		c.stats.sent(s)
		defer c.stats.latency.add(time.Now())
		result, err := c.execOnce(ctx, s, p, args)
		if err != nil {
			return 0, err
		}
		return result.RowsAffected()
	})
}

// execOnce runs s, prepared as p unless that is nil.
func (c *Cache) execOnce(ctx context.Context, s *statement, p *sql.Stmt, args []any) (sql.Result, error) {
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
	case c.ended():
		return nil, ErrClosed
	case c.tx != nil && c.tx.Tx == nil:
		return nil, c.tx.err
	case c.cfg.DisablePrepare:
		return nil, nil
	case c.tx == nil:
		return s.prepare(ctx, c.db)
	}
	return c.tx.prepared(ctx, s), nil
}

// transaction is where the statements of a Cache run that WithTx returned.
type transaction struct {
	*sql.Tx // nil: none can be used, and err tells why
	err     error
	own     bool             // it is of the cache's pool, whose prepared statements fit no other
	grown   map[*quota]int64 // bytes stored, which who commits it tells; nil: that is the caller
	stmts   sync.Map         // of *statement: the *sql.Stmt that Tx has of it
}

// newTransaction returns tx as a transaction, of pool db or another. Nothing but tx itself knows
// of which; where it does not tell, it is taken for another's, and runs texts. db is nil
// where the cache has several.
func newTransaction(tx *sql.Tx, db *sql.DB) *transaction {
	t := &transaction{Tx: tx}
	switch {
	case tx == nil:
		t.err = errors.New("the transaction given to WithTx is nil")
	case db == nil:
		t.Tx, t.err = nil, errors.New("a transaction is of one database, and the shards are not all over one *sql.DB")
	default:
		pool := reflect.ValueOf(tx).Elem().FieldByName("db")
		t.own = pool.IsValid() && pool.Kind() == reflect.Pointer && pool.Pointer() == reflect.ValueOf(db).Pointer()
	}
	return t
}

// prepared returns s as it is prepared in t, or nil where the text is to run: to
// prepare it takes a connection, and there may be none but t's.
func (t *transaction) prepared(ctx context.Context, s *statement) *sql.Stmt {
	if !t.own {
		return nil
	}
	if p, ok := t.stmts.Load(s); ok {
		return p.(*sql.Stmt)
	}
	p := s.prepared.Load()
	if p == nil {
		return nil
	}
	p = t.StmtContext(ctx, p)
	if ctx.Err() == nil { // else p may be good for nothing but an error
		t.stmts.Store(s, p)
	}
	return p
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

// retry calls attempt, and again when the server undid its work in favour of a
// concurrent transaction's. Only what the last attempt returned counts: the server may
// undo one after its rows have come.
func retry[T any](ctx context.Context, c *Cache, attempt func(*Cache) (T, error)) (T, error) {
	return await(ctx, c, func() (result T, _ error) {
		err := c.repeat(ctx, func(committed bool) (err error) {
			if committed {
				return c.transactOnce(ctx, true, func(in *Cache) (err error) {
					result, err = guarded(in, attempt)
					return err
				})
			}
			result, err = guarded(c, attempt)
			return err
		})
		return result, err
	})
}

// repeat calls attempt as retry does. Under stricter isolation, which is the default of some
// databases, what takes long beside many writers would lose each time: a last attempt is
// asked to be a transaction of READ COMMITTED, where no serialization fails.
func (c *Cache) repeat(ctx context.Context, attempt func(committed bool) error) error {
	for n := 1; ; n++ {
		err := attempt(false)
		if err == nil || c.tx != nil || !lostToConcurrent(err) {
			return err
		}
		if n == maxAttempts && sqlState(err) == serializationFailure && ctx.Err() == nil {
			if last := attempt(true); last != nil {
				return fmt.Errorf("%w; at READ COMMITTED: %w", err, last)
			}
			return nil
		}
		if n == maxAttempts || !sleep(ctx, backoff(n)) {
			return err
		}
	}
}

// guarded calls attempt, and makes an error of a panic of the driver: lib/pq's is one
// where a pooler brings another statement's answer, and on a goroutine of ours it would
// end the program.
func guarded[T any](c *Cache, attempt func(*Cache) (T, error)) (result T, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the driver panicked: %v (%s)", p, poolerHint)
		}
	}()
	return attempt(c)
}

// await calls f, and ends with ctx even where the driver does not, as lib/pq, whose
// cancel request the server may miss: then f goes on alone, and what it returns is
// dropped. So f must not touch what belongs to the caller.
func await[T any](ctx context.Context, c *Cache, f func() (T, error)) (T, error) {
	if ctx.Done() == nil || c.tx != nil || c.pgx {
		return f()
	}
	type outcome struct {
		result T
		err    error
	}
	ended := make(chan outcome, 1)
	go func() {
		growStack()
		result, err := f()
		ended <- outcome{result, err}
	}()
	select {
	case o := <-ended:
		return o.result, o.err
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}

// growStack gives a new goroutine the stack that a statement needs, while it has little on
// it: to grow it on the way there, with all the frames, takes a seventh of a Get's time here.
//
//go:noinline
func growStack() {
	var room [6 << 10]byte
	runtime.KeepAlive(&room)
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
