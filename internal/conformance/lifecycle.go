package conformance

import (
	"context"
	"database/sql"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/goroutines"
)

var lifecycleTests = []test{
	{name: "MakingACacheDoesNoIO", run: testNoIO, lone: true},
	{name: "InvalidConfigIsRefused", run: testInvalidConfig, once: true},
	{name: "OwnedPoolKeepsAtMostTenConnections", run: testOwnedPool, once: true},
	{name: "CloseEndsAnOwnedPoolAndLeavesTheCallersOpen", run: testClosePool, lone: true, pool: true},
	{name: "CloseMayBeCalledTwiceAndAtOnce", run: testCloseTwice},
	{name: "EveryOperationAfterCloseIsErrClosed", run: testErrClosed, lone: true},
	{name: "CallsInFlightAtCloseReturn", run: testCloseInFlight, lone: true},
	{name: "CloseReleasesPreparedStatements", run: testCloseReleases, lone: true},
	{name: "EachStatementIsPreparedOncePerConnection", run: testPreparedOnce, lone: true, pool: true},
	{name: "CloseLeavesNoGoroutine", run: testNoGoroutine, lone: true},
	{name: "AnySchemaNameWorks", run: testSchemaNames, once: true, here: true},
	{name: "APoolOfOneConnectionServesEverybody", run: testOneConnection, lone: true},
	{name: "TheFirstCallsMayComeAtOnce", run: testFirstCallsAtOnce, lone: true},
}

