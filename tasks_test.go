package fastpgcache

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestCloseWaitsForBackgroundWorkButNotForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		work := newTasks()
		began, end := time.Now(), make(chan struct{})
		work.run(func() { time.Sleep(time.Second) })
		if !work.close() || work.close() {
			t.Error("only the first close is the first")
		}
		if err := work.wait(); err != nil || time.Since(began) != time.Second {
			t.Errorf("got %v after %v, want nil after 1 s", err, time.Since(began))
		}

		stubborn := newTasks()
		stubborn.run(func() { <-end })
		began = time.Now()
		stubborn.close()
		if err := stubborn.wait(); err == nil || !strings.Contains(err.Error(), "5s") || time.Since(began) != closeTimeout {
			t.Errorf("got %v after %v, want an error after %v", err, time.Since(began), closeTimeout)
		}
		ran := false
		stubborn.run(func() { ran = stubborn.ctx.Err() != nil })
		if !ran {
			t.Error("after close, f did not run at once with its ctx ended")
		}
		close(end)
	})
}
