package fastpgcache

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// setUp returns the DSN of a login role confined to its own entries, in a database
// of the test's own, and that of the superuser.
func setUp(t testing.TB) (dsn, admin string) {
	t.Helper()
	admin = pgtest.Database(t)
	if err := Setup(context.Background(), openDB(t, admin), SetupConfig{}); err != nil {
		t.Fatal(err)
	}
	return pgtest.WithUser(admin, pgtest.Role(t, admin)), admin
}

func openDB(t testing.TB, dsn string) *sql.DB {
	t.Helper()
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// openCache returns a cache with a pool of its own, as another process would have it.
// An error of background work fails the test, unless cfg sees to it.
func openCache(t testing.TB, dsn string, cfg Config) *Cache {
	t.Helper()
	if cfg.OnError == nil {
		cfg.OnError = func(err error) { t.Error(err) }
	}
	c, err := Open(dsn, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// eventually polls until cond holds.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// returns is a loader.
func returns(value any) func(context.Context) (any, error) {
	return func(context.Context) (any, error) { return value, nil }
}

// gate is a loader that says when it runs, and returns value once it may.
type gate struct {
	runs  chan context.Context
	value chan any
}

func newGate() gate { return gate{make(chan context.Context, 1), make(chan any, 1)} }

func (g gate) load(ctx context.Context) (any, error) {
	g.runs <- ctx
	return <-g.value, nil
}

// asked is a call of GetOrSet under way.
type asked struct {
	got string
	err error
}

func ask(ctx context.Context, c *Cache, key string, load func(context.Context) (any, error)) <-chan asked {
	answer := make(chan asked, 1)
	go func() {
		var a asked
		a.err = c.GetOrSet(ctx, key, &a.got, time.Minute, load)
		answer <- a
	}()
	return answer
}

func wantAnswer(t *testing.T, answer <-chan asked, want string) {
	t.Helper()
	select {
	case a := <-answer:
		if a.err != nil || a.got != want {
			t.Errorf("get or set: got %q, %v, want %q", a.got, a.err, want)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("get or set: no answer")
	}
}

func wantEntry(t *testing.T, c *Cache, key, want string) {
	t.Helper()
	var got string
	if found, err := c.Get(t.Context(), key, &got); err != nil || !found || got != want {
		t.Errorf("get %q: got %q, %t, %v, want %q", key, got, found, err, want)
	}
}

func wantNoEntry(t *testing.T, c *Cache, key string) {
	t.Helper()
	var got string
	if found, err := c.Get(t.Context(), key, &got); err != nil || found {
		t.Errorf("get %q: got %q, %t, %v, want a miss", key, got, found, err)
	}
}

// execAdmin runs a statement as superuser.
func execAdmin(t *testing.T, admin, statement string, args ...any) {
	t.Helper()
	if _, err := openDB(t, admin).Exec(statement, args...); err != nil {
		t.Fatal(err)
	}
}

func waiting(c *Cache, key string) int {
	c.loads.one.mu.Lock()
	defer c.loads.one.mu.Unlock()
	if l := c.loads.one.legs[key]; l != nil {
		return l.flight.seats
	}
	return 0
}

// The page of unit tests has every statement of loading, renew's too.
func TestLoadingSendsWhatIsDocumented(t *testing.T) {
	page, err := os.ReadFile("docs/unit-testing.md")
	if err != nil {
		t.Fatal(err)
	}
	c, err := Open("host=192.0.2.1", Config{}) // nobody's address, RFC 5737
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	l := &c.loads
	for _, s := range []*statement{l.acquire, l.look, l.store, l.release, l.renew, l.remember} {
		if !strings.Contains(string(page), "\n"+s.text+"\n") {
			t.Errorf("docs/unit-testing.md does not have\n%s", s.text)
		}
	}
}

func TestGetOrSetLoadsAMissingKeyOnceAndStoresIt(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	for _, value := range []any{"text", []byte{0xff, 0}, "", json.RawMessage(`{"a":1}`)} {
		key := fmt.Sprintf("%T%v", value, value)
		var got, again Value
		if err := c.GetOrSet(ctx, key, &got, time.Minute, returns(value)); err != nil {
			t.Fatal(err)
		}
		if err := c.GetOrSet(ctx, key, &again, time.Minute, func(context.Context) (any, error) {
			return nil, errors.New("loaded again")
		}); err != nil {
			t.Fatal(err)
		}
		want, _ := encode(value)
		if string(got) != string(want.value()) || string(again) != string(got) {
			t.Errorf("got %q, then %q, want %q", got, again, want.value())
		}
		if ttl, found, err := c.TTL(ctx, key); err != nil || !found || ttl > time.Minute || ttl < 50*time.Second {
			t.Errorf("ttl: got %v, %t, %v", ttl, found, err)
		}
	}
	if got := c.Stats().Loads; got != 4 {
		t.Errorf("got %d loads, want 4", got)
	}
}

func TestGetOrSetLeavesNoLease(t *testing.T) {
	ctx := t.Context()
	dsn, admin := setUp(t)
	c := openCache(t, dsn, Config{})
	failure := errors.New("no")
	if err := c.GetOrSet(ctx, "good", nil, 0, returns(1)); err != nil {
		t.Fatal(err)
	}
	if err := c.GetOrSet(ctx, "bad", nil, 0, func(context.Context) (any, error) { return nil, failure }); !errors.Is(err, failure) {
		t.Fatal(err)
	}
	if err := c.GetOrSet(ctx, "worse", nil, 0, returns(make(chan int))); err == nil {
		t.Fatal("a channel was stored")
	}
	db := openDB(t, admin)
	eventually(t, "no lease", func() bool {
		var n int
		if err := db.QueryRow(`SELECT count(*) FROM cache_lease`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n == 0
	})
	wantNoEntry(t, c, "bad")
	wantNoEntry(t, c, "worse")
}

func TestGetOrSetHoldsNoConnectionWhileLoading(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	c.DB().SetMaxOpenConns(1)
	g := newGate()
	answer := ask(ctx, c, "k", g.load)
	<-g.runs
	eventually(t, "no connection in use", func() bool { return c.DB().Stats().InUse == 0 })
	if err := c.Set(ctx, "other", 1, 0); err != nil {
		t.Error(err)
	}
	g.value <- "loaded"
	wantAnswer(t, answer, "loaded")
}

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

func TestGetOrSetReplacesWhatDoesNotDecode(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	if err := c.Set(ctx, "k", `{"A":1,"B":"no number"}`, 0); err != nil {
		t.Fatal(err)
	}
	type wanted struct{ A, B, C int }
	got := wanted{}
	if err := c.GetOrSet(ctx, "k", &got, 0, returns(wanted{B: 2, C: 3})); err != nil || got != (wanted{0, 2, 3}) {
		t.Errorf("got %v, %v", got, err)
	}
	wantEntry(t, c, "k", `{"A":0,"B":2,"C":3}`)

	// It is not replaced by what is loaded while another repairs it.
	if err := c.Set(ctx, "k", "broken", 0); err != nil {
		t.Fatal(err)
	}
	var n int
	if err := c.GetOrSet(ctx, "k", &n, 0, func(context.Context) (any, error) { return 1, c.Set(ctx, "k", 2, 0) }); err != nil || n != 2 {
		t.Errorf("got %d, %v, want 2", n, err)
	}
	// Nor removed by a loader that fails.
	if err := c.Set(ctx, "k", "broken", 0); err != nil {
		t.Fatal(err)
	}
	if err := c.GetOrSet(ctx, "k", &n, 0, func(context.Context) (any, error) { return nil, io.EOF }); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	wantEntry(t, c, "k", "broken")
}

func TestGetOrSetGivesEachCallerACopyOfItsOwnType(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	g := newGate()
	var wg sync.WaitGroup
	var a, b []int
	var text string
	var parsed any
	for _, dest := range []any{&a, &b, &text, &parsed, nil} {
		wg.Go(func() {
			if err := c.GetOrSet(ctx, "k", dest, 0, g.load); err != nil {
				t.Error(err)
			}
		})
	}
	eventually(t, "five callers", func() bool { return waiting(c, "k") == 5 })
	<-g.runs
	g.value <- []int{1, 2}
	wg.Wait()
	a[0] = 7
	if !slices.Equal(b, []int{1, 2}) || text != "[1,2]" || fmt.Sprint(parsed) != "[1 2]" {
		t.Errorf("got %v, %q, %v", b, text, parsed)
	}

	// Callers of one key with types that do not go together all get an answer.
	if err := c.Set(ctx, "mixed", "text", 0); err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		wg.Go(func() {
			var n int
			var s string
			if i%2 == 0 {
				if err := c.GetOrSet(ctx, "mixed", &n, 0, returns(5)); err != nil || n != 5 {
					t.Errorf("got %d, %v, want 5", n, err)
				}
			} else if err := c.GetOrSet(ctx, "mixed", &s, 0, returns("never")); err != nil || s != "text" && s != "5" {
				t.Errorf("got %q, %v", s, err)
			}
		})
	}
	wg.Wait()
}

func TestGetOrSetFailsForAllOfThisProcessWhenItsLoaderFails(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	failure := errors.New("source is down")
	release := make(chan struct{})
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			err := c.GetOrSet(ctx, "k", nil, 0, func(context.Context) (any, error) { <-release; return nil, failure })
			if !errors.Is(err, failure) || !strings.HasPrefix(err.Error(), "fastpgcache: get or set: ") {
				t.Errorf("got %v", err)
			}
		})
	}
	eventually(t, "ten callers", func() bool { return waiting(c, "k") == 10 })
	close(release)
	wg.Wait()
	if got := c.Stats().Loads; got != 1 {
		t.Errorf("got %d loads, want 1", got)
	}
	// The next call loads anew.
	wantAnswer(t, ask(ctx, c, "k", returns("up again")), "up again")
}

// isBoom reports whether p is a panic "boom" with the stack that led there.
func isBoom(p any) bool {
	said := fmt.Sprint(p)
	return strings.HasPrefix(said, "panic: boom\n\ngoroutine ") && strings.Contains(said, "load_test.go")
}

func TestGetOrSetPanicsOnInTheFirstCallerOnly(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	for name, end := range map[string]func(){"panic": func() { panic("boom") }, "Goexit": runtime.Goexit} {
		t.Run(name, func(t *testing.T) {
			release := make(chan struct{})
			var panics, errs atomic.Int64
			var wg sync.WaitGroup
			for range 10 {
				wg.Go(func() {
					defer func() {
						if p := recover(); isBoom(p) {
							panics.Add(1)
						} else if p != nil {
							t.Errorf("panic: %v", p)
						}
					}()
					if err := c.GetOrSet(ctx, name, nil, 0, func(context.Context) (any, error) {
						<-release
						end()
						return "never", nil
					}); err != nil {
						errs.Add(1)
						if says := map[string]string{"panic": "panic: boom", "Goexit": "runtime.Goexit"}[name]; !strings.Contains(err.Error(), says) {
							t.Errorf("got %v, want it to say %q", err, says)
						}
					}
				})
			}
			eventually(t, "ten callers", func() bool { return waiting(c, name) == 10 })
			close(release)
			wg.Wait()
			want := int64(0)
			if name == "panic" {
				want = 1
			}
			if panics.Load() != want || errs.Load() != 10-want {
				t.Errorf("got %d panics and %d errors", panics.Load(), errs.Load())
			}
			wantAnswer(t, ask(ctx, c, name, returns("loaded")), "loaded")
		})
	}
}

// panicky is a value whose methods panic.
type panicky struct{}

func (panicky) MarshalJSON() ([]byte, error) { panic("boom") }
func (*panicky) UnmarshalJSON([]byte) error  { panic("boom") }

func TestGetOrSetPanicsOnWhatValuesPanicWith(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	other := openCache(t, dsn, Config{})
	wantPanic := func(call func() error) {
		t.Helper()
		defer func() {
			if p := recover(); !isBoom(p) {
				t.Errorf("got panic %v", p)
			}
		}()
		t.Errorf("got no panic, but %v", call())
	}
	wantPanic(func() error { return c.GetOrSet(ctx, "k", nil, 0, returns(panicky{})) })
	// In the flight, not in the caller: the entry comes while it waits.
	g := newGate()
	answer := ask(ctx, other, "k", g.load)
	<-g.runs
	go func() {
		eventually(t, "a caller waits", func() bool { return waiting(c, "k") == 1 })
		g.value <- "5"
	}()
	wantPanic(func() error { return c.GetOrSet(ctx, "k", new(panicky), 0, returns("")) })
	wantAnswer(t, answer, "5")
	wantAnswer(t, ask(ctx, c, "k", returns("")), "5")
}

func TestGetOrSetLoaderLivesAsLongAsAnyCallerWaits(t *testing.T) {
	type trace struct{}
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	firstCtx, leaveFirst := context.WithTimeout(context.WithValue(t.Context(), trace{}, "first"), time.Hour)
	secondCtx, leaveSecond := context.WithCancel(context.WithValue(t.Context(), trace{}, "second"))
	g := newGate()
	first := ask(firstCtx, c, "k", g.load)
	ctx := <-g.runs
	if _, ok := ctx.Deadline(); ok || ctx.Value(trace{}) != "first" {
		t.Errorf("the loader's ctx has a deadline, or lacks the first caller's values: %v", ctx)
	}
	second := ask(secondCtx, c, "k", g.load)
	eventually(t, "two callers", func() bool { return waiting(c, "k") == 2 })

	leaveFirst()
	if a := <-first; !errors.Is(a.err, context.Canceled) {
		t.Errorf("the first caller got %v", a.err)
	}
	if ctx.Err() != nil {
		t.Error("the load ended with its first caller")
	}
	leaveSecond()
	if a := <-second; !errors.Is(a.err, context.Canceled) {
		t.Errorf("the second caller got %v", a.err)
	}
	<-ctx.Done()

	// Whoever comes now does not get the abandoned load's error.
	third := ask(t.Context(), c, "k", returns("fresh"))
	g.value <- "late"
	if a := <-third; a.err != nil || a.got != "late" && a.got != "fresh" {
		t.Errorf("the third caller got %q, %v", a.got, a.err)
	}
}

func TestGetOrSetTakesOverALeaseThatRanOut(t *testing.T) {
	ctx := t.Context()
	dsn, admin := setUp(t)
	paused, other := openCache(t, dsn, Config{}), openCache(t, dsn, Config{})
	g := newGate()
	first := ask(ctx, paused, "k", g.load)
	<-g.runs
	second := ask(ctx, other, "k", returns("taken over"))
	eventually(t, "the other waits", func() bool { return waiting(other, "k") == 1 })
	execAdmin(t, admin, `UPDATE cache_lease SET expires_at = statement_timestamp()`)
	wantAnswer(t, second, "taken over")

	// Its first holder comes back too late, and knows it.
	g.value <- "out of date"
	wantAnswer(t, first, "taken over")
	wantEntry(t, other, "k", "taken over")

	// The same when the new holder is not done yet.
	if _, err := other.Delete(ctx, "k"); err != nil {
		t.Fatal(err)
	}
	g2 := newGate()
	first = ask(ctx, paused, "k", g.load)
	<-g.runs
	second = ask(ctx, other, "k", g2.load)
	eventually(t, "the other waits", func() bool { return waiting(other, "k") == 1 })
	execAdmin(t, admin, `UPDATE cache_lease SET expires_at = statement_timestamp()`)
	<-g2.runs
	g.value <- "out of date"
	wantAnswer(t, first, "out of date") // for this caller alone
	wantNoEntry(t, other, "k")
	g2.value <- "taken over"
	wantAnswer(t, second, "taken over")
	wantEntry(t, other, "k", "taken over")
}

// A lease that ends later than any lease can stops nobody: the clock was set back.
func TestGetOrSetTakesOverALeaseFromTheFuture(t *testing.T) {
	dsn, admin := setUp(t)
	c := openCache(t, dsn, Config{})
	db := openDB(t, pgtest.WithUser(admin, roleOf(t, dsn)))
	for _, until := range []string{"now() + interval '1 hour'", "'infinity'", "now() + interval '15 seconds'"} {
		if _, err := db.Exec(`INSERT INTO cache_lease (key, holder, expires_at) VALUES ($1, 'dead', `+until+`)`, until); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		wantAnswer(t, ask(t.Context(), c, until, returns("loaded")), "loaded")
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("%s: waited %v for a lease that is over", until, took)
		}
		wantEntry(t, c, until, "loaded")
	}
}

