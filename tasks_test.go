package fastpgcache

import (
	"errors"
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

func TestStepsThatGoOnHaveTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		slow := func() error { time.Sleep(closeTimeout - time.Second); return nil }
		if err := inTime("slow", slow, slow, slow); err != nil || time.Since(began) != 3*(closeTimeout-time.Second) {
			t.Errorf("got %v after %v, want no error of steps that each end in time", err, time.Since(began))
		}

		began = time.Now()
		last := make(chan time.Duration, 1)
		failed := errors.New("failed")
		err := inTime("too slow", func() error { return failed }, slow, func() error { time.Sleep(time.Minute); return nil },
			func() error { last <- time.Since(began); return nil })
		if !errors.Is(err, failed) || !strings.Contains(err.Error(), "too slow within 5s") || time.Since(began) != 2*closeTimeout-time.Second {
			t.Errorf("got %v after %v, want both errors as soon as the third step has taken %v", err, time.Since(began), closeTimeout)
		}
		if got, want := <-last, time.Minute+closeTimeout-time.Second; got != want {
			t.Errorf("the last step came after %v, want it after the others, at %v", got, want)
		}
	})
}
