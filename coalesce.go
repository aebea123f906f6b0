package fastpgcache

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// Bounds of a batch: enough calls to make the statement's own cost small, few
// enough that nobody waits long for the others.
const (
	maxBatchCalls = 256
	maxBatchBytes = 1 << 20
	maxCallBytes  = 64 << 10 // a larger call goes alone
)

// sendEvery is how many calls join a batch before it is looked at again whether one
// more statement may be in flight: the more wait, the more may.
const sendEvery = crowd / 2

// slowAfter is how long calls wait behind statements of which none ends, before
// those stop counting as in flight.
const slowAfter = 50 * time.Millisecond

// Letting go of the processor this often brings back most callers of the last batch:
// measured with bench/load.
const (
	maxYields   = 32
	maxYielding = 100 * time.Microsecond
)

// merger is what the coalescers of a cache have in common.
type merger struct {
	ctx      context.Context      // ends when the cache closes
	run      func(f func())       // runs f in the background, or at once when ctx has ended
	budget   *budget              // whose connections their statements take
	oneFault func(err error) bool // whether a statement's error may be due to one of its calls
}

// coalescer merges concurrent calls of one kind into statements. A call that finds
// none in flight runs alone, on its own goroutine and context; others gather in a
// batch, which goes out the moment a place is free: at once where the server is far
// and idle, so that a call that is alone then goes alone. Nothing waits for a timer:
// the busier the database, the larger the batches.
//
// A is a call's argument and R its result.
type coalescer[A, R any] struct {
	merger
	one   func(ctx context.Context, arg A) (R, error)
	many  func(ctx context.Context, args []A) ([]R, error) // a result for each
	size  func(arg A) int                                  // bytes that the argument adds to a batch
	share *share                                           // of the budget

	waiting atomic.Int32 // calls in queue; written under mu

	mu       sync.Mutex
	places   places
	inFlight int            // statements, but for those found slow
	round    int            // how often those in flight were found slow
	ended    int            // statements that ended, ever
	timer    *time.Timer    // looks for slow statements while a batch waits
	queue    []*batch[A, R] // oldest first; only the newest has room
}

func newCoalescer[A, R any](m merger, one func(context.Context, A) (R, error), many func(context.Context, []A) ([]R, error), size func(A) int) *coalescer[A, R] {
	c := &coalescer[A, R]{merger: m, one: one, many: many, size: size}
	c.share = m.budget.share(func() {
		c.mu.Lock()
		c.send()
	})
	return c
}

// batch is calls that share a statement. It has no caller's context: once it is sent,
// ctx ends when none of them waits any more, or the cache closes.
type batch[A, R any] struct {
	ctx     context.Context
	cancel  context.CancelFunc
	waiters []*waiter[A, R]
	bytes   int
	here    int           // waiters that have not left
	sent    bool          // no call can be withdrawn any more
	done    chan struct{} // closed when every waiter has its result
}

// waiter is one caller's part in a batch.
type waiter[A, R any] struct {
	arg    A
	result R
	err    error
	left   bool
}

// do makes a call, together with others. A caller whose ctx ends leaves alone; its
// call is withdrawn if it was not sent yet.
func (c *coalescer[A, R]) do(ctx context.Context, arg A) (R, error) {
	return c.call(ctx, arg, c.size(arg))
}

// alone makes a call in a statement of its own.
func (c *coalescer[A, R]) alone(ctx context.Context, arg A) (R, error) {
	return c.call(ctx, arg, maxCallBytes+1)
}

// call makes a call of size bytes.
func (c *coalescer[A, R]) call(ctx context.Context, arg A, size int) (R, error) {
	c.mu.Lock()
	if c.inFlight == 0 && len(c.queue) == 0 && c.share.take() {
		c.inFlight++
		round := c.round
		c.mu.Unlock()
		defer c.release(round)
		return c.single(ctx, arg)
	}
	b := c.open(size)
	w := &waiter[A, R]{arg: arg}
	b.waiters = append(b.waiters, w)
	b.here++
	waiting := int(c.waiting.Add(1))
	switch {
	case len(b.waiters) == 1:
		if c.places.free(c.inFlight, waiting) { // whoever is about to call comes along
			c.mu.Unlock()
			runtime.Gosched()
			c.mu.Lock()
			if len(b.waiters) == 1 && !b.sent && c.queue[0] == b && c.next() {
				round := c.round
				c.send()
				defer c.release(round)
				return c.single(ctx, arg)
			}
		}
		c.send()
	case len(b.waiters)%sendEvery == 0:
		c.send()
	default:
		c.mu.Unlock()
	}

	select {
	case <-b.done:
		return w.result, w.err
	case <-ctx.Done():
		c.leave(b, w)
		var none R
		return none, ctx.Err()
	}
}

