package fastpgcache

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lib/pq"
)

// recorder is a coalescer's database: it notes each statement's arguments and
// answers when told to.
type recorder struct {
	mu         sync.Mutex
	statements [][]string
	ctxs       []context.Context
	answer     chan struct{}             // one receive lets one statement end
	fail       func(args []string) error // nil fails none
}

func (r *recorder) run(ctx context.Context, args []string) ([]string, error) {
	r.mu.Lock()
	r.statements = append(r.statements, slices.Clone(args))
	r.ctxs = append(r.ctxs, ctx)
	r.mu.Unlock()
	select {
	case <-r.answer:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if r.fail != nil {
		if err := r.fail(args); err != nil {
			return nil, err
		}
	}
	results := make([]string, len(args))
	for i, a := range args {
		results[i] = "result of " + a
	}
	return results, nil
}

func (r *recorder) sent() [][]string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.statements)
}

// one and many make r's calls.
func (r *recorder) one(ctx context.Context, arg string) (string, error) {
	results, err := r.run(ctx, []string{arg})
	if err != nil {
		return "", err
	}
	return results[0], nil
}

// over returns a coalescer over r whose statements take their connections from b.
func over(ctx context.Context, b *budget, r *recorder) *coalescer[string, string] {
	r.answer = make(chan struct{})
	m := merger{ctx, func(f func()) { go f() }, b, causedByData}
	return newCoalescer(m, r.one, r.run, func(arg string) int { return len(arg) })
}

// poolOf returns the budget of a pool of so many connections.
func poolOf(conns int) *budget { return &budget{pool: func() int { return conns }} }

// inBubble runs f with a coalescer over r whose pool has conns connections, with a
// clock that only moves when everybody waits.
func inBubble(t *testing.T, conns int, r *recorder, f func(t *testing.T, c *coalescer[string, string])) {
	synctest.Test(t, func(t *testing.T) {
		c := over(t.Context(), poolOf(conns), r)
		f(t, c)
		synctest.Wait()
		if c.inFlight != 0 || c.waiting.Load() != 0 || c.budget.taken != 0 {
			t.Errorf("at the end: %d in flight, %d waiting, %d places taken, want none", c.inFlight, c.waiting.Load(), c.budget.taken)
		}
	})
}

// start calls do on a goroutine and returns where its outcome will be.
func start(ctx context.Context, c *coalescer[string, string], arg string) <-chan error {
	outcome := make(chan error, 1)
	go func() {
		result, err := c.do(ctx, arg)
		if err == nil && result != "result of "+arg {
			err = fmt.Errorf("%s got %q", arg, result)
		}
		outcome <- err
	}()
	synctest.Wait()
	return outcome
}

func TestCallsGatherWhileStatementsAreInFlight(t *testing.T) {
	r := &recorder{}
	inBubble(t, 10, r, func(t *testing.T, c *coalescer[string, string]) {
		var outcomes []<-chan error
		for _, arg := range []string{"a", "b", "c", "d", "e"} {
			outcomes = append(outcomes, start(t.Context(), c, arg))
		}
		want := [][]string{{"a"}, {"b"}}
		if got := r.sent(); !slices.EqualFunc(got, want, slices.Equal) {
			t.Errorf("with nothing ended: sent %v, want %v", got, want)
		}
		r.answer <- struct{}{}
		synctest.Wait()
		want = append(want, []string{"c", "d", "e"})
		if got := r.sent(); !slices.EqualFunc(got, want, slices.Equal) {
			t.Errorf("with one ended: sent %v, want %v", got, want)
		}
		close(r.answer)
		for _, o := range outcomes {
			if err := <-o; err != nil {
				t.Error(err)
			}
		}
	})
}

