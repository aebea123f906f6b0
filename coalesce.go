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

// slowAfter is how long calls wait behind statements of which none ends, before
// those stop counting as in flight.
const slowAfter = 50 * time.Millisecond

// Measured with bench/load on two processors: two statements keep them busy, a third
// pays for itself behind a crowd, and letting go of the processor this often brings
// back most callers of the last batch.
const (
	maxInFlight = 3
	crowd       = 32 // calls
	maxYields   = 32
	maxYielding = 100 * time.Microsecond
)

// places is how many statements a coalescer may have in flight, and how many more
// may be slow: more would find no more work to merge, and keep the pool from the
// caller's own use of it.
func (c *core) places() (inFlight, slow int) {
	pool := c.db.Stats().MaxOpenConnections
	if pool == 0 {
		return maxInFlight, 8
	}
	return min(maxInFlight, max(1, pool/2)), pool / 4
}

// coalescer merges concurrent calls of one operation into statements. A call that
// finds none in flight runs alone, on its own goroutine and context; others gather in
// a batch, which goes out the moment a place is free. Nothing waits for a timer: the
// busier the database, the larger the batches.
//
// A is a call's argument and R its result.
type coalescer[A, R any] struct {
	one  func(ctx context.Context, arg A) (R, error)
	many func(ctx context.Context, args []A) ([]R, error)
	size func(arg A) int // bytes that the argument adds to a batch
	core *core

	gathered atomic.Int32 // calls in waiting; written under mu

	mu       sync.Mutex
	limit    int            // statements in flight; 0 until it is first needed
	inFlight int            // of this round
	slow     int            // of rounds before
	round    int            // how often those in flight were found slow
	ended    int            // statements that ended, ever
	timer    *time.Timer    // looks for slow statements while a batch waits
	waiting  []*batch[A, R] // oldest first; only the newest has room
}

// batch is calls that share a statement. It has no caller's context: ctx ends when
// none of them waits any more, or the cache closes.
type batch[A, R any] struct {
	ctx    context.Context
	cancel context.CancelFunc
	calls  []*call[A, R]
	bytes  int
	here   int           // calls whose caller still waits
	sent   bool          // no call can be withdrawn any more
	done   chan struct{} // closed when every call has its result
}

// call is one caller's part in a batch.
type call[A, R any] struct {
	arg    A
	result R
	err    error
	left   bool
}

// do runs the operation for one caller. A caller whose ctx ends leaves alone; its
// call is withdrawn if it was not sent yet.
func (c *coalescer[A, R]) do(ctx context.Context, arg A) (R, error) {
	size := c.size(arg)
	if size > maxCallBytes {
		return c.one(ctx, arg)
	}
	c.mu.Lock()
	if c.inFlight == 0 && len(c.waiting) == 0 {
		c.inFlight++
		round := c.round
		c.mu.Unlock()
		defer c.release(round)
		return c.one(ctx, arg)
	}
	b := c.open(size)
	call := &call[A, R]{arg: arg}
	b.calls = append(b.calls, call)
	b.bytes += size
	b.here++
	c.gathered.Add(1)
	switch len(b.calls) {
	case 1:
		if c.free() { // whoever is about to call comes along
			c.mu.Unlock()
			runtime.Gosched()
			c.mu.Lock()
		}
		c.send()
	case crowd:
		c.send()
	default:
		c.mu.Unlock()
	}

	select {
	case <-b.done:
		return call.result, call.err
	case <-ctx.Done():
		c.leave(b, call)
		var none R
		return none, ctx.Err()
	}
}

// free reports, under mu, whether a place is free: the last one is for a crowd.
func (c *coalescer[A, R]) free() bool {
	if c.limit == 0 {
		c.limit, _ = c.core.places()
	}
	return c.inFlight < min(c.limit, maxInFlight-1) || c.inFlight < c.limit && c.gathered.Load() >= crowd
}

