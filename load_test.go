package fastpgcache

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

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

func TestGetOrSetLoadsWithoutADatabase(t *testing.T) {
	t.Parallel()
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