func TestACrowdGetsAThirdStatement(t *testing.T) {
	for conns, want := range map[int][]int{10: {1, 1, crowd}, 4: {1, 1}, 0: {1, 1, crowd}} {
		r := &recorder{}
		inBubble(t, conns, r, func(t *testing.T, c *coalescer[string, string]) {
			var outcomes []<-chan error
			call := func(n int) {
				for range n {
					outcomes = append(outcomes, start(t.Context(), c, fmt.Sprint("call ", len(outcomes))))
				}
			}
			check := func(when string, want []int) {
				t.Helper()
				var got []int
				for _, args := range r.sent() {
					got = append(got, len(args))
				}
				if !slices.Equal(got, want) {
					t.Errorf("%d connections, %s: sent %v calls, want %v", conns, when, got, want)
				}
			}
			call(2 + crowd - 1)
			check("before it is one", []int{1, 1})
			call(1)
			check("with a crowd", want)
			call(crowd)
			check("with another", want) // no fourth
			close(r.answer)
			for _, o := range outcomes {
				if err := <-o; err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// A call that finds a place free, but another statement in flight, lets those go
// first who would call next.
func TestTheSecondStatementTakesAlongWhoCallsJustThen(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	together := 0
	const tries = 5 // Go's scheduler turns to others nearly always, not always
	for range tries {
		r := &recorder{}
		inBubble(t, 10, r, func(t *testing.T, c *coalescer[string, string]) {
			outcomes := []<-chan error{start(t.Context(), c, "first")}
			for i := range 5 {
				outcome := make(chan error, 1)
				go func() {
					_, err := c.do(t.Context(), fmt.Sprint(i))
					outcome <- err
				}()
				outcomes = append(outcomes, outcome)
			}
			synctest.Wait()
			if got := r.sent(); len(got) == 2 && len(got[1]) == 5 {
				together++
			}
			close(r.answer)
			for _, o := range outcomes {
				if err := <-o; err != nil {
					t.Error(err)
				}
			}
		})
	}
	if together < tries-2 {
		t.Errorf("five calls went together %d times of %d", together, tries)
	}
}

// Callers who call again at once, as they wake, are in the next batch together.
func TestABatchAwaitsThoseItWoke(t *testing.T) {
	r := &recorder{}
	inBubble(t, 3, r, func(t *testing.T, c *coalescer[string, string]) { // one in flight
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
		var wg sync.WaitGroup
		for i := range 1 + 10 {
			wg.Go(func() {
				for range 1 + min(i, 1)*4 { // the first calls once, the others five times
					if _, err := c.do(t.Context(), fmt.Sprint(i)); err != nil {
						t.Error(err)
					}
				}
			})
			synctest.Wait()
		}
		close(r.answer)
		wg.Wait()
		if got := len(r.sent()); got > 8 {
			t.Errorf("sent %d statements of %v, want six or little more", got, r.sent())
		}
	})
}

func TestAPoolOfOneConnectionHasOneStatementInFlight(t *testing.T) {
	r := &recorder{}
	inBubble(t, 1, r, func(t *testing.T, c *coalescer[string, string]) {
		a, b := start(t.Context(), c, "a"), start(t.Context(), c, "b")
		if got := len(r.sent()); got != 1 {
			t.Errorf("%d statements in flight, want 1", got)
		}
		close(r.answer)
		if err := errors.Join(<-a, <-b); err != nil {
			t.Error(err)
		}
	})
}

func TestACallThatGivesUpBeforeItIsSentIsWithdrawn(t *testing.T) {
	r := &recorder{}
	inBubble(t, 1, r, func(t *testing.T, c *coalescer[string, string]) {
		first := start(t.Context(), c, "first")
		ctx, cancel := context.WithCancel(t.Context())
		gone, stays := start(ctx, c, "gone"), start(t.Context(), c, "stays")
		cancel()
		if err := <-gone; !errors.Is(err, context.Canceled) {
			t.Errorf("the one that gave up got %v, want %v", err, context.Canceled)
		}
		close(r.answer)
		if err := errors.Join(<-first, <-stays); err != nil {
			t.Error(err)
		}
		want := [][]string{{"first"}, {"stays"}}
		if got := r.sent(); !slices.EqualFunc(got, want, slices.Equal) {
			t.Errorf("sent %v, want %v", got, want)
		}
	})
}

func TestABatchIsAbandonedOnlyByAllItsCallers(t *testing.T) {
	r := &recorder{}
	inBubble(t, 1, r, func(t *testing.T, c *coalescer[string, string]) {
		type value struct{}
		first := start(t.Context(), c, "first")
		ctx1, cancel1 := context.WithCancel(context.WithValue(t.Context(), value{}, 1))
		ctx2, cancel2 := context.WithCancel(t.Context())
		one, two := start(ctx1, c, "one"), start(ctx2, c, "two")
		r.answer <- struct{}{}
		if err := <-first; err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		batch := r.ctxs[1]
		if batch.Value(value{}) != nil {
			t.Error("the batch carries a caller's context value")
		}
		cancel1()
		if err := <-one; !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		synctest.Wait()
		if err := batch.Err(); err != nil {
			t.Errorf("abandoned while a caller waits: %v", err)
		}
		cancel2()
		<-two
		synctest.Wait()
		if batch.Err() == nil {
			t.Error("goes on with no caller waiting")
		}
	})
}

func TestABadValueFailsItsOwnCallerOnly(t *testing.T) {
	r := &recorder{fail: func(args []string) error {
		if slices.Contains(args, "bad") {
			return &pq.Error{Code: "22021"}
		}
		return nil
	}}
	inBubble(t, 1, r, func(t *testing.T, c *coalescer[string, string]) {
		first := start(t.Context(), c, "first")
		good, bad, fine := start(t.Context(), c, "good"), start(t.Context(), c, "bad"), start(t.Context(), c, "fine")
		close(r.answer)
		if err := errors.Join(<-first, <-good, <-fine); err != nil {
			t.Error(err)
		}
		if err := <-bad; sqlState(err) != "22021" {
			t.Errorf("the bad one got %v", err)
		}
	})
}

func TestAnErrorThatIsNotOfDataGoesToEveryCallerOnce(t *testing.T) {
	r := &recorder{fail: func(args []string) error {
		if len(args) > 1 {
			return &pq.Error{Code: "57P01"}
		}
		return nil
	}}
	inBubble(t, 1, r, func(t *testing.T, c *coalescer[string, string]) {
		first := start(t.Context(), c, "first")
		a, b := start(t.Context(), c, "a"), start(t.Context(), c, "b")
		close(r.answer)
		if err := <-first; err != nil {
			t.Error(err)
		}
		for _, o := range []<-chan error{a, b} {
			if err := <-o; sqlState(err) != "57P01" {
				t.Errorf("got %v", err)
			}
		}
		if got := len(r.sent()); got != 2 {
			t.Errorf("%d statements, want 2", got)
		}
	})
}

func TestSlowStatementsGiveUpTheirPlaces(t *testing.T) {
	r := &recorder{}
	inBubble(t, 10, r, func(t *testing.T, c *coalescer[string, string]) {
		stuck1, stuck2 := start(t.Context(), c, "stuck1"), start(t.Context(), c, "stuck2")
		next := start(t.Context(), c, "next")
		began := time.Now()
		for len(r.sent()) < 3 {
			time.Sleep(time.Millisecond)
			synctest.Wait()
		}
		if took := time.Since(began); took > slowAfter+time.Millisecond {
			t.Errorf("the next call waited %v, want at most %v", took, slowAfter)
		}
		// With its place back, the rest does not wait at all.
		begun := time.Now()
		after := start(t.Context(), c, "after")
		if got := len(r.sent()); got != 4 || time.Since(begun) > 0 {
			t.Errorf("%d statements after %v, want 4 at once", got, time.Since(begun))
		}
		close(r.answer)
		if err := errors.Join(<-stuck1, <-stuck2, <-next, <-after); err != nil {
			t.Error(err)
		}
	})
}

func TestALargeCallGoesAlone(t *testing.T) {
	r := &recorder{}
	inBubble(t, 1, r, func(t *testing.T, c *coalescer[string, string]) {
		large := strings.Repeat("x", maxCallBytes+1)
		var outcomes []<-chan error
		for _, arg := range []string{"first", "a", "b", large, "c", "d"} {
			outcomes = append(outcomes, start(t.Context(), c, arg))
		}
		close(r.answer)
		for _, o := range outcomes {
			if err := <-o; err != nil {
				t.Error(err)
			}
		}
		want := [][]string{{"first"}, {"a", "b"}, {large}, {"c", "d"}}
		if got := r.sent(); !slices.EqualFunc(got, want, slices.Equal) {
			t.Errorf("sent %d statements, want the large call in one of its own", len(got))
		}
	})
}

func TestACallThatWantsToBeAloneIs(t *testing.T) {
	r := &recorder{}
	inBubble(t, 1, r, func(t *testing.T, c *coalescer[string, string]) {
		first, before := start(t.Context(), c, "first"), start(t.Context(), c, "before")
		ended := make(chan error)
		go func() {
			_, err := c.alone(t.Context(), "alone")
			ended <- err
		}()
		synctest.Wait()
		after := start(t.Context(), c, "after")
		close(r.answer)
		if err := errors.Join(<-first, <-before, <-ended, <-after); err != nil {
			t.Error(err)
		}
		want := [][]string{{"first"}, {"before"}, {"alone"}, {"after"}}
		if got := r.sent(); !slices.EqualFunc(got, want, slices.Equal) {
			t.Errorf("sent %v, want %v", got, want)
		}
	})
}

func TestBatchesAreBounded(t *testing.T) {
	r := &recorder{}
	inBubble(t, 1, r, func(t *testing.T, c *coalescer[string, string]) {
		var outcomes []<-chan error
		for range 3*maxBatchCalls + 1 {
			outcomes = append(outcomes, start(t.Context(), c, "a"))
		}
		large := strings.Repeat("x", maxCallBytes)
		for range 2 * maxBatchBytes / maxCallBytes {
			outcomes = append(outcomes, start(t.Context(), c, large))
		}
		close(r.answer)
		for _, o := range outcomes {
			if err := <-o; err != nil {
				t.Error(err)
			}
		}
		for _, args := range r.sent() {
			bytes := 0
			for _, a := range args {
				bytes += len(a)
			}
			if len(args) > maxBatchCalls || bytes > maxBatchBytes {
				t.Errorf("a batch of %d calls, %d bytes", len(args), bytes)
			}
		}
	})
}

func TestItsEndEndsWaitingCalls(t *testing.T) {
	r := &recorder{}
	synctest.Test(t, func(t *testing.T) {
		ctx, end := context.WithCancel(t.Context())
		c := over(ctx, poolOf(1), r)
		first := start(t.Context(), c, "first")
		second := start(t.Context(), c, "second")
		r.answer <- struct{}{}
		if err := <-first; err != nil {
			t.Error(err)
		}
		synctest.Wait() // the second is in flight, with a batch's context
		third := start(t.Context(), c, "third")
		end()
		if err := <-second; !errors.Is(err, context.Canceled) {
			t.Errorf("the one in flight got %v, want %v", err, context.Canceled)
		}
		if err := <-third; !errors.Is(err, context.Canceled) {
			t.Errorf("the one that waited got %v, want %v", err, context.Canceled)
		}
	})
}
