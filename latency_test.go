package fastpgcache

import (
	"context"
	"testing"
	"time"
)

func TestEachLatencyIsCountedUnderItsBound(t *testing.T) {
	var l Latency
	last := len(l.Counts) - 1
	for i := range l.Counts {
		lowest := time.Duration(0)
		if i > 0 {
			lowest = l.Bound(i-1) + 1
		}
		highest := l.Bound(i)
		if i == last {
			highest = time.Hour
		}
		if got := bucket(lowest); got != i {
			t.Errorf("%v is counted in %d, want %d", lowest, got, i)
		}
		if got := bucket(highest); got != i {
			t.Errorf("%v is counted in %d, want %d", highest, got, i)
		}
	}
	if got, want := l.Bound(last-1), 2048*time.Millisecond; got != want {
		t.Errorf("the last bound is %v, want %v", got, want)
	}
}

func TestEveryStatementHasALatency(t *testing.T) {
	ctx := t.Context()
	dsn, admin := setUp(t)
	c := openCache(t, dsn, Config{DisableCoalescing: true})
	if err := c.Set(ctx, "k", 1, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Get(ctx, "k", nil); err != nil {
		t.Fatal(err)
	}
	tx, err := openDB(t, admin).Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec(`SELECT FROM cache FOR UPDATE`); err != nil {
		t.Fatal(err)
	}
	brief, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if err := c.Set(brief, "k", 2, 0); err == nil { // a failure counts, too
		t.Fatal("a locked row was written")
	}
	eventually(t, "each statement's latency", func() bool {
		s, n := c.Stats(), int64(0)
		for _, count := range s.Latency.Counts {
			n += count
		}
		return n == s.Statements && n == 3
	})
	if sum := c.Stats().Latency.Sum; sum < 200*time.Millisecond || sum > 20*time.Second {
		t.Errorf("in all %v, want a little more than 200 ms", sum)
	}
}

func BenchmarkLatency(b *testing.B) {
	var h histogram
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			h.add(time.Now())
		}
	})
}
