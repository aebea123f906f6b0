package fastpgcache

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// deafDriver is a driver that hears no context: its statements end when told to.
type deafDriver struct {
	began chan struct{} // a statement did
	end   chan struct{} // closed: all do
}

func (d deafDriver) Connect(context.Context) (driver.Conn, error) { return d, nil }
func (d deafDriver) Driver() driver.Driver                        { return nil }
func (d deafDriver) Prepare(string) (driver.Stmt, error)          { return nil, driver.ErrSkip }
func (d deafDriver) Close() error                                 { return nil }
func (d deafDriver) Begin() (driver.Tx, error)                    { return nil, driver.ErrSkip }
func (d deafDriver) CheckNamedValue(*driver.NamedValue) error     { return nil }
func (d deafDriver) Columns() []string                            { return []string{"a", "b"} }
func (d deafDriver) Next(row []driver.Value) error                { return io.EOF }
func (d deafDriver) wait()                                        { d.began <- struct{}{}; <-d.end }
func (d deafDriver) QueryContext(_ context.Context, _ string, _ []driver.NamedValue) (driver.Rows, error) {
	d.wait()
	return d, nil
}
func (d deafDriver) ExecContext(_ context.Context, _ string, _ []driver.NamedValue) (driver.Result, error) {
	d.wait()
	return driver.RowsAffected(1), nil
}

func TestACallEndsWithItsContextWhateverTheDriverDoes(t *testing.T) {
	var dest string
	for name, call := range map[string]func(ctx context.Context, c *Cache) error{
		"Get":     func(ctx context.Context, c *Cache) error { _, err := c.Get(ctx, "k", &dest); return err },
		"Set":     func(ctx context.Context, c *Cache) error { return c.Set(ctx, "k", "v", 0) },
		"Delete":  func(ctx context.Context, c *Cache) error { _, err := c.Delete(ctx, "k"); return err },
		"Exists":  func(ctx context.Context, c *Cache) error { _, err := c.Exists(ctx, "k"); return err },
		"TTL":     func(ctx context.Context, c *Cache) error { _, _, err := c.TTL(ctx, "k"); return err },
		"Expire":  func(ctx context.Context, c *Cache) error { _, err := c.Expire(ctx, "k", time.Hour); return err },
		"GetMany": func(ctx context.Context, c *Cache) error { _, err := c.GetMany(ctx, []string{"k"}); return err },
		"Take":    func(ctx context.Context, c *Cache) error { _, _, err := c.Take(ctx, "k"); return err },
		"Add":     func(ctx context.Context, c *Cache) error { _, err := c.Add(ctx, "k", "v", 0); return err },
	} {
		t.Run(name, func(t *testing.T) {
			d := deafDriver{began: make(chan struct{}, 1), end: make(chan struct{})}
			c, err := OpenConnector(d, Config{DisablePrepare: true})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			defer close(d.end)
			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				<-d.began
				cancel()
			}()
			if err := call(ctx, c); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v, want %v", err, context.Canceled)
			}
		})
	}
}

// slowPreparer is a driver whose Prepare takes until it is told to go on.
type slowPreparer struct {
	deafDriver
	preparing, goOn chan struct{}
	open            *atomic.Int64 // statements
}

func (d slowPreparer) Connect(context.Context) (driver.Conn, error) { return d, nil }
func (d slowPreparer) Prepare(string) (driver.Stmt, error) {
	close(d.preparing)
	<-d.goOn
	d.open.Add(1)
	return slowPrepared{d.open}, nil
}

type slowPrepared struct{ open *atomic.Int64 }

func (s slowPrepared) Close() error                               { s.open.Add(-1); return nil }
func (s slowPrepared) NumInput() int                              { return -1 }
func (s slowPrepared) Exec([]driver.Value) (driver.Result, error) { return nil, driver.ErrSkip }
func (s slowPrepared) Query([]driver.Value) (driver.Rows, error)  { return nil, driver.ErrSkip }

func TestCloseClosesAStatementThatIsStillBeingPrepared(t *testing.T) {
	d := slowPreparer{preparing: make(chan struct{}), goOn: make(chan struct{}), open: new(atomic.Int64)}
	db := sql.OpenDB(d)
	defer db.Close()
	c, err := New(db, Config{})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() {
		_, err := c.Get(context.Background(), "k", nil)
		ended <- err
	}()
	<-d.preparing
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	close(d.goOn)
	if err := <-ended; !errors.Is(err, ErrClosed) {
		t.Errorf("got %v, want %v", err, ErrClosed)
	}
	if n := d.open.Load(); n != 0 {
		t.Errorf("%d statements are open", n)
	}
}