func roleOf(t *testing.T, dsn string) (role string) {
	t.Helper()
	if err := openDB(t, dsn).QueryRow(`SELECT current_user`).Scan(&role); err != nil {
		t.Fatal(err)
	}
	return role
}

// A renewal never takes the lease from the store that follows it.
func TestGetOrSetStoresThroughRenewals(t *testing.T) {
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	c.loads.leaseFor = 30 * time.Millisecond
	const loads = 60
	for i := range loads {
		if err := c.GetOrSet(t.Context(), fmt.Sprint(i), nil, 0, func(context.Context) (any, error) {
			time.Sleep(9*time.Millisecond + time.Duration(i)*50*time.Microsecond) // a renewal is under way
			return i, nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	if got := c.Stats().Sets; got != loads {
		t.Errorf("%d of %d loads were stored", got, loads)
	}
}

func TestGetOrSetKeepsItsLeaseWhileLoading(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	slow, other := openCache(t, dsn, Config{}), openCache(t, dsn, Config{})
	slow.loads.leaseFor = 200 * time.Millisecond
	g := newGate()
	first := ask(ctx, slow, "k", g.load)
	<-g.runs
	second := ask(ctx, other, "k", returns("too early"))
	time.Sleep(3 * slow.loads.leaseFor)
	g.value <- "loaded"
	wantAnswer(t, first, "loaded")
	wantAnswer(t, second, "loaded")

	// Not for a loader that nobody waits for.
	if _, err := other.Delete(ctx, "k"); err != nil {
		t.Fatal(err)
	}
	ctx, leave := context.WithCancel(ctx)
	first = ask(ctx, slow, "k", g.load)
	<-g.runs
	leave()
	<-first
	wantAnswer(t, ask(t.Context(), other, "k", returns("taken over")), "taken over")
	g.value <- "abandoned"
	if err := slow.Close(); err != nil { // it awaits the loader
		t.Error(err)
	}
	wantEntry(t, other, "k", "taken over")
}

func TestGetOrSetLoadsWithoutADatabase(t *testing.T) {
	ctx := t.Context()
	server := pgtest.Own(t, pgtest.Config{Durable: true})
	dsn := server.Database(t)
	if err := Setup(ctx, openDB(t, dsn), SetupConfig{}); err != nil {
		t.Fatal(err)
	}
	var reported atomic.Int64
	c := openCache(t, dsn, Config{OnError: func(error) { reported.Add(1) }})
	load := func(value string) func(context.Context) (any, error) {
		return func(context.Context) (any, error) { return value, nil }
	}
	wantAnswer(t, ask(ctx, c, "before", load("up")), "up")
	if reported.Load() != 0 {
		t.Error("an error was reported while all was well")
	}
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	wantAnswer(t, ask(ctx, c, "k", load("down")), "down")
	if reported.Load() == 0 {
		t.Error("no error was reported")
	}
	if err := server.StartAgain(ctx); err != nil {
		t.Fatal(err)
	}
	// What was loaded without a lease is not stored behind anybody's Delete.
	g := newGate()
	fell := ask(ctx, c, "fell", g.load)
	<-g.runs
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	g.value <- "fell while loading"
	wantAnswer(t, fell, "fell while loading")
	if err := server.StartAgain(ctx); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the cache works again", func() bool {
		_, err := c.Get(ctx, "k", nil)
		return err == nil
	})
	wantAnswer(t, ask(ctx, c, "k", load("up again")), "up again")
	wantEntry(t, c, "k", "up again")
}

func TestGetOrSetEndsWithClose(t *testing.T) {
	dsn, admin := setUp(t)
	c := openCache(t, dsn, Config{})
	running := make(chan struct{})
	answer := ask(t.Context(), c, "k", func(ctx context.Context) (any, error) {
		close(running)
		<-ctx.Done()
		return nil, ctx.Err()
	})
	<-running
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if a := <-answer; !errors.Is(a.err, ErrClosed) {
		t.Errorf("got %q, %v, want ErrClosed", a.got, a.err)
	}
	if err := c.GetOrSet(t.Context(), "k", nil, 0, returns(1)); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: got %v, want ErrClosed", err)
	}
	var leases int
	if err := openDB(t, admin).QueryRow(`SELECT count(*) FROM cache_lease`).Scan(&leases); err != nil || leases != 0 {
		t.Errorf("got %d leases, %v, want none: others would wait for it", leases, err)
	}
}

