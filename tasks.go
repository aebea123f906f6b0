package fastpgcache

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// closeTimeout bounds how long Close waits for background work, and for each step after it.
const closeTimeout = 5 * time.Second

// tasks is work that outlives the call that started it, until Close.
type tasks struct {
	ctx  context.Context // ends with Close
	stop context.CancelFunc

	mu      sync.Mutex // guards closed against running.Add
	closed  atomic.Bool
	running sync.WaitGroup
}

func newTasks() *tasks {
	t := &tasks{}
	t.ctx, t.stop = context.WithCancel(context.Background())
	return t
}

// run runs f on a goroutine that close waits for. Once closed, it runs f at once: then
// ctx has ended, and every statement fails.
func (t *tasks) run(f func()) {
	t.mu.Lock()
	if t.closed.Load() {
		t.mu.Unlock()
		f()
		return
	}
	t.running.Add(1)
	t.mu.Unlock()
	go func() {
		defer t.running.Done()
		f()
	}()
}

// ended reports whether close was called.
func (t *tasks) ended() bool { return t.closed.Load() }

// close ends ctx. It reports false where it was called before.
func (t *tasks) close() (first bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	first = !t.closed.Swap(true)
	t.stop()
	return first
}

// wait waits until all work has ended, for closeTimeout at most.
func (t *tasks) wait() error {
	return inTime("background work, such as a load, goes on: it did not end", func() error {
		t.running.Wait()
		return nil
	})
}

// inTime takes steps, one after the other, and waits for each, for closeTimeout at most;
// then it goes on alone, and the error says what is the matter.
func inTime(what string, steps ...func() error) (err error) {
	ended := make(chan error, len(steps))
	go func() {
		for _, step := range steps {
			ended <- step()
		}
	}()
	timer := time.NewTimer(closeTimeout)
	defer timer.Stop()
	for range steps {
		timer.Reset(closeTimeout)
		select {
		case failed := <-ended:
			err = errors.Join(err, failed)
		case <-timer.C:
			return errors.Join(err, errors.New(what+" within "+closeTimeout.String()))
		}
	}
	return err
}
