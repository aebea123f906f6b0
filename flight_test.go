package fastpgcache

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

func newFlights(ctx context.Context) *flights[string] {
	return &flights[string]{ctx: ctx, run: func(f func()) { go f() }}
}

// seatFor gives the test a seat for key, and leaves it when the test ends.
func seatFor(t *testing.T, fs *flights[string], key string, fly func(context.Context, *flight[string])) seat[string] {
	t.Helper()
	s := fs.join(t.Context(), []string{key}, fly)[0]
	t.Cleanup(s.leave)
	return s
}

func wantOutcome(t *testing.T, who string, s seat[string], want string, wantGood bool) {
	t.Helper()
	if got, good, err := s.await(t.Context()); got != want || good != wantGood || err != nil {
		t.Errorf("%s: got %q, %t, %v, want %q, %t", who, got, good, err, want, wantGood)
	}
}

// Who joins when the answer is already on its way starts over.
func TestFlightAnswersWhoJoinedBeforeItSent(t *testing.T) {
	fs := newFlights(t.Context())
	step := make(chan struct{})
	fly := func(_ context.Context, f *flight[string]) {
		step <- struct{}{}
		looked := f.send()
		step <- struct{}{}
		f.land("k", outcome[string]{value: "entry", good: looked})
	}
	first := seatFor(t, fs, "k", fly)
	second := seatFor(t, fs, "k", nil)
	<-step
	for fs.sent("k") == 0 {
		runtime.Gosched()
	}
	third := seatFor(t, fs, "k", nil)
	<-step
	wantOutcome(t, "first", first, "entry", true)
	wantOutcome(t, "second", second, "entry", true)
	wantOutcome(t, "too late", third, "", false)
}

func (fs *flights[V]) sent(key string) int {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return fs.legs[key].flight.sent
}

// A flight for several keys takes along those that nobody searches for, and each
// lands for itself.
func TestFlightForManyKeysTakesWhatIsFree(t *testing.T) {
	fs := newFlights(t.Context())
	release := make(chan struct{})
	land := func(name string) func(context.Context, *flight[string]) {
		return func(_ context.Context, f *flight[string]) {
			for _, key := range f.keys {
				<-release
				f.land(key, outcome[string]{value: name + " " + key, good: everybody})
			}
		}
	}
	a := fs.join(t.Context(), []string{"2", "1"}, land("a"))
	b := fs.join(t.Context(), []string{"1", "3", "2", "4"}, land("b"))
	for range 4 {
		release <- struct{}{}
	}
	var got []string
	for _, s := range append(a, b...) {
		v, _, _ := s.await(t.Context())
		got = append(got, v)
		s.leave()
	}
	if want := "[a 2 a 1 a 1 b 3 a 2 b 4]"; fmt.Sprint(got) != want {
		t.Errorf("got %v, want %v", got, want)
	}
	if len(fs.legs) != 0 {
		t.Errorf("%d keys are still in the air", len(fs.legs))
	}
}

func TestFlightEndsWhenNobodySitsInIt(t *testing.T) {
	type trace struct{}
	fs := newFlights(t.Context())
	begun, ended := make(chan context.Context), make(chan struct{})
	fly := func(ctx context.Context, _ *flight[string]) {
		begun <- ctx
		<-ctx.Done()
		close(ended)
	}
	ctx, cancel := context.WithCancel(context.WithValue(t.Context(), trace{}, "first's"))
	a := fs.join(ctx, []string{"1", "2"}, fly)
	b := seatFor(t, fs, "2", nil)
	flying := <-begun
	if flying.Value(trace{}) != "first's" {
		t.Error("the flight lacks the values of its first caller's ctx")
	}
	cancel()
	if _, _, err := a[0].await(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the caller's own error", err)
	}
	a[0].leave()
	a[1].leave()
	if flying.Err() != nil {
		t.Error("the flight ended though somebody waits")
	}
	b.leave()
	<-ended
	// Who comes now is not in the abandoned flight.
	c := fs.join(t.Context(), []string{"1"}, func(_ context.Context, f *flight[string]) {
		f.land("1", outcome[string]{value: "new", good: everybody})
	})[0]
	wantOutcome(t, "after", c, "new", true)
	c.leave()
	b.leg.flight.seats++ // for the cleanup's leave
}

func TestFlightEndsWithTheCache(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	fs := newFlights(ctx)
	s := seatFor(t, fs, "k", func(ctx context.Context, f *flight[string]) {
		<-ctx.Done()
		f.land("k", outcome[string]{err: ctx.Err(), good: everybody})
	})
	stop()
	if _, _, err := s.await(t.Context()); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func explode() { panic(errLeftOut) }

func TestFlightThatPanicsOrExitsLandsForAll(t *testing.T) {
	for name, end := range map[string]func(){"panic": explode, "Goexit": runtime.Goexit} {
		t.Run(name, func(t *testing.T) {
			fs := newFlights(t.Context())
			wait := make(chan struct{})
			first := seatFor(t, fs, "k", func(context.Context, *flight[string]) { <-wait; end() })
			second := seatFor(t, fs, "k", nil)
			close(wait)
			_, _, err := second.await(t.Context())
			if err == nil {
				t.Error("got no error")
			}
			var p any
			func() {
				defer func() { p = recover() }()
				_, _, err := first.await(t.Context())
				if !errors.Is(err, errGoexit) {
					t.Errorf("got %v", err)
				}
			}()
			if name == "Goexit" {
				if p != nil || !errors.Is(err, errGoexit) {
					t.Errorf("got panic %v, and for others %v", p, err)
				}
				return
			}
			for _, has := range []string{errLeftOut.Error(), "fastpgcache.explode"} {
				if !strings.Contains(fmt.Sprint(p), has) || !strings.Contains(err.Error(), has) {
					t.Errorf("got panic %v and error %v: want %q in them", p, err, has)
				}
			}
			if cause, ok := p.(error); !ok || !errors.Is(cause, errLeftOut) || !errors.Is(err, errLeftOut) {
				t.Error("what was panicked with is not in the error")
			}
		})
	}
}

// Callers at random, who come, leave early and start over, beside a source that
// changes: none gets what was there before it came.
func TestFlightNeverAnswersWithWhatWasBefore(t *testing.T) {
	t.Parallel()
	fs := newFlights(t.Context())
	const keys, callers = 4, 16
	var source [keys]atomic.Int64
	fly := func(_ context.Context, f *flight[string]) {
		for _, key := range f.keys {
			k := key[0] - '0'
			looked := f.send()
			v := source[k].Load()
			runtime.Gosched()
			f.land(key, outcome[string]{value: fmt.Sprint(v), good: looked})
		}
	}
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for range 2000 {
				perm := rand.Perm(keys)[:1+rand.IntN(keys)]
				var asked []string
				var atLeast []int64
				for _, k := range perm {
					asked = append(asked, fmt.Sprint(k))
					atLeast = append(atLeast, source[k].Add(1))
				}
				seats := fs.join(t.Context(), asked, fly)
				for i, s := range seats {
					if rand.IntN(10) > 0 {
						v, good, err := s.await(t.Context())
						var got int64
						fmt.Sscan(v, &got)
						if err != nil || good && got < atLeast[i] {
							t.Errorf("got %d, %v, want at least %d", got, err, atLeast[i])
						}
					}
					s.leave()
				}
			}
		})
	}
	wg.Wait()
	if len(fs.legs) != 0 {
		t.Errorf("%d keys are still in the air", len(fs.legs))
	}
}