// open returns, under mu, a batch in queue that takes size bytes more.
func (c *coalescer[A, R]) open(size int) *batch[A, R] {
	if size > maxCallBytes {
		size = maxBatchBytes // it fills a batch
	}
	if n := len(c.queue); n > 0 {
		if b := c.queue[n-1]; len(b.waiters) < maxBatchCalls && b.bytes+size <= maxBatchBytes {
			b.bytes += size
			return b
		}
	}
	b := &batch[A, R]{bytes: size, done: make(chan struct{}), waiters: make([]*waiter[A, R], 0, 32)}
	c.queue = append(c.queue, b)
	return b
}

// leave takes a caller out of its batch.
func (c *coalescer[A, R]) leave(b *batch[A, R], w *waiter[A, R]) {
	c.mu.Lock()
	defer c.mu.Unlock()
	w.left = true
	b.here--
	if b.here == 0 && b.sent {
		b.cancel()
	}
}

// release gives back the place of a statement that was sent in round. The budget
// offers it to other kinds first.
func (c *coalescer[A, R]) release(round int) {
	c.mu.Lock()
	c.ended++
	if round == c.round {
		c.inFlight--
	}
	c.mu.Unlock()
	c.share.give()
	c.mu.Lock()
	c.send()
}

// next takes, under mu, a place for the oldest batch and the batch from the queue. It
// reports false if there is no place.
func (c *coalescer[A, R]) next() bool {
	b := c.queue[0]
	if b.here > 0 {
		if !c.places.free(c.inFlight, int(c.waiting.Load())) || !c.share.take() {
			return false
		}
		c.inFlight++
	}
	c.queue = c.queue[1:]
	c.waiting.Add(-int32(len(b.waiters)))
	b.sent = true
	return true
}

// send hands free places to the oldest batches. It unlocks mu.
func (c *coalescer[A, R]) send() {
	var sent []*batch[A, R]
	for len(c.queue) > 0 {
		b := c.queue[0]
		if !c.next() {
			break
		}
		if b.here > 0 {
			b.ctx, b.cancel = context.WithCancel(c.ctx)
			sent = append(sent, b)
		}
	}
	switch {
	case len(c.queue) > 0 && c.timer == nil:
		c.watch(c.ended)
	case len(c.queue) == 0 && c.timer != nil:
		c.timer.Stop()
		c.timer = nil
	}
	round := c.round
	c.mu.Unlock()
	for _, b := range sent {
		c.run(func() { c.answer(b, round) })
	}
}

// answer makes the calls of a batch and wakes its callers.
func (c *coalescer[A, R]) answer(b *batch[A, R], round int) {
	defer c.release(round)
	defer c.regather(len(b.waiters))
	defer close(b.done)
	defer b.cancel()

	waiters := make([]*waiter[A, R], 0, len(b.waiters))
	args := make([]A, 0, len(b.waiters))
	c.mu.Lock()
	for _, w := range b.waiters {
		if !w.left {
			waiters = append(waiters, w)
			args = append(args, w.arg)
		}
	}
	c.mu.Unlock()

	if len(waiters) > 1 {
		results, err := c.together(b.ctx, args)
		if err == nil || !c.oneFault(err) {
			for i, w := range waiters {
				if w.err = err; err == nil {
					w.result = results[i]
				}
			}
			return
		}
		// One caller's bad value must not fail the others'.
	}
	for _, w := range waiters {
		w.result, w.err = c.single(b.ctx, w.arg)
	}
}

// single makes one call.
func (c *coalescer[A, R]) single(ctx context.Context, arg A) (R, error) {
	sent := time.Now()
	result, err := c.one(ctx, arg)
	c.timed(sent, err)
	return result, err
}

// together makes several calls in one statement.
func (c *coalescer[A, R]) together(ctx context.Context, args []A) ([]R, error) {
	sent := time.Now()
	results, err := c.many(ctx, args)
	c.timed(sent, err)
	return results, err
}

// timed notes how long a statement took. One that failed may never have reached the server.
func (c *coalescer[A, R]) timed(sent time.Time, err error) {
	if err != nil {
		return
	}
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.places.done(now, now.Sub(sent))
}

// regather lets the n callers that were just woken call again, so that the next batch
// is as large as the last: until three in four have, or it is clear that they will not,
// or the processors have other things to do. Where a statement takes far longer than
// this, all should come along: who does not waits for a whole one.
func (c *coalescer[A, R]) regather(n int) {
	start := time.Now()
	enough := n - n/4
	c.mu.Lock()
	if c.places.took() > 10*maxYielding {
		enough = n + int(c.waiting.Load())
	}
	c.mu.Unlock()
	for range maxYields {
		if int(c.waiting.Load()) >= enough || time.Since(start) > maxYielding {
			return
		}
		runtime.Gosched()
	}
}

// watch looks, until no batch waits, for statements in flight of which none has
// ended since the last look, ended being the count then: they wait for a lock or a
// slow server, and stop counting as in flight so that the rest moves on. The budget
// bounds how many there can be.
func (c *coalescer[A, R]) watch(ended int) {
	c.timer = time.AfterFunc(slowAfter/2, func() {
		c.mu.Lock()
		if c.timer == nil {
			c.mu.Unlock()
			return
		}
		c.watch(c.ended)
		if ended == c.ended {
			c.inFlight = 0
			c.round++
		}
		c.send()
	})
}