func TestGetOrSetInATransaction(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	tx, err := c.DB().Begin()
	if err != nil {
		t.Fatal(err)
	}
	var got, ignored string
	if err := c.WithTx(tx).GetOrSet(ctx, "k", &got, 0, returns("loaded")); err != nil || got != "loaded" {
		t.Errorf("got %q, %v", got, err)
	}
	if err := c.WithTx(tx).GetOrSet(ctx, "k", &ignored, 0, returns("again")); err != nil || ignored != "loaded" {
		t.Errorf("got %q, %v, want the entry", ignored, err)
	}
	if err := c.WithTx(tx).GetOrSet(ctx, "bad", nil, 0, func(context.Context) (any, error) { return nil, io.EOF }); !errors.Is(err, io.EOF) {
		t.Errorf("got %v", err)
	}
	wantNoEntry(t, c, "k")
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	wantNoEntry(t, c, "k")
}

func TestGetOrSetRefusesBadInputBeforeLoading(t *testing.T) {
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	never := func(context.Context) (any, error) { t.Error("loaded"); return nil, nil }
	for name, err := range map[string]error{
		"key":  c.GetOrSet(t.Context(), "", nil, 0, never),
		"ttl":  c.GetOrSet(t.Context(), "k", nil, -5, never),
		"dest": c.GetOrSet(t.Context(), "k", 5, 0, never),
		"load": c.GetOrSet(t.Context(), "k", nil, 0, nil),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.GetOrSet(ended, "k", nil, 0, never); !errors.Is(err, context.Canceled) {
		t.Errorf("ctx: got %v", err)
	}
}
