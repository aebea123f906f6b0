package fastpgcache

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// Whatever happens to the entry during the load wins, in this process and another.
func TestGetOrSetLosesToWhatHappensDuringTheLoad(t *testing.T) {
	ctx := t.Context()
	dsn, admin := setUp(t)
	here := openCache(t, dsn, Config{})
	other := openCache(t, dsn, Config{})
	const gone = "\x00"
	tests := []struct {
		name string
		do   func(c *Cache, key string) error
		want string // the entry afterwards; and the callers' value, if there is one
	}{
		{"Set", func(c *Cache, key string) error { return c.Set(ctx, key, "set", 0) }, "set"},
		{"Add", func(c *Cache, key string) error { _, err := c.Add(ctx, key, "added", 0); return err }, "added"},
		{"Increment", func(c *Cache, key string) error { _, err := c.Increment(ctx, key, 7, 0); return err }, "7"},
		{"Delete", func(c *Cache, key string) error { _, err := c.Delete(ctx, key); return err }, gone},
		{"Clear", func(c *Cache, key string) error { _, err := c.Clear(ctx); return err }, gone},
		{"Set, Delete", func(c *Cache, key string) error {
			_, err := c.Delete(ctx, key)
			return errors.Join(c.Set(ctx, key, "set", 0), err)
		}, "set"},
		{"Set and Take", func(c *Cache, key string) error {
			err := c.Set(ctx, key, "set", 0)
			_, _, err2 := c.Take(ctx, key)
			return errors.Join(err, err2)
		}, gone},
		{"Set that expires", func(c *Cache, key string) error {
			err := c.Set(ctx, key, "set", time.Millisecond)
			time.Sleep(2 * time.Millisecond)
			return err
		}, gone},
		{"Set that expires and is cleaned up", func(c *Cache, key string) error {
			err := c.Set(ctx, key, "set", time.Millisecond)
			time.Sleep(2 * time.Millisecond)
			_, err2 := c.Cleanup(ctx)
			return errors.Join(err, err2)
		}, gone},
		{"cache_delete", func(c *Cache, key string) error {
			_, err := c.DB().Exec(`SELECT cache_delete(current_user, $1)`, key)
			return err
		}, gone},
	}
	for _, test := range tests {
		for place, c := range map[string]*Cache{"here": here, "in another process": other} {
			t.Run(test.name+" "+place, func(t *testing.T) {
				key := t.Name()
				g := newGate()
				first := ask(ctx, here, key, g.load)
				<-g.runs
				second := ask(ctx, here, key, returns("loaded afresh"))
				eventually(t, "two callers", func() bool { return waiting(here, key) == 2 })
				if err := test.do(c, key); err != nil {
					t.Fatal(err)
				}
				g.value <- "loaded"
				if test.want != gone {
					wantAnswer(t, first, test.want)
					wantAnswer(t, second, test.want)
					wantEntry(t, other, key, test.want)
					return
				}
				wantAnswer(t, second, "loaded afresh")
				wantEntry(t, other, key, "loaded afresh")
				if a := <-first; a.err != nil || a.got != "loaded" && a.got != "loaded afresh" {
					t.Errorf("the first caller got %q, %v", a.got, a.err)
				}
			})
		}
	}
	execAdmin(t, admin, `TRUNCATE cache`)
}

// A store that fails is no store: who came while the value was loaded starts over.
func TestGetOrSetDoesNotShareWhatItCouldNotStore(t *testing.T) {
	ctx := t.Context()
	dsn, admin := setUp(t)
	execAdmin(t, admin, `ALTER TABLE cache ADD CONSTRAINT never CHECK (value <> 'never')`)
	var reported atomic.Int64
	c := openCache(t, dsn, Config{OnError: func(error) { reported.Add(1) }})
	g := newGate()
	first := ask(ctx, c, "k", g.load)
	<-g.runs
	second := ask(ctx, c, "k", returns("loaded afresh"))
	eventually(t, "two callers", func() bool { return waiting(c, "k") == 2 })
	g.value <- "never"
	wantAnswer(t, first, "never")
	wantAnswer(t, second, "loaded afresh")
	wantEntry(t, c, "k", "loaded afresh")
	if reported.Load() != 1 {
		t.Errorf("got %d errors reported, want that of the store", reported.Load())
	}
}

// What a loader failed with before a Delete is not the answer after it.
func TestGetOrSetDoesNotShareAnErrorFromBeforeADelete(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	runs, fail := make(chan struct{}), make(chan struct{})
	first := ask(ctx, c, "k", func(context.Context) (any, error) {
		close(runs)
		<-fail
		return nil, sql.ErrNoRows
	})
	<-runs
	if _, err := c.Delete(ctx, "k"); err != nil { // behind an INSERT into the source
		t.Fatal(err)
	}
	second := ask(ctx, c, "k", returns("now there"))
	eventually(t, "two callers", func() bool { return waiting(c, "k") == 2 })
	close(fail)
	if a := <-first; !errors.Is(a.err, sql.ErrNoRows) {
		t.Errorf("the first caller got %q, %v", a.got, a.err)
	}
	wantAnswer(t, second, "now there")
}

// holder is a proxy that holds back the server's answer to a statement.
type holder struct {
	net.Listener
	text    string        // what the statement has in it
	holding chan struct{} // closed when the answer is held back
	release chan struct{} // to be closed
	once    sync.Once
}

