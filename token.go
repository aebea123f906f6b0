package fastpgcache

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// A TokenProvider returns a password for a new connection: a short-lived token, usually. Token is called for every
// physical connection, by many goroutines at once, and its error reaches whoever needed the connection.
//
// A provider may also have a method Invalidate(rejected string), as [TokenCache] has. [Connector] calls it with a token
// that the server turned down, before it asks for another.
type TokenProvider interface {
	Token(ctx context.Context) (string, error)
}

// A TokenFunc is a [TokenProvider] that keeps nothing: every new connection calls it.
type TokenFunc func(context.Context) (string, error)

// Token calls f.
func (f TokenFunc) Token(ctx context.Context) (string, error) { return f(ctx) }

// A Token is a password with an end.
type Token struct {
	Value  string
	Expiry time.Time // The zero time means that the token lasts until the server rejects it.
}

const (
	fetchTimeout    = time.Minute            // a fetch that takes longer has failed
	firstFetchDelay = 500 * time.Millisecond // after a failed fetch; doubles with every further one
	maxFetchDelay   = 10 * time.Second
)

// A TokenCache is a [TokenProvider] that keeps one token and fetches the next in time. It is safe for concurrent use.
// It runs no goroutine but for a fetch, so there is nothing to stop, and an idle program fetches nothing.
//
// Time is the wall clock, which goes on while a laptop sleeps.
type TokenCache struct {
	fetch func(context.Context) (Token, error)
	now   func() time.Time // the wall clock; tests have their own

	// mu guards what follows.
	mu        sync.Mutex
	token     Token     // the one held; the zero Token if none is
	fetchedAt time.Time // when it came
	inFlight  *tokenFetch
	failures  int // fetches that failed since one succeeded
	failedAt  time.Time
	lastErr   error
}

// A tokenFetch is one call of fetch, which any number of callers wait for.
type tokenFetch struct {
	done  chan struct{} // closed when value and err are set
	value string
	err   error
}

var _ TokenProvider = (*TokenCache)(nil)

// NewTokenCache returns a TokenCache that calls fetch whenever it needs a token, never twice at a time. It does no I/O.
//
// The ctx of fetch is no caller's own, so that a caller who gives up fails nobody else; it ends after one minute. A fetch
// that has not returned by then, or that panics, counts as failed.
func NewTokenCache(fetch func(context.Context) (Token, error)) *TokenCache {
	return &TokenCache{
		fetch: fetch,
		now:   func() time.Time { return time.Now().Round(0) }, // without the monotonic reading, which stops in sleep
	}
}

// Token returns the token held. If half of its life is over, that also starts a fetch of the next one in the background.
// Without a valid token Token waits for a fetch, shared by all who wait, until ctx ends.
//
// After a failed fetch there is none for half a second, and for longer the more fail, up to ten seconds. The token held
// serves until it expires; thereafter, and until the next fetch, Token returns the last one's error.
func (c *TokenCache) Token(ctx context.Context) (string, error) {
	c.mu.Lock()
	now := c.now()
	valid := c.token.Value != "" && (c.token.Expiry.IsZero() || now.Before(c.token.Expiry))
	if valid {
		if c.ageing(now) && c.inFlight == nil && !c.backingOff(now) {
			c.startFetch()
		}
		value := c.token.Value
		c.mu.Unlock()
		return value, nil
	}
	if c.inFlight == nil && c.backingOff(now) {
		err := c.lastErr
		c.mu.Unlock()
		return "", prefixed("get token", err)
	}
	return c.waitAndUnlock(ctx)
}

// Refresh fetches a token even if the one held is good, or waits for the fetch in flight if there is one. The token held
// remains in use if that fails.
func (c *TokenCache) Refresh(ctx context.Context) (string, error) {
	c.mu.Lock()
	return c.waitAndUnlock(ctx)
}

// Invalidate drops the token held if it is the rejected one, so that the next call of Token fetches. Of many callers whose
// logins failed with one token only the first drops it.
func (c *TokenCache) Invalidate(rejected string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.token.Value == rejected {
		c.token = Token{}
	}
}

// ageing tells whether half of the token's life is over, or the clock was set back since it came, so that nobody knows.
// c.mu is held.
func (c *TokenCache) ageing(now time.Time) bool {
	if c.token.Expiry.IsZero() {
		return false
	}
	age := now.Sub(c.fetchedAt)
	return age < 0 || age >= c.token.Expiry.Sub(c.fetchedAt)/2
}

// backingOff tells whether a fetch failed so recently that there should be no other yet. c.mu is held.
func (c *TokenCache) backingOff(now time.Time) bool {
	if c.failures == 0 {
		return false
	}
	delay := min(firstFetchDelay<<min(c.failures-1, 10), maxFetchDelay)
	since := now.Sub(c.failedAt)
	return since >= 0 && since < delay // below zero the clock was set back
}

// waitAndUnlock waits for the fetch in flight, which it starts if there is none. c.mu is held, and released.
func (c *TokenCache) waitAndUnlock(ctx context.Context) (string, error) {
	if c.inFlight == nil {
		c.startFetch()
	}
	f := c.inFlight
	c.mu.Unlock()
	select {
	case <-f.done:
	case <-ctx.Done():
		return "", prefixed("get token", ctx.Err())
	}
	if f.err != nil {
		return "", prefixed("get token", f.err)
	}
	return f.value, nil
}

// startFetch calls c.fetch in the background. c.mu is held.
func (c *TokenCache) startFetch() {
	f := &tokenFetch{done: make(chan struct{})}
	c.inFlight = f
	ctx, cancel := context.WithTimeout(context.Background(), fetchTimeout)
	// A fetch that ignores its ctx is given up, or nobody would ever get a token again.
	stop := context.AfterFunc(ctx, func() {
		c.endFetch(f, Token{}, fmt.Errorf("no token came within %v", fetchTimeout))
	})
	go func() {
		defer cancel()
		var token Token
		err := errors.New("the token's fetch ended its goroutine") // unless it returns
		defer func() {
			if p := recover(); p != nil {
				err = fmt.Errorf("the token's fetch panicked: %v", p)
			}
			stop()
			c.endFetch(f, token, err)
		}()
		token, err = c.fetch(ctx)
		if err == nil && token.Value == "" {
			err = errors.New("the token's fetch returned an empty one")
		}
	}()
}

// endFetch takes the outcome of f, unless f was given up.
func (c *TokenCache) endFetch(f *tokenFetch, token Token, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.inFlight != f {
		return
	}
	c.inFlight = nil
	if err != nil {
		c.failures++
		c.failedAt, c.lastErr = c.now(), err
	} else {
		c.failures, c.lastErr = 0, nil
		c.token, c.fetchedAt = token, c.now()
	}
	// Who waited gets the token even if it seems to have expired: it is this machine's clock that may be wrong.
	f.value, f.err = token.Value, err
	close(f.done)
}
