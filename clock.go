package fastpgcache

import (
	"sync"
	"sync/atomic"
	"time"
)

// instant is what both clocks of the machine showed, in nanoseconds: the monotonic one
// stands still while the machine sleeps, the wall clock can be set back.
type instant struct{ monotonic, wall int64 }

// A clock reads both clocks. The wall clock would cost a third of a hit, and is read only
// every wallEvery: before a machine sleeps it stops its programs, then its devices, and
// wakes them in turn, while the monotonic clock still runs, or again. That takes longer.
type clock struct {
	monotonic func() int64
	both      func() instant

	mu     sync.Mutex   // held by whoever reads both for all
	readAt atomic.Int64 // when that was last, by the monotonic clock
	ahead  atomic.Int64 // by how much the wall clock was ahead of it then
}

const wallEvery = int64(100 * time.Microsecond)

func newClock() *clock {
	start := time.Now()
	return &clock{
		monotonic: func() int64 { return int64(time.Since(start)) },
		both: func() instant {
			now := time.Now()
			return instant{int64(now.Sub(start)), now.UnixNano()}
		},
	}
}

func (c *clock) now() instant {
	now, readAt := c.monotonic(), c.readAt.Load()
	if readAt != 0 && now-readAt < wallEvery {
		return instant{now, now + c.ahead.Load()}
	}
	if !c.mu.TryLock() {
		return c.both()
	}
	defer c.mu.Unlock()
	at := c.both()
	c.ahead.Store(at.wall - at.monotonic)
	c.readAt.Store(at.monotonic) // at last: whoever sees it sees ahead, too
	return at
}

// since is how much time went by since i, by the clock that says more.
func (now instant) since(i instant) time.Duration {
	return time.Duration(max(now.monotonic-i.monotonic, now.wall-i.wall))
}
