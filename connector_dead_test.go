package fastpgcache_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
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
		get := func(d time.Duration) error {
			ctx, cancel := context.WithTimeout(t.Context(), d)
			defer cancel()
			_, err := c.Get(ctx, "k", nil)
			return err
		}
		if err := get(10 * time.Second); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			f.epoch.Add(1)
			// Whoever meets a dead connection waits for its own deadline, and the next one
			// must get another: places in the pool that were lost would be all of them by now.
			begin := time.Now()
			err := get(500 * time.Millisecond)
			for ; err != nil && time.Since(begin) < 20*time.Second; err = get(500 * time.Millisecond) {
				if !errors.Is(err, context.DeadlineExceeded) {
					t.Error(err)
				}
			}
			if err != nil {
				t.Errorf("it does not recover: %v", err)
			}
		}
		f.epoch.Add(1)
		begin := time.Now()
		if err := c.Close(); time.Since(begin) > 10*time.Second {
			t.Errorf("Close took %v: %v", time.Since(begin), err)
		}
	}
}