// A farDriver's statements take 2 seconds to close.
type farDriver struct{ deafDriver }

func (d farDriver) Connect(context.Context) (driver.Conn, error) { return d, nil }
func (d farDriver) Prepare(string) (driver.Stmt, error)          { return farPrepared{}, nil }

type farPrepared struct{ slowPrepared }

func (farPrepared) Close() error { time.Sleep(2 * time.Second); return nil }

func TestCloseHasTimeForEachStatement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := sql.OpenDB(farDriver{})
		c, err := New(db, Config{})
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range c.statements.all[:4] {
			if _, err := s.prepare(t.Context(), db); err != nil {
				t.Fatal(err)
			}
		}
		began := time.Now()
		if err := c.Close(); err != nil || time.Since(began) != 8*time.Second {
			t.Errorf("got %v after %v, want nil after 8 s", err, time.Since(began))
		}
		time.Sleep(time.Minute) // what goes on alone holds a lock of db
		db.Close()
	})
}

func TestArgumentsAreCountedFromTheText(t *testing.T) {
	for text, want := range map[string]string{
		"SELECT {user}":                "SELECT $1",
		"SELECT $2, $1, {user}, $10":   "SELECT $2, $1, $11, $10",
		"SELECT {user} FROM {schema}.": `SELECT $1 FROM "s""x".`,
	} {
		if got := newStatements(Config{Schema: `s"x`, User: "alice"}).new(text).text; got != want {
			t.Errorf("%s: got %s, want %s", text, got, want)
		}
	}
	if got, want := newStatements(Config{Schema: "{user}"}).new("SELECT {user} FROM {schema}.").text, `SELECT current_user FROM "{user}".`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got, want := newStatements(Config{Schema: "s"}).new("SELECT {user}, $1").text, "SELECT current_user, $1"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// A panickingDriver's rows are of another statement than it was asked.
type panickingDriver struct{ deafDriver }

func (d panickingDriver) Connect(context.Context) (driver.Conn, error) { return d, nil }
func (d panickingDriver) Next([]driver.Value) error                    { return []error{}[len(d.Columns())] }
func (d panickingDriver) QueryContext(context.Context, string, []driver.NamedValue) (driver.Rows, error) {
	return d, nil
}

func TestAPanicOfTheDriverIsAnErrorWithAHint(t *testing.T) {
	for _, coalesced := range []bool{true, false} {
		c, err := OpenConnector(panickingDriver{}, Config{DisablePrepare: true, DisableCoalescing: !coalesced})
		check(t, err)
		defer c.Close()
		_, err = c.Get(t.Context(), "k", nil)
		if err == nil || !strings.Contains(err.Error(), "DisablePrepare") {
			t.Errorf("got %v", err)
		}
	}
}

func TestCitusIsNotKeptFromKnowingAnArray(t *testing.T) {
	for _, text := range []string{getManySQL, getManyAgedSQL, getManyStampedSQL, existsManySQL} {
		if got := newStatements(Config{Citus: true}).new(text).text; strings.Contains(got, "(SELECT $1::text[])") || !strings.Contains(got, "$1::text[]") {
			t.Errorf("the array is hidden:\n%s", got)
		}
	}
}

// Where Citus keeps the schema, other texts stand for some. They are right on any server, and
// take what those take that they stand for.
func TestTheTextsForCitusTakeTheSameArguments(t *testing.T) {
	dsn, _ := setUp(t)
	db := openDB(t, dsn)
	db.SetMaxOpenConns(1)
	for _, label := range []string{"", "alice"} {
		ordinary, citus := newStatements(Config{User: label}), newStatements(Config{User: label, Citus: true})
		for text := range citusSQL {
			var types [2]string
			for i, ss := range []*statements{ordinary, citus} {
				s := ss.new(text)
				if _, err := db.Exec("PREPARE one AS " + s.text); err != nil {
					t.Fatalf("%v\n%s", err, s.text)
				}
				check(t, db.QueryRow(`SELECT parameter_types::text FROM pg_prepared_statements WHERE name = 'one'`).Scan(&types[i]))
				_, err := db.Exec(`DEALLOCATE one`)
				check(t, err)
			}
			if types[0] != types[1] {
				t.Errorf("arguments of types %s, not %s:\n%s", types[1], types[0], citus.new(text).text)
			}
		}
	}
}