func testNoIO(s *suite, t *testing.T) {
	c, connector := s.offline(t)
	if c.DB() == nil {
		t.Error("DB: got nil")
	}
	db := sql.OpenDB(connector)
	defer db.Close()
	mine, err := fastpgcache.New(db, s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if mine.DB() != db {
		t.Error("DB: got another pool than New's")
	}
	if err := mine.Close(); err != nil {
		t.Error(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if n := connector.tried.Load(); n != 0 {
		t.Errorf("got %d attempts to connect, want none", n)
	}
}

func testInvalidConfig(s *suite, t *testing.T) {
	connector := new(offlineConnector)
	db := sql.OpenDB(connector)
	defer db.Close()
	for _, cfg := range []fastpgcache.Config{
		{Schema: strings.Repeat("s", 64)},
		{Schema: "a\x00b"},
		{Schema: "\xff"},
		{User: "a\x00b"},
		{User: "\xff"},
		{User: strings.Repeat("u", 1025)},
		{MaxStaleness: -1},
		{MaxStaleness: time.Second, Citus: true},
		{CleanupInterval: -time.Second},
	} {
		_, err := fastpgcache.New(db, cfg)
		wantError(t, "new", err, fastpgcache.ErrInvalidConfig)
		c, err := fastpgcache.OpenConnector(connector, cfg)
		if c != nil || err == nil {
			t.Errorf("OpenConnector with %+v: got %v, %v", cfg, c, err)
		}
	}
	_, err := fastpgcache.New(nil, fastpgcache.Config{})
	wantError(t, "new", err, fastpgcache.ErrInvalidConfig)
	_, err = fastpgcache.OpenConnector(nil, fastpgcache.Config{})
	wantError(t, "open", err, fastpgcache.ErrInvalidConfig)
}

func testOwnedPool(s *suite, t *testing.T) {
	const limit = 10
	dsn, _ := s.role(t)
	db := s.open(t, dsn).DB()
	if got := db.Stats().MaxOpenConnections; got != limit {
		t.Errorf("got at most %d connections, want %d", got, limit)
	}
	var conns []*sql.Conn
	for range limit {
		conn, err := db.Conn(bounded(t))
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	for _, conn := range conns {
		conn.Close()
	}
	if got := db.Stats().Idle; got != limit {
		t.Errorf("got %d connections kept, want %d", got, limit)
	}
}

func testClosePool(s *suite, t *testing.T) {
	dsn, _ := s.role(t)
	owner := s.open(t, dsn)
	db := sql.OpenDB(s.connector(t, dsn))
	defer db.Close()
	guest, err := fastpgcache.New(db, s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []*fastpgcache.Cache{owner, guest} {
		mustSet(t, c, "k", "v", 0)
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := owner.DB().PingContext(bounded(t)); err == nil {
		t.Error("the owned pool is still open")
	}
	if err := db.PingContext(bounded(t)); err != nil {
		t.Errorf("the caller's pool: %v", err)
	}
}

func testCloseTwice(s *suite, t *testing.T) {
	c := s.cache(t)
	mustSet(t, c, "k", "v", 0)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func testErrClosed(s *suite, t *testing.T) {
	dsn, _ := s.role(t)
	db := sql.OpenDB(s.connector(t, dsn))
	defer db.Close()
	guest, err := fastpgcache.New(db, s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	owner, never := s.open(t, dsn), s.open(t, dsn)
	for _, c := range []*fastpgcache.Cache{guest, owner} {
		mustSet(t, c, "k", "v", 0)
	}
	for _, c := range []*fastpgcache.Cache{guest, owner, never} {
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		for _, op := range operations() {
			_, err := op.run(bounded(t), c, "k")
			wantError(t, op.name, err, fastpgcache.ErrClosed)
		}
	}
}

func testCloseInFlight(s *suite, t *testing.T) {
	dsn, _ := s.role(t)
	c := s.open(t, dsn)
	mustSet(t, c, "k", "v", 0)
	var wg sync.WaitGroup
	started := make(chan struct{}, 1)
	for range 16 {
		wg.Go(func() {
			for {
				_, err := c.Get(t.Context(), "k", nil)
				if err != nil {
					wantError(t, "get", err, fastpgcache.ErrClosed)
					return
				}
				select {
				case started <- struct{}{}:
				default:
				}
			}
		})
	}
	for range 3 {
		<-started
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	done := make(chan struct{})
	go func() {
		wg.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(patience):
		t.Error("calls in flight at Close never returned")
	}
}

// The statements of a session that somebody prepared by hand; pgx has a cache of
// its own for the others.
const preparedSQL = `SELECT count(*) FROM pg_prepared_statements WHERE name NOT LIKE 'stmtcache\_%' AND statement NOT LIKE '%pg_prepared_statements%' AND statement LIKE `

func runEach(t *testing.T, c *fastpgcache.Cache, times int) {
	t.Helper()
	for range times {
		for _, op := range operations() {
			if _, err := op.run(bounded(t), c, "k"); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func testCloseReleases(s *suite, t *testing.T) {
	dsn, _ := s.role(t)
	db := sql.OpenDB(s.connector(t, dsn))
	defer db.Close()
	db.SetMaxOpenConns(1)
	c, err := fastpgcache.New(db, s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	runEach(t, c, 1)
	if got := one[int](t, db, preparedSQL+`'%'`); !s.cfg.DisablePrepare && got == 0 {
		t.Error("got no prepared statements before Close: this test sees nothing")
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if got := one[int](t, db, preparedSQL+`'%'`); got != 0 {
		t.Errorf("got %d prepared statements after Close, want none", got)
	}
}

func testPreparedOnce(s *suite, t *testing.T) {
	dsn, _ := s.role(t)
	c := s.open(t, dsn)
	c.DB().SetMaxOpenConns(1)
	runEach(t, c, 5)
	if again := one[int](t, c.DB(), strings.Replace(preparedSQL, "count(*)", "count(*) - count(DISTINCT statement)", 1)+`'%'`); again != 0 {
		t.Errorf("got %d statements prepared that were prepared before", again)
	}
	// In the background, and only now and then, the feed is trimmed and the limit is asked for.
	got := one[int](t, c.DB(), preparedSQL+`'%' AND statement NOT LIKE '%cache_trim%' AND statement NOT LIKE '%cache_limit%'`)
	want := len(operations())
	for _, op := range operations() {
		if op.walks {
			want++
		}
	}
	if s.cfg.DisablePrepare {
		want = 0
	}
	if got != want {
		t.Errorf("got %d statements prepared, want %d", got, want)
	}
}

func testNoGoroutine(s *suite, t *testing.T) {
	dsn, _ := s.role(t)
	goroutines.Do(t.Context(), t.Name(), func(ctx context.Context) {
		for range 2 {
			c, err := fastpgcache.OpenConnector(s.connector(t, dsn), s.cfg)
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for i := range 12 {
				wg.Go(func() {
					for _, op := range operations() {
						if _, err := op.run(ctx, c, fmt.Sprint(i)); err != nil {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			if _, stacks := goroutines.Of(t.Name()); strings.Contains(stacks, "github.com/fastpgcache/fastpgcache.(") {
				t.Errorf("Close returned, and these still run:\n%s", stacks)
			}
		}
	})
	await(t, "no goroutine is left", func() bool { n, _ := goroutines.Of(t.Name()); return n == 0 })
}

func testSchemaNames(s *suite, t *testing.T) {
	for _, name := range []string{
		`Mixed "quotes' \back`, "new\nline %", "do.t $1", "{user}{schema}", "select", strings.Repeat("n", 61) + "é", `"; DROP TABLE cache; --`,
	} {
		t.Run(name, func(t *testing.T) {
			s.setup(t, fastpgcache.SetupConfig{Schema: name})
			c := s.cache(t, inSchema(name))
			mustSet(t, c, "k", name, time.Hour)
			wantHit(t, c, "k", name)
			runEach(t, c, 1)
			wantMiss(t, s.cache(t), "k")
		})
	}
}

func testOneConnection(s *suite, t *testing.T) {
	dsn, _ := s.role(t)
	c := s.open(t, dsn)
	c.DB().SetMaxOpenConns(1)
	var wg sync.WaitGroup
	ctx := bounded(t)
	for i := range 16 {
		wg.Go(func() {
			for _, op := range operations() {
				if _, err := op.run(ctx, c, fmt.Sprint(i)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func testFirstCallsAtOnce(s *suite, t *testing.T) {
	dsn, _ := s.role(t)
	c := s.open(t, dsn)
	var wg sync.WaitGroup
	ctx := bounded(t)
	for i := range 64 {
		wg.Go(func() {
			key, want := fmt.Sprint(i%8), fmt.Sprint("v", i%8)
			if err := c.Set(ctx, key, want, time.Hour); err != nil {
				t.Error(err)
			}
			var got string
			if found, err := c.Get(ctx, key, &got); err != nil || !found || got != want {
				t.Errorf("got %q, %t, %v, want %q", got, found, err, want)
			}
		})
	}
	wg.Wait()
}