// holdBack returns a holder for the server of dsn, and the DSN to reach it by.
func holdBack(t *testing.T, dsn, text string) (*holder, string) {
	t.Helper()
	host := regexp.MustCompile(`host=(\S+)`).FindStringSubmatch(dsn)
	port := regexp.MustCompile(`port=(\d+)`).FindStringSubmatch(dsn)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil || host == nil || port == nil {
		t.Fatal(err, dsn)
	}
	t.Cleanup(func() { l.Close() })
	h := &holder{Listener: l, text: text, holding: make(chan struct{}), release: make(chan struct{})}
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", net.JoinHostPort(strings.Trim(host[1], "'"), port[1]))
			if err != nil {
				client.Close()
				return
			}
			h.serve(client, server)
		}
	}()
	_, own, _ := net.SplitHostPort(l.Addr().String())
	dsn = strings.Replace(dsn, port[0], "port="+own, 1)
	return h, strings.Replace(dsn, host[0], "host=127.0.0.1", 1)
}

func (h *holder) serve(client, server net.Conn) {
	var held atomic.Bool
	go func() {
		defer server.Close()
		b := make([]byte, 64<<10)
		for {
			n, err := client.Read(b)
			if strings.Contains(string(b[:n]), h.text) {
				h.once.Do(func() { held.Store(true) })
			}
			if _, err2 := server.Write(b[:n]); err != nil || err2 != nil {
				return
			}
		}
	}()
	go func() {
		defer client.Close()
		b := make([]byte, 64<<10)
		for {
			n, err := server.Read(b)
			if n > 0 && held.Swap(false) {
				close(h.holding)
				<-h.release
			}
			if _, err2 := client.Write(b[:n]); err != nil || err2 != nil {
				return
			}
		}
	}()
}

// A caller who comes after a Delete, when the answer from before it is on its way.
func TestGetOrSetAfterADeleteNeverGetsAnAnswerHeldBack(t *testing.T) {
	ctx := t.Context()
	dsn, admin := setUp(t)
	other := openCache(t, dsn, Config{})
	for name, text := range map[string]string{"look": "AS version", "store": "AS MATERIALIZED"} {
		t.Run(name, func(t *testing.T) {
			h, through := holdBack(t, dsn, text)
			c := openCache(t, through, Config{DisablePrepare: true})
			// The first caller waits for a lease, until there is an entry for its look.
			locked, err := openDB(t, admin).Begin()
			if err != nil {
				t.Fatal(err)
			}
			defer locked.Rollback()
			if _, err := locked.Exec(`LOCK TABLE cache_lease IN EXCLUSIVE MODE`); err != nil {
				t.Fatal(err)
			}
			first := ask(ctx, c, name, returns("old"))
			eventually(t, "a caller waits", func() bool { return waiting(c, name) == 1 })
			if name == "look" {
				if err := other.Set(ctx, name, "old", 0); err != nil {
					t.Fatal(err)
				}
			}
			if err := locked.Rollback(); err != nil {
				t.Fatal(err)
			}
			<-h.holding
			if deleted, err := other.Delete(ctx, name); err != nil || !deleted {
				t.Fatalf("deleted: got %t, %v, want what was stored", deleted, err)
			}
			second := ask(ctx, c, name, returns("new"))
			eventually(t, "two callers", func() bool { return waiting(c, name) == 2 })
			close(h.release)
			wantAnswer(t, first, "old")
			wantAnswer(t, second, "new")
			wantEntry(t, other, name, "new")
		})
	}
}

// A Delete that is under way when the loaded value is stored wins, too.
func TestGetOrSetLosesToADeleteAtTheLastMoment(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dsn, _ := setUp(t)
	loading, deleting := openCache(t, dsn, Config{}), openCache(t, dsn, Config{})
	for name, remove := range map[string]func(string) error{
		"Delete": func(key string) error { _, err := deleting.Delete(ctx, key); return err },
		"DeleteMany": func(key string) error {
			_, err := deleting.DeleteMany(ctx, []string{key, "other"})
			return err
		},
		"Clear": func(string) error { _, err := deleting.Clear(ctx); return err },
		"cache_delete": func(key string) error {
			_, err := deleting.DB().ExecContext(ctx, `SELECT cache_delete(current_user, $1)`, key)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) { testDeleteAtTheLastMoment(t, loading, deleting, remove) })
	}
}

func testDeleteAtTheLastMoment(t *testing.T, loading, deleting *Cache, remove func(key string) error) {
	ctx := t.Context()
	rounds := 200
	if pgtest.Long() {
		rounds = 800
	}
	var source, stale atomic.Int64 // what the loader reads
	for i := range rounds {
		key := fmt.Sprint(t.Name(), i)
		loaded := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := loading.GetOrSet(ctx, key, nil, 0, func(context.Context) (any, error) {
				v := source.Load()
				close(loaded)
				return v, nil
			}); err != nil {
				t.Error(err)
			}
		})
		<-loaded
		source.Add(1)
		for range (i % 40) * 400 { // µs apart
			runtime.KeepAlive(i)
		}
		if err := remove(key); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		var got int64
		if found, err := deleting.Get(ctx, key, &got); err != nil {
			t.Fatal(err)
		} else if found && got != source.Load() {
			stale.Add(1)
		}
	}
	if n := stale.Load(); n > 0 {
		t.Errorf("%d of %d deleted entries came back", n, rounds)
	}
}
