package fastpgcache_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

// In a synctest bubble an hour passes in no time, and the test fails if a goroutine is left at its end.

// An issuer is a fetch whose tokens are "1", "2", … and live for an hour.
type issuer struct {
	mu       sync.Mutex
	fetches  int
	inFlight int
	most     int // in flight at once
	err      error
	delay    time.Duration
}

func (i *issuer) fetch(ctx context.Context) (fastpgcache.Token, error) {
	i.mu.Lock()
	i.fetches++
	n, err, delay := i.fetches, i.err, i.delay
	i.inFlight++
	i.most = max(i.most, i.inFlight)
	i.mu.Unlock()
	select {
	case <-time.After(delay):
	case <-ctx.Done():
		err = ctx.Err()
	}
	i.mu.Lock()
	i.inFlight--
	i.mu.Unlock()
	if err != nil {
		return fastpgcache.Token{}, err
	}
	return fastpgcache.Token{Value: fmt.Sprint(n), Expiry: time.Now().Add(time.Hour)}, nil
}

func (i *issuer) set(err error, delay time.Duration) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.err, i.delay = err, delay
}

func wantToken(t *testing.T, c *fastpgcache.TokenCache, want string) {
	t.Helper()
	got, err := c.Token(t.Context())
	if err != nil || got != want {
		t.Fatalf("Token: got %q, %v, want %q", got, err, want)
	}
}

func wantTokenError(t *testing.T, c *fastpgcache.TokenCache, want error) {
	t.Helper()
	got, err := c.Token(t.Context())
	if got != "" || !errors.Is(err, want) {
		t.Fatalf("Token: got %q, %v, want error %v", got, err, want)
	}
}

func wantFetches(t *testing.T, i *issuer, want int) {
	t.Helper()
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.fetches != want {
		t.Fatalf("got %d fetches, want %d", i.fetches, want)
	}
	if i.most > 1 {
		t.Fatalf("got %d fetches at once, want 1", i.most)
	}
}

func TestTokenIsRenewedInTheBackgroundAfterHalfItsLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &issuer{delay: 5 * time.Second}
		c := fastpgcache.NewTokenCache(i.fetch)
		wantFetches(t, i, 0) // nothing happens before the first call
		wantToken(t, c, "1")
		time.Sleep(29 * time.Minute)
		wantToken(t, c, "1")
		synctest.Wait()
		wantFetches(t, i, 1)

		time.Sleep(2 * time.Minute)
		for range 10 {
			before := time.Now()
			wantToken(t, c, "1")
			if waited := time.Since(before); waited != 0 {
				t.Fatalf("Token waited %v for a renewal", waited)
			}
		}
		time.Sleep(6 * time.Second)
		wantToken(t, c, "2")
		wantFetches(t, i, 2)
	})
}

func TestIdleTokenCacheFetchesNothingAndStartsAfresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &issuer{}
		c := fastpgcache.NewTokenCache(i.fetch)
		wantToken(t, c, "1")
		time.Sleep(24 * time.Hour)
		wantFetches(t, i, 1)
		wantToken(t, c, "2")
	})
}

func TestBusyTokenCacheFetchesTwiceInATokensLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &issuer{delay: time.Second}
		c := fastpgcache.NewTokenCache(i.fetch)
		const lives = 48
		for range lives * 60 {
			if _, err := c.Token(t.Context()); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
		}
		if most := 22 * lives / 10; i.fetches > most {
			t.Errorf("got %d fetches in %d lifetimes, want at most %d", i.fetches, lives, most)
		}
	})
}

func TestCallersShareOneFetchAndLeaveItAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &issuer{delay: 10 * time.Second}
		c := fastpgcache.NewTokenCache(i.fetch)
		var wg sync.WaitGroup
		for n := range 100 {
			wg.Go(func() {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				patient := n%2 == 1 // the first caller, who started the fetch, leaves
				if !patient {
					time.AfterFunc(time.Second, cancel)
				}
				got, err := c.Token(ctx)
				if patient && (got != "1" || err != nil) {
					t.Errorf("got %q, %v, want 1", got, err)
				}
				if !patient && !errors.Is(err, context.Canceled) {
					t.Errorf("got %q, %v, want context.Canceled", got, err)
				}
			})
		}
		wg.Wait()
		wantFetches(t, i, 1)
	})
}

func TestTokenIsKeptWhenItsOnlyCallerGaveUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &issuer{delay: 10 * time.Second}
		c := fastpgcache.NewTokenCache(i.fetch)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := c.Token(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v, want context.DeadlineExceeded", err)
		}
		time.Sleep(10 * time.Second)
		wantToken(t, c, "1")
		wantFetches(t, i, 1)
	})
}

func TestFailedRenewalLeavesTheTokenUntilItExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &issuer{}
		c := fastpgcache.NewTokenCache(i.fetch)
		wantToken(t, c, "1")
		down := errors.New("down")
		i.set(down, 0)
		for range 59 * 60 {
			time.Sleep(time.Second)
			wantToken(t, c, "1")
		}
		synctest.Wait()
		if most := 29*60/10 + 10; i.fetches > most {
			t.Errorf("got %d fetches in 29 minutes of failure, want at most %d", i.fetches, most)
		}

		time.Sleep(time.Minute)
		wantTokenError(t, c, down)
		for range 10 * 60 { // down for longer than a token lives
			time.Sleep(10 * time.Second)
			wantTokenError(t, c, down)
		}
		before := i.fetches
		for range 10 {
			wantTokenError(t, c, down)
		}
		wantFetches(t, i, before) // fails fast, without another fetch

		i.set(nil, 0)
		time.Sleep(10 * time.Second) // the longest back-off
		if _, err := c.Token(t.Context()); err != nil {
			t.Errorf("after the outage: %v", err)
		}
	})
}

func TestRefreshForcesAFetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &issuer{}
		c := fastpgcache.NewTokenCache(i.fetch)
		wantToken(t, c, "1")
		if got, err := c.Refresh(t.Context()); got != "2" || err != nil {
			t.Fatalf("Refresh: got %q, %v, want 2", got, err)
		}
		wantToken(t, c, "2")
		down := errors.New("down")
		i.set(down, 0)
		for range 3 { // backs off for nobody
			if _, err := c.Refresh(t.Context()); !errors.Is(err, down) {
				t.Fatalf("Refresh: got %v, want %v", err, down)
			}
		}
		wantFetches(t, i, 5)
		wantToken(t, c, "2")
	})
}

func TestInvalidateDropsOnlyTheTokenHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &issuer{delay: time.Second}
		c := fastpgcache.NewTokenCache(i.fetch)
		wantToken(t, c, "1")
		c.Invalidate("another")
		wantToken(t, c, "1")
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				c.Invalidate("1")
				if got, err := c.Token(t.Context()); got != "2" || err != nil {
					t.Errorf("got %q, %v, want 2", got, err)
				}
				c.Invalidate("1") // late
			})
		}
		wg.Wait()
		wantFetches(t, i, 2)
	})
}

func TestFetchThatNeverReturnsIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var calls atomic.Int32
		release := make(chan struct{})
		c := fastpgcache.NewTokenCache(func(context.Context) (fastpgcache.Token, error) {
			if calls.Add(1) == 1 {
				<-release
				return fastpgcache.Token{Value: "late"}, nil
			}
			return fastpgcache.Token{Value: "good"}, nil
		})
		before := time.Now()
		if _, err := c.Token(t.Context()); err == nil || time.Since(before) != time.Minute {
			t.Fatalf("got %v after %v, want an error after a minute", err, time.Since(before))
		}
		time.Sleep(time.Second)
		wantToken(t, c, "good")
		close(release)
		synctest.Wait()
		wantToken(t, c, "good")
	})
}

func TestFetchThatReturnsNoTokenFails(t *testing.T) {
	cases := map[string]func(context.Context) (fastpgcache.Token, error){
		"panicked":  func(context.Context) (fastpgcache.Token, error) { panic("boom") },
		"goroutine": func(context.Context) (fastpgcache.Token, error) { runtime.Goexit(); panic("unreachable") },
		"empty":     func(context.Context) (fastpgcache.Token, error) { return fastpgcache.Token{}, nil },
		"down": func(context.Context) (fastpgcache.Token, error) {
			return fastpgcache.Token{Value: "x"}, errors.New("down")
		},
	}
	for want, fetch := range cases {
		synctest.Test(t, func(t *testing.T) {
			c := fastpgcache.NewTokenCache(fetch)
			for range 2 { // the second time in the back-off
				got, err := c.Token(t.Context())
				if got != "" || err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("got %q, %v, want an error with %q", got, err, want)
				}
				if n := strings.Count(fmt.Sprint(err), "fastpgcache: "); n != 1 {
					t.Errorf("%q has %d prefixes, want 1", err, n)
				}
			}
		})
	}
}

func TestTokenCacheSurvivesClockJumps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var offset atomic.Int64
		now := func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
		fetches := 0
		fetch := func(context.Context) (fastpgcache.Token, error) {
			fetches++
			if fetches == 2 {
				return fastpgcache.Token{}, errors.New("down")
			}
			return fastpgcache.Token{Value: fmt.Sprint(fetches), Expiry: now().Add(time.Hour)}, nil
		}
		c := fastpgcache.NewTokenCache(fetch)
		fastpgcache.SetClock(c, now)
		wantToken(t, c, "1")

		// Back: nobody knows how long the token still lives, and a back-off ends at once.
		offset.Add(int64(-24 * time.Hour))
		wantToken(t, c, "1")
		synctest.Wait() // fetch 2 fails
		offset.Add(int64(-24 * time.Hour))
		wantToken(t, c, "1")
		synctest.Wait()
		wantToken(t, c, "3")
		time.Sleep(29 * time.Minute)
		wantToken(t, c, "3")

		// Ahead, as after a laptop's sleep: no expired token is served.
		offset.Add(int64(72 * time.Hour))
		wantToken(t, c, "4")
	})
}

func TestTokenThatSeemsExpiredStillServesWhoWaited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fetches := 0
		c := fastpgcache.NewTokenCache(func(context.Context) (fastpgcache.Token, error) {
			fetches++ // this machine's clock is two hours ahead of the issuer's
			return fastpgcache.Token{Value: fmt.Sprint(fetches), Expiry: time.Now().Add(-time.Hour)}, nil
		})
		wantToken(t, c, "1")
		wantToken(t, c, "2")
	})
}

func TestTokenWithoutExpiryLastsUntilRejected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fetches := 0
		c := fastpgcache.NewTokenCache(func(context.Context) (fastpgcache.Token, error) {
			fetches++
			return fastpgcache.Token{Value: fmt.Sprint(fetches)}, nil
		})
		wantToken(t, c, "1")
		time.Sleep(1000 * time.Hour)
		wantToken(t, c, "1")
		c.Invalidate("1")
		wantToken(t, c, "2")
	})
}

func TestRootPackageDoesNotImportTheSDK(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", ".").Output()
	if err != nil {
		t.Skipf("go list: %v", err)
	}
	for pkg := range strings.Lines(string(out)) {
		if strings.Contains(pkg, "databricks") {
			t.Errorf("the root package imports %s", pkg)
		}
	}
}

func writeFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}
