package fastpgcache

import (
	"context"
	"fmt"
	"math"
	"sync/atomic"
	"testing"
	"time"
)

func TestRefreshesWaitLongerAfterEachFailure(t *testing.T) {
	for failures := 1; failures <= 64; failures++ {
		least := min(100*time.Millisecond<<min(failures-1, 9), time.Minute)
		if got := refreshPause(failures); got < least || got > min(2*least, time.Minute) {
			t.Errorf("after %d failures: got %v, want %v to %v", failures, got, least, 2*least)
		}
	}
	var asked []int
	rs := refreshes{pause: func(failures int) time.Duration {
		asked = append(asked, failures)
		return 0
	}}
	for _, how := range []ending{failed, failed, busy, failed, failed, done, failed} {
		if !rs.begin("k") {
			t.Fatal("a try is refused after its pause")
		}
		if rs.begin("k") {
			t.Fatal("two refreshes of one key")
		}
		rs.end("k", how)
	}
	if want := "[1 2 0 1 2 1]"; fmt.Sprint(asked) != want {
		t.Errorf("got pauses after %v failures, want %v", asked, want)
	}
	rs.pause = func(int) time.Duration { return time.Hour }
	rs.begin("k")
	rs.end("k", failed)
	if rs.begin("k") {
		t.Error("no pause after a failure")
	}
	if !rs.begin("other") {
		t.Error("one key waits for another")
	}
}

func TestRefreshesThatFailTakeBoundedMemory(t *testing.T) {
	rs := refreshes{pause: func(int) time.Duration { return time.Hour }}
	for i := range maxRefreshes + 1000 {
		rs.begin(fmt.Sprint("running", i%100, i))
		rs.begin(fmt.Sprint(i))
		rs.end(fmt.Sprint(i), failed)
		rs.end(fmt.Sprint("running", i%100, i), done)
	}
	if got := len(rs.byKey); got > maxRefreshes {
		t.Errorf("got %d, want at most %d", got, maxRefreshes)
	}
}

// A kept value past its freshness starts the refresh, and one that another process has
// refreshed already is not loaded again.
func TestGetOrRefreshOfAKeptValueRefreshesIt(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{MaxStaleness: time.Hour})
	other := openCache(t, dsn, Config{})
	var loads atomic.Int64
	load := func(context.Context) (any, error) { return fmt.Sprint("new ", loads.Add(1)), nil }
	ask := func() (got string) {
		if err := c.GetOrRefresh(ctx, "k", &got, time.Minute, time.Hour, load); err != nil {
			t.Error(err)
		}
		return got
	}
	keep := func() {
		eventually(t, "the value is kept", func() bool {
			before := c.Stats().Local.Hits
			ask()
			return c.Stats().Local.Hits > before
		})
	}
	if got := ask(); got != "new 1" {
		t.Errorf("got %q", got)
	}
	keep()
	if err := c.Set(ctx, "k", "old", time.Minute); err != nil {
		t.Fatal(err)
	}
	if got := ask(); got != "old" {
		t.Errorf("got %q, want what is there, at once", got)
	}
	eventually(t, "the refresh", func() bool { return ask() == "new 2" })

	keep()
	if err := c.Set(ctx, "k", "old", time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := other.Set(ctx, "k", "of another process", time.Hour); err != nil {
		t.Fatal(err)
	}
	if got := ask(); got != "old" && got != "of another process" {
		t.Errorf("got %q", got)
	}
	eventually(t, "what was loaded by the other process", func() bool { return ask() == "of another process" })
	if got := loads.Load(); got != 2 {
		t.Errorf("got %d loads, want 2: another had refreshed it", got)
	}
}

// Merged calls ask for the latest end that any of them wants to know of.
func TestMergedCallsLearnOfEveryEndThatOneAskedFor(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	for _, key := range []string{"a", "b", "c"} {
		check(t, c.Set(ctx, key, "v", time.Hour))
	}
	minute, day := time.Minute.Microseconds(), (24 * time.Hour).Microseconds()
	for _, tt := range []struct {
		late [3]int64
		want bool
	}{{[3]int64{minute, day, minute}, true}, {[3]int64{day, minute, minute}, true}, {[3]int64{minute, minute, minute}, false}} {
		got, err := c.getBatchAged(ctx, []aging{{"a", tt.late[0]}, {"b", tt.late[1]}, {"c", tt.late[2]}})
		check(t, err)
		for i, hit := range got {
			if told := !math.IsInf(hit.expires, 1); !hit.found || told != tt.want || told && (hit.expires < 3500 || hit.expires > 3600) {
				t.Errorf("%v, %d: got %t, %v s left; want it told: %t", tt.late, i, hit.found, hit.expires, tt.want)
			}
		}
	}
	for _, left := range []any{1.5, "1.5", []byte("1.5")} { // as drivers give it
		if got, err := until(left); err != nil || got != 1.5 {
			t.Errorf("%T: got %v, %v", left, got, err)
		}
	}
	if _, err := until("soon"); err == nil {
		t.Error("got no error for what is no number")
	}
}
