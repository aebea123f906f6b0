package fastpgcache

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// clocked is places with a clock that moves by hand.
type clocked struct {
	places
	now time.Time
}

// spend lets statements that take took end one after another, for so long.
func (c *clocked) spend(long, took time.Duration) {
	for end := c.now.Add(long); c.now.Before(end); {
		c.now = c.now.Add(took)
		c.done(c.now, took)
	}
}

// most is how many statements may be in flight, of up to 100.
func (c *clocked) most(waiting int) int {
	for n := range 100 {
		if !c.free(n, waiting) {
			return n
		}
	}
	return 100
}

func checkMost(t *testing.T, when string, c *clocked, waiting, want int) {
	t.Helper()
	if got := c.most(waiting); got != want {
		t.Errorf("%s, %d calls wait: %d places, want %d", when, waiting, got, want)
	}
}

const (
	near = 100 * time.Microsecond
	far  = 7 * time.Millisecond
)

func TestFewPlacesUntilAStatementHasEnded(t *testing.T) {
	c := &clocked{now: time.Now()}
	checkMost(t, "at first", c, 1, 2)
	checkMost(t, "at first", c, crowd, 3)
	c.done(c.now, far)
	checkMost(t, "after one", c, 1, 100)
}

func TestPlacesFollowTheServer(t *testing.T) {
	for _, tt := range []struct {
		name    string
		shortly time.Duration // one statement's time at the idle server
		took    time.Duration // then all the others'
		waiting int
		want    int
	}{
		{"far and idle", far, far, 1, 100},
		{"near and idle", near, near, 1, 2},
		{"near and idle, before a crowd", near, near, 128, 7},
		{"far, a tenth of the time at the server", far, far * 10 / 9, 1, 9},
		{"the same before a crowd", far, far * 10 / 9, 128, 28},
		{"near, two thirds of the time at the server", near, 3 * near, 1, 2},
		{"the same before a crowd", near, 3 * near, 128, 3},
		{"far, and slow", far, 10 * far, 1, 2},
		{"far, and slow, before a crowd", far, 10 * far, 128, 3},
	} {
		c := &clocked{now: time.Now()}
		c.spend(tt.shortly, tt.shortly)
		c.spend(8*tt.took, tt.took)
		checkMost(t, tt.name, c, tt.waiting, tt.want)
	}
}

func TestOneLargeStatementIsNoBusyServer(t *testing.T) {
	c := &clocked{now: time.Now()}
	c.spend(8*far, far)
	c.spend(10*far, 10*far)
	checkMost(t, "after one large statement", c, 1, 100)
	c.spend(70*far, 10*far)
	checkMost(t, "after eight", c, 1, 2)
}

func TestAServerThatBecomesSlowGetsFewStatements(t *testing.T) {
	c := &clocked{now: time.Now()}
	c.spend(time.Minute, far)
	c.spend(8*10*far, 10*far)
	checkMost(t, "slow", c, 1, 2)
	c.spend(far, far)
	checkMost(t, "fast again", c, 1, 100)
}

func TestTheShortestStatementIsForgotten(t *testing.T) {
	c := &clocked{now: time.Now()}
	c.spend(time.Minute, near)
	c.spend(time.Second, far)
	checkMost(t, "a second after the server went far", c, 1, 2)
	c.spend(2*baseWindow, far)
	checkMost(t, "two windows after that", c, 1, 100)
}

func TestAFailoverToANearerServerIsSeenAtOnce(t *testing.T) {
	c := &clocked{now: time.Now()}
	c.spend(time.Minute, far)
	checkMost(t, "far", c, 1, 100)
	c.spend(near, near)
	checkMost(t, "after one statement", c, 1, 2)
}

func TestAMachineThatWakesKnowsNothing(t *testing.T) {
	c := &clocked{now: time.Now()}
	c.spend(time.Minute, near)
	c.now = c.now.Add(8 * time.Hour)
	c.done(c.now, 8*time.Hour) // the statement that it fell asleep over
	c.spend(8*far, far)
	checkMost(t, "awake, and the server is far", c, 1, 100)
}

// distant is a server of two processors behind a network, in a bubble's time.
type distant struct {
	roundTrip func() time.Duration
	statement time.Duration // of a processor, and
	call      time.Duration // for each call of it

	mu         sync.Mutex
	busy       [2]time.Time // until when each processor is
	statements int
	calls      int
}

func (d *distant) run(ctx context.Context, args []string) ([]string, error) {
	roundTrip := d.roundTrip()
	time.Sleep(roundTrip / 2)
	d.mu.Lock()
	next := &d.busy[0]
	if d.busy[1].Before(*next) {
		next = &d.busy[1]
	}
	if now := time.Now(); next.Before(now) {
		*next = now
	}
	*next = next.Add(d.statement + d.call*time.Duration(len(args)))
	ended := *next
	d.statements++
	d.calls += len(args)
	d.mu.Unlock()
	time.Sleep(time.Until(ended) + roundTrip/2)
	return args, nil
}