// open returns, under mu, a waiting batch that has room for a call of size bytes.
func (c *coalescer[A, R]) open(size int) *batch[A, R] {
	if n := len(c.waiting); n > 0 {
		if b := c.waiting[n-1]; len(b.calls) < maxBatchCalls && b.bytes+size <= maxBatchBytes {
			return b
		}
	}
	b := &batch[A, R]{done: make(chan struct{}), calls: make([]*call[A, R], 0, 32)}
	b.ctx, b.cancel = context.WithCancel(c.core.ctx)
	c.waiting = append(c.waiting, b)
	if c.timer == nil {
		c.watch(c.ended)
	}
	return b
}

// leave takes a caller out of its batch.
func (c *coalescer[A, R]) leave(b *batch[A, R], call *call[A, R]) {
	c.mu.Lock()
	defer c.mu.Unlock()
	call.left = true
	b.here--
	if b.here == 0 && b.sent {
		b.cancel()
	}
}

// release gives back a place that was taken in round.
func (c *coalescer[A, R]) release(round int) {
	c.mu.Lock()
	c.ended++
	if round == c.round {
		c.inFlight--
	} else {
		c.slow--
	}
	c.send()
}

// send hands the free places to the oldest batches. It unlocks mu.
func (c *coalescer[A, R]) send() {
	var sent []*batch[A, R]
	for len(c.waiting) > 0 && c.free() {
		b := c.waiting[0]
		c.waiting = c.waiting[1:]
		b.sent = true
		c.gathered.Add(-int32(len(b.calls)))
		if b.here == 0 {
			b.cancel()
			continue
		}
		c.inFlight++
		sent = append(sent, b)
	}
	if len(c.waiting) == 0 && c.timer != nil {
		c.timer.Stop()
		c.timer = nil
	}
	round := c.round
	c.mu.Unlock()
	for _, b := range sent {
		c.core.run(func() { c.run(b, round) })
	}
}

// run sends a batch and wakes its callers.
func (c *coalescer[A, R]) run(b *batch[A, R], round int) {
	defer c.release(round)
	defer c.regather(len(b.calls))
	defer close(b.done)
	defer b.cancel()

	calls := make([]*call[A, R], 0, len(b.calls))
	args := make([]A, 0, len(b.calls))
	c.mu.Lock()
	c.limit, _ = c.core.places()
	for _, call := range b.calls {
		if !call.left {
			calls = append(calls, call)
			args = append(args, call.arg)
		}
	}
	c.mu.Unlock()

	if len(calls) > 1 {
		results, err := c.many(b.ctx, args)
		if err == nil || !causedByData(err) {
			for i, call := range calls {
				if call.err = err; err == nil {
					call.result = results[i]
				}
			}
			return
		}
		// One caller's bad value must not fail the others'.
	}
	for _, call := range calls {
		call.result, call.err = c.one(b.ctx, call.arg)
	}
}

// regather lets the n callers that were just woken call again, so that the next batch
// is as large as the last: until three in four have, or it is clear that they will not,
// or the processors have other things to do.
func (c *coalescer[A, R]) regather(n int) {
	start := time.Now()
	for range maxYields {
		if 4*int(c.gathered.Load()) >= 3*n || time.Since(start) > maxYielding {
			return
		}
		runtime.Gosched()
	}
}

// watch looks, until no batch waits, for statements in flight of which none has
// ended since the last look, ended being the count then: they wait for a lock or a
// slow server, and give up their places so that the rest moves on.
func (c *coalescer[A, R]) watch(ended int) {
	c.timer = time.AfterFunc(slowAfter/2, func() {
		c.mu.Lock()
		if c.timer == nil {
			c.mu.Unlock()
			return
		}
		c.watch(c.ended)
		if _, slow := c.core.places(); ended == c.ended && c.slow+c.inFlight <= slow {
			c.slow += c.inFlight
			c.inFlight = 0
			c.round++
		}
		c.send()
	})
}
