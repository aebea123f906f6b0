package goroutines

import (
	"context"
	"strings"
	"testing"
	"time"
)

func TestOfCountsThoseOfOneNameAndTheirChildren(t *testing.T) {
	stop := make(chan struct{})
	waitHere := func() { <-stop }
	for range 3 {
		Do(t.Context(), t.Name(), func(context.Context) {
			go func() {
				go waitHere()
				<-stop
			}()
		})
	}
	Do(t.Context(), "another", func(context.Context) { go waitHere() })
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		n, stacks := Of(t.Name())
		if n == 6 && strings.Contains(stacks, "TestOfCounts") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("got %d, want 6:\n%s", n, stacks)
		}
	}
	close(stop)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		n, stacks := Of(t.Name())
		if n == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("got %d, want none:\n%s", n, stacks)
		}
	}
	Do(t.Context(), t.Name(), func(context.Context) {
		if n, stacks := Of(t.Name()); n != 0 {
			t.Errorf("the caller counts itself: %d\n%s", n, stacks)
		}
	})
}
