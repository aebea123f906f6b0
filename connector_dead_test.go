package fastpgcache_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// A forwarder stands before a server. When it is told to forget, what its connections
// carry vanishes without a word, as behind a firewall; new ones work.
type forwarder struct {
	listener net.Listener
	epoch    atomic.Int64
}

func newForwarder(t *testing.T, server string) *forwarder {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &forwarder{listener: l}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			upstream, err := net.Dial("tcp", server)
			if err != nil {
				client.Close()
				continue
			}
			t.Cleanup(func() { client.Close(); upstream.Close() })
			go f.copy(client, upstream, f.epoch.Load())
			go f.copy(upstream, client, f.epoch.Load())
		}
	}()
	return f
}

func (f *forwarder) copy(to, from net.Conn, epoch int64) {
	buf := make([]byte, 1<<16)
	for {
		n, err := from.Read(buf)
		if f.epoch.Load() != epoch {
			io.Copy(io.Discard, from)
			return
		}
		to.Write(buf[:n])
		if err != nil {
			to.Close()
			return
		}
	}
}

func TestADeadConnectionDoesNotKeepItsPlaceInThePool(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.setup(l.admin, fastpgcache.SetupConfig{})
	host, port := pgtest.Shared(t).Addr()
	f := newForwarder(t, fmt.Sprintf("%s:%d", host, port))
	address := f.listener.Addr().(*net.TCPAddr)
	for _, open := range []func(dsn string) (*fastpgcache.Cache, error){
		func(dsn string) (*fastpgcache.Cache, error) { return fastpgcache.Open(dsn, fastpgcache.Config{}) },
		func(dsn string) (*fastpgcache.Cache, error) {
			c, err := fastpgcache.NewConnector(dsn, fastpgcache.TokenFunc(func(context.Context) (string, error) { return "t", nil }))
			if err != nil {
				return nil, err
			}
			return fastpgcache.OpenConnector(c, fastpgcache.Config{})
		},
	} {
		c, err := open(fmt.Sprintf("%s host=127.0.0.1 port=%d", l.dsn, address.Port))
		if err != nil {
			t.Fatal(err)
		}
		c.DB().SetMaxOpenConns(2)
		get := func(ctx context.Context) error {
			_, err := c.Get(ctx, "k", nil)
			return err
		}
		mustGet := func() {
			if err := get(t.Context()); err != nil {
				t.Error(err)
			}
		}
		transact := func(ctx context.Context) error {
			tx, err := c.DB().BeginTx(ctx, nil)
			if err == nil {
				err = tx.Rollback()
			}
			return err
		}
		soon(t, "the first Get", mustGet)
		for _, ask := range []func(context.Context) error{get, transact, get, transact} {
			f.epoch.Add(1)
			// Whoever meets a dead connection waits for its own deadline, and the next one
			// must get another: places in the pool that were lost would be all of them by now.
			var err error
			for begin := time.Now(); time.Since(begin) < 20*time.Second; {
				soon(t, "a call with a deadline", func() {
					ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
					defer cancel()
					err = ask(ctx)
				})
				if err == nil {
					break
				}
				if !errors.Is(err, context.DeadlineExceeded) {
					t.Error(err)
				}
			}
			if err != nil {
				t.Errorf("it does not recover: %v", err)
			}
		}
		soon(t, "Get", mustGet) // which leaves a prepared statement to close
		f.epoch.Add(1)
		soon(t, "closing idle connections", func() { c.DB().SetMaxIdleConns(-1) })
		c.DB().SetMaxIdleConns(2)
		soon(t, "Get", mustGet)
		f.epoch.Add(1)
		soon(t, "Close", func() { c.Close() })
	}
}

// After a restart of the server a service that ends need not report its idle connections.
func TestCloseOfAPoolWhoseSessionsAreGoneIsNoError(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.setup(l.admin, fastpgcache.SetupConfig{})
	role := pgtest.Role(t, l.dsn)
	for range 2 {
		c, err := fastpgcache.Open(pgtest.WithUser(l.dsn, role), fastpgcache.Config{})
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				if _, err := c.Get(t.Context(), "k", nil); err != nil {
					t.Error(err)
				}
				if err := c.Ping(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		l.exec(l.admin, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '`+role+`'`)
		l.exec(l.admin, `DO $$ BEGIN
			WHILE EXISTS (SELECT FROM pg_stat_activity WHERE usename = '`+role+`') LOOP
				PERFORM pg_stat_clear_snapshot(), pg_sleep(0.001);
			END LOOP; END $$`)
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if err := c.DB().Ping(); err == nil {
			t.Error("the pool is open")
		}
	}
}

// soon fails the test if f takes longer than 10 s.
func soon(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal(what, " takes more than 10 s")
	}
}
