package conformance

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

// startCrowd has callers use c until the test ends, each on keys of its own that
// begin with "crowd/", so that the test's own calls are merged with theirs. They
// come in bursts, between which the server has time for the test.
func startCrowd(t *testing.T, c *fastpgcache.Cache, callers int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for caller := range callers {
		wg.Go(func() {
			key := fmt.Sprintf("crowd/%d", caller)
			for i := 0; ; i++ {
				select {
				case <-ctx.Done():
					return
				case <-time.After(untilBurst()):
				}
				err := oneOfCrowd(ctx, c, key, i)
				if err != nil && ctx.Err() == nil && !errors.Is(err, fastpgcache.ErrClosed) {
					t.Errorf("crowd: %s: %v", key, err)
					return
				}
			}
		})
	}
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
}

// untilBurst is the time until one of the next bursts.
func untilBurst() time.Duration {
	const every, ahead = 10 * time.Millisecond, 20
	now := time.Now()
	return now.Truncate(every).Add(time.Duration(1+rand.IntN(ahead)) * every).Sub(now)
}

// oneOfCrowd does the i-th operation of a caller, which alone uses key.
func oneOfCrowd(ctx context.Context, c *fastpgcache.Cache, key string, i int) (err error) {
	want := fmt.Sprint(key, " ", i/4)
	found := true
	got := want
	switch i % 4 {
	case 0:
		err = c.Set(ctx, key, want, fastpgcache.NoExpiry)
	case 1:
		found, err = c.Get(ctx, key, &got)
	case 2:
		found, err = c.Exists(ctx, key)
	case 3:
		found, err = c.Delete(ctx, key)
	}
	if err == nil && (!found || got != want) {
		err = fmt.Errorf("operation %d: got %q, %t, want %q", i, got, found, want)
	}
	return err
}