// callers lets n callers call for so long, and returns how often they did and the
// time that 99 of 100 calls took at most.
func (d *distant) callers(c *coalescer[string, string], n int, long time.Duration) (calls int, p99 time.Duration) {
	var mu sync.Mutex
	var took []time.Duration
	var wg sync.WaitGroup
	end := time.Now().Add(long)
	for i := range n {
		wg.Go(func() {
			time.Sleep(time.Duration(i) * long / time.Duration(100*n)) // not all at once
			for time.Now().Before(end) {
				began := time.Now()
				c.do(context.Background(), fmt.Sprint(i))
				mu.Lock()
				took = append(took, time.Since(began))
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	slices.Sort(took)
	return len(took), took[len(took)*99/100]
}

// at runs f with a coalescer over d with a pool of conns connections.
func (d *distant) at(t *testing.T, conns int, f func(c *coalescer[string, string])) {
	synctest.Test(t, func(t *testing.T) {
		m := merger{t.Context(), func(f func()) { go f() }, poolOf(conns), func(error) bool { return false }}
		f(newCoalescer(m, func(ctx context.Context, arg string) (string, error) {
			_, err := d.run(ctx, []string{arg})
			return arg, err
		}, d.run, func(arg string) int { return len(arg) }))
	})
}

func TestBehindANetworkACallWaitsForNoOther(t *testing.T) {
	for _, roundTrip := range []time.Duration{time.Millisecond, far} {
		for _, callers := range []int{4, 8, 16, 64} {
			d := &distant{
				roundTrip: func() time.Duration { return roundTrip },
				statement: 25 * time.Microsecond, call: 4 * time.Microsecond,
			}
			d.at(t, 16, func(c *coalescer[string, string]) {
				long := 200 * roundTrip
				calls, p99 := d.callers(c, callers, long)
				alone := roundTrip + d.statement + d.call
				of := float64(calls) / (float64(callers) * float64(long) / float64(alone))
				least, most := 0.95, 1.25
				if callers > 16 { // more than there are connections
					least, most = 0.8, 2
				}
				if of < least || float64(p99) > most*float64(alone) {
					t.Errorf("%v away, %d callers: %.2f of the calls that a connection for each would make, 99 of 100 within %.2f of the time; want %.2f and %.2f",
						roundTrip, callers, of, float64(p99)/float64(alone), least, most)
				}
			})
		}
	}
}

// With one connection or two for many callers, nobody may wait for two statements: that
// would be half of the calls. Which callers a batch takes along is the scheduler's to say,
// and the race detector's is another.
func TestBehindANetworkASmallPoolTakesAllCallersAlong(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector schedules otherwise")
	}
	const least = 0.9
	for _, conns := range []int{2, 4} {
		d := &distant{
			roundTrip: func() time.Duration { return far },
			statement: 25 * time.Microsecond, call: 4 * time.Microsecond,
		}
		d.at(t, conns, func(c *coalescer[string, string]) {
			const callers, long = 16, 200 * far
			calls, _ := d.callers(c, callers, long)
			if of := float64(calls) / float64(callers*long/far); of < least {
				t.Errorf("a pool of %d: %.2f of the calls that a connection for each would make, want %v", conns, of, least)
			}
		})
	}
}

func TestBesideABusyServerStatementsAreLarge(t *testing.T) {
	d := &distant{
		roundTrip: func() time.Duration { return 60 * time.Microsecond },
		statement: 25 * time.Microsecond, call: 4 * time.Microsecond,
	}
	d.at(t, 16, func(c *coalescer[string, string]) {
		d.callers(c, 64, 100*time.Millisecond)
		if mean := d.calls / d.statements; mean < 15 {
			t.Errorf("%d calls a statement, want 15 or more", mean)
		}
	})
}

func TestAServerFoundFartherIsFilledAgain(t *testing.T) {
	began := time.Time{}
	d := &distant{
		roundTrip: func() time.Duration {
			if time.Since(began) < time.Second {
				return near
			}
			return far
		},
		statement: 25 * time.Microsecond, call: 4 * time.Microsecond,
	}
	d.at(t, 16, func(c *coalescer[string, string]) {
		began = time.Now()
		d.callers(c, 8, 1*time.Second+2*baseWindow)
		calls, _ := d.callers(c, 8, time.Second)
		if most := int(8 * time.Second / far); calls < most*9/10 {
			t.Errorf("%d calls in the second after two windows, want about %d", calls, most)
		}
	})
}

func TestALargeStatementNeedsNoPlaceOfOthers(t *testing.T) {
	d := &distant{roundTrip: func() time.Duration { return far }}
	d.at(t, 16, func(c *coalescer[string, string]) {
		d.callers(c, 1, 100*time.Millisecond)
		began := time.Now()
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() { c.do(context.Background(), strings.Repeat("x", maxCallBytes+1)) })
		}
		wg.Wait()
		if took := time.Since(began); took > far {
			t.Errorf("four large calls took %v, want %v", took, far)
		}
	})
}
