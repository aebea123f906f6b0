package fastpgcache

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime/debug"
	"sync"
)

// flights are the searches for values that go on in this process: one at most for
// each key, for all callers who ask for it meanwhile. It knows neither keys' values
// nor where they come from.
//
// What a flight finds may be older than a caller who joined late: an entry that was
// deleted between the flight's look and the caller's arrival. So a flight counts what
// it sends, a caller remembers the count at which it joined, and an outcome says up to
// which count it is good. A caller who joined later than that starts over.
type flights[V any] struct {
	ctx context.Context // ends every flight
	run func(func())    // runs a flight in the background

	mu   sync.Mutex
	legs map[string]*leg[V] // of the keys in the air
}

// flight is one search for the values of some keys, on a goroutine of its own.
type flight[V any] struct {
	keys []string // in the order asked

	of     *flights[V]
	ahead  map[string]*leg[V] // what has not landed yet; the flight's own
	cancel context.CancelFunc

	// Guarded by of.mu.
	sent  int // looks, loads and stores
	seats int // taken by callers
}

// leg is a flight's part for one key.
type leg[V any] struct {
	flight  *flight[V]
	done    chan struct{} // closed when outcome is final
	outcome outcome[V]
}

// outcome is what a flight found for one key.
type outcome[V any] struct {
	value V
	err   error
	good  int // for callers who joined at this count, or before
}

// everybody is the count of an outcome that no caller can be too late for.
const everybody = math.MaxInt

// seat is a caller's place in a flight, for one key.
type seat[V any] struct {
	leg    *leg[V]
	joined int  // what the flight had sent by then
	first  bool // whose call began the flight
}

// join gives the caller a seat for each of keys, which are distinct: in the flight
// that is under way for it or, for all that have none, in a new one, which fly is to
// do. fly's ctx has the values of the caller's; it ends when nobody has a seat any
// more. The caller leaves every seat in the end.
func (fs *flights[V]) join(ctx context.Context, keys []string, fly func(context.Context, *flight[V])) []seat[V] {
	seats := make([]seat[V], len(keys))
	f := &flight[V]{of: fs}
	fs.mu.Lock()
	for i, key := range keys {
		l := fs.legs[key]
		first := l == nil
		if first {
			l = f.add(key)
		}
		l.flight.seats++
		seats[i] = seat[V]{leg: l, joined: l.flight.sent, first: first}
	}
	if len(f.keys) > 0 {
		ctx, f.cancel = context.WithCancel(context.WithoutCancel(ctx))
	}
	fs.mu.Unlock()
	if len(f.keys) > 0 {
		fs.run(func() { f.fly(ctx, fly) })
	}
	return seats
}

// add gives f, which has not begun, another key. It needs of.mu.
func (f *flight[V]) add(key string) *leg[V] {
	l := &leg[V]{flight: f, done: make(chan struct{})}
	if f.ahead == nil {
		f.ahead = make(map[string]*leg[V])
	}
	if f.of.legs == nil {
		f.of.legs = make(map[string]*leg[V])
	}
	f.keys = append(f.keys, key)
	f.ahead[key] = l
	f.of.legs[key] = l
	return l
}

// await waits for the outcome, and reports whether it is good for this caller. A
// panic of the flight goes on in the caller that began it; it is an error to others.
func (s seat[V]) await(ctx context.Context) (v V, good bool, err error) {
	select {
	case <-s.leg.done:
	case <-ctx.Done():
		return v, true, ctx.Err()
	}
	o := s.leg.outcome
	if p := (*panicked)(nil); s.first && errors.As(o.err, &p) {
		panic(p)
	}
	if s.joined > o.good {
		return v, false, nil
	}
	return o.value, true, o.err
}

// leave gives the seat up. A flight that nobody sits in ends, and nobody joins it.
func (s seat[V]) leave() {
	f := s.leg.flight
	f.of.mu.Lock()
	defer f.of.mu.Unlock()
	if f.seats--; f.seats > 0 {
		return
	}
	f.cancel()
	for _, key := range f.keys {
		if l := f.of.legs[key]; l != nil && l.flight == f {
			delete(f.of.legs, key)
		}
	}
}

// send counts something that f is about to send, and returns the count before: what
// it brings is good for callers who had joined by then.
func (f *flight[V]) send() int {
	f.of.mu.Lock()
	defer f.of.mu.Unlock()
	f.sent++
	return f.sent - 1
}

// land wakes everyone who waits for key. The next caller begins a new flight.
func (f *flight[V]) land(key string, o outcome[V]) {
	l := f.ahead[key]
	delete(f.ahead, key)
	f.of.mu.Lock()
	if f.of.legs[key] == l {
		delete(f.of.legs, key)
	}
	f.of.mu.Unlock()
	l.outcome = o
	close(l.done)
}

// fly is the whole of f. However fly ends, every key lands.
func (f *flight[V]) fly(ctx context.Context, fly func(context.Context, *flight[V])) {
	defer context.AfterFunc(f.of.ctx, f.cancel)()
	defer f.cancel()
	guard(func() { fly(ctx, f) }, func(err error) {
		for _, key := range f.keys {
			if f.ahead[key] != nil {
				f.land(key, outcome[V]{err: err, good: everybody})
			}
		}
	})
}

// guard runs f. If f panics or ends its goroutine, failed is told; a panic stops here.
func guard(f func(), failed func(error)) {
	returned := false
	defer func() {
		if p := recover(); p != nil {
			failed(&panicked{p, debug.Stack()})
		} else if !returned {
			failed(errGoexit)
		}
	}()
	f()
	returned = true
}

var errGoexit = errors.New("it ended its goroutine (runtime.Goexit)")

// panicked is a panic as an error, with the stack of where it happened.
type panicked struct {
	value any
	stack []byte
}

func (p *panicked) Error() string { return fmt.Sprintf("panic: %v\n\n%s", p.value, p.stack) }

func (p *panicked) Unwrap() error {
	err, _ := p.value.(error)
	return err
}
