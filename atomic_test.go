package fastpgcache

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// expired puts an entry under key that has just expired.
func expired(t *testing.T, c *Cache, key string, value any) {
	t.Helper()
	if err := c.Set(t.Context(), key, value, time.Millisecond); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the entry expires", func() bool {
		found, err := c.Exists(t.Context(), key)
		return err == nil && !found
	})
}

// inTx runs f on c inside a transaction, and commits or rolls back.
func inTx(t *testing.T, c *Cache, commit bool, f func(*Cache)) {
	t.Helper()
	tx, err := c.DB().BeginTx(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	f(c.WithTx(tx))
	if commit {
		if err := tx.Commit(); err != nil {
			t.Error(err)
		}
	}
}

func TestAddSucceedsForOneOfAThousandCallers(t *testing.T) {
	t.Parallel()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	c.DB().SetMaxOpenConns(20)
	expired(t, c, "expired", []byte{0xff})
	for _, key := range []string{"new", "expired"} {
		var added atomic.Int64
		var winner atomic.Value
		var wg sync.WaitGroup
		for i := range 1000 {
			wg.Go(func() {
				value := fmt.Sprint("caller ", i)
				ok, err := c.Add(t.Context(), key, value, time.Minute)
				if err != nil {
					t.Error(err)
				}
				if ok {
					added.Add(1)
					winner.Store(value)
				}
			})
		}
		wg.Wait()
		if added.Load() != 1 {
			t.Fatalf("%s: %d callers added, want 1", key, added.Load())
		}
		wantEntry(t, c, key, winner.Load().(string))
		if ttl, found, err := c.TTL(t.Context(), key); err != nil || !found || ttl > time.Minute || ttl < 40*time.Second {
			t.Errorf("%s: ttl %v, %t, %v", key, ttl, found, err)
		}
	}
}

func TestAddLeavesAnEntryAlone(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	for key, ttl := range map[string]time.Duration{"stays": NoExpiry, "expires": time.Hour} {
		if err := c.Set(ctx, key, "first", ttl); err != nil {
			t.Fatal(err)
		}
		if added, err := c.Add(ctx, key, "second", time.Minute); err != nil || added {
			t.Errorf("%s: got %t, %v", key, added, err)
		}
		wantEntry(t, c, key, "first")
		if got, _, err := c.TTL(ctx, key); err != nil || got != NoExpiry && got < 50*time.Minute {
			t.Errorf("%s: ttl %v, %v", key, got, err)
		}
	}
	for _, value := range []any{[]byte{0, 0xff}, ""} {
		key := fmt.Sprintf("%q", value)
		if added, err := c.Add(ctx, key, value, 0); err != nil || !added {
			t.Errorf("%s: got %t, %v", key, added, err)
		}
		want, _ := encode(value)
		wantEntry(t, c, key, want.value().String())
	}
}

func TestIncrementSetsTTLOnlyWhenItCreates(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	expired(t, c, "expired", "no number")
	expired(t, c, "binary", []byte{0xff})
	for _, key := range []string{"new", "expired", "binary"} {
		for i, ttl := range []time.Duration{time.Hour, time.Minute, NoExpiry} {
			if got, err := c.Increment(ctx, key, 5, ttl); err != nil || got != int64(5*(i+1)) {
				t.Errorf("%s: got %d, %v, want %d", key, got, err, 5*(i+1))
			}
			if got, _, err := c.TTL(ctx, key); err != nil || got > time.Hour || got < 50*time.Minute {
				t.Errorf("%s: ttl %v, %v, want an hour", key, got, err)
			}
		}
	}
	if err := c.Set(ctx, "stays", 1, NoExpiry); err != nil {
		t.Fatal(err)
	}
	if got, err := c.Increment(ctx, "stays", -3, time.Minute); err != nil || got != -2 {
		t.Errorf("got %d, %v, want -2", got, err)
	}
	if ttl, _, err := c.TTL(ctx, "stays"); err != nil || ttl != NoExpiry {
		t.Errorf("ttl %v, %v, want NoExpiry", ttl, err)
	}
	var n int
	if found, err := c.Get(ctx, "stays", &n); err != nil || !found || n != -2 {
		t.Errorf("got %d, %t, %v", n, found, err)
	}
}

func TestIncrementTakesWhatRedisTakesAndChangesNothingElse(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	numbers := []struct {
		value any
		delta int64
		want  int64
	}{
		{"0", 1, 1}, {"5", -5, 0}, {"-5", 3, -2}, {7, 0, 7}, {[]byte("12"), 1, 13},
		{int64(math.MaxInt64), 0, math.MaxInt64}, {int64(math.MaxInt64), math.MinInt64, -1},
		{int64(math.MinInt64), math.MaxInt64, -1}, {int64(math.MaxInt64 - 1), 1, math.MaxInt64},
		{int64(math.MinInt64 + 1), -1, math.MinInt64},
	}
	others := []struct {
		value any
		delta int64
	}{
		{"", 1}, {"+5", 1}, {" 5", 1}, {"5 ", 1}, {"5\n", 1}, {"05", 1}, {"-0", 1}, {"00", 1}, {"-", 1}, {"5.0", 1},
		{"1e3", 1}, {"0x5", 1}, {"NaN", 1}, {"Infinity", 1}, {"٥", 1}, {"five", 1}, {"1_000", 1}, {"5\n6", 1}, {"null", 1},
		{"9223372036854775808", -1}, {"-9223372036854775809", 1}, {"12345678901234567890", -1}, {"9999999999999999999", -1},
		{[]byte{'5', 0}, 1}, {[]byte{0xff}, 1}, {map[string]int{"n": 1}, 1},
		{int64(math.MaxInt64), 1}, {int64(math.MinInt64), -1}, {1, math.MaxInt64}, {-1, math.MinInt64},
	}
	inTx(t, c, true, func(c *Cache) {
		for i, test := range numbers {
			key := fmt.Sprint("n", i)
			if err := c.Set(ctx, key, test.value, 0); err != nil {
				t.Fatal(err)
			}
			if got, err := c.Increment(ctx, key, test.delta, 0); err != nil || got != test.want {
				t.Errorf("%v + %d: got %d, %v, want %d", test.value, test.delta, got, err, test.want)
			}
		}
		for i, test := range others {
			key := fmt.Sprint("o", i)
			if err := c.Set(ctx, key, test.value, 0); err != nil {
				t.Fatal(err)
			}
			if got, err := c.Increment(ctx, key, test.delta, time.Minute); !errors.Is(err, ErrNotInteger) || got != 0 {
				t.Errorf("%q + %d: got %d, %v, want ErrNotInteger", test.value, test.delta, got, err)
			}
			want, _ := encode(test.value)
			wantEntry(t, c, key, want.value().String())
			if ttl, _, err := c.TTL(ctx, key); err != nil || ttl != NoExpiry {
				t.Errorf("%q: ttl %v, %v", test.value, ttl, err)
			}
		}
	})
	wantEntry(t, c, "n0", "1") // the transaction lived
}

func TestTakeHandsAValueToOneCaller(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	c.DB().SetMaxOpenConns(20)
	for round := range 5 {
		want := Value{byte(round), 0xff, 0}
		if err := c.Set(ctx, "k", want, 0); err != nil {
			t.Fatal(err)
		}
		var takers atomic.Int64
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				got, found, err := c.Take(ctx, "k")
				if err != nil || found && got.String() != want.String() || !found && got != nil {
					t.Errorf("got %q, %t, %v", got, found, err)
				}
				if found {
					takers.Add(1)
				}
			})
		}
		wg.Wait()
		if takers.Load() != 1 {
			t.Errorf("%d callers took it, want 1", takers.Load())
		}
		wantNoEntry(t, c, "k")
	}
	expired(t, c, "old", "x")
	if got, found, err := c.Take(ctx, "old"); err != nil || found {
		t.Errorf("an expired entry: got %q, %t, %v", got, found, err)
	}
	if err := c.Set(ctx, "empty", "", 0); err != nil {
		t.Fatal(err)
	}
	if got, found, err := c.Take(ctx, "empty"); err != nil || !found || got == nil || len(got) != 0 {
		t.Errorf("an empty value: got %#v, %t, %v", got, found, err)
	}
}

// A queue of one place: every value that Add put there is taken once, and is the
// one that was there last.
func TestTakeReturnsTheLatestValue(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	if err := c.Set(ctx, "k", "first", 0); err != nil {
		t.Fatal(err)
	}
	tx, err := c.DB().Begin()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.WithTx(tx).Set(ctx, "k", "latest", 0); err != nil {
		t.Fatal(err)
	}
	taken := make(chan Value)
	go func() {
		v, _, err := c.Take(ctx, "k")
		if err != nil {
			t.Error(err)
		}
		taken <- v
	}()
	eventuallyBlocked(t, c.DB())
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	if got := <-taken; got.String() != "latest" {
		t.Errorf("got %q, want %q", got, "latest")
	}
}

// eventuallyBlocked waits until a statement waits for a lock.
func eventuallyBlocked(t *testing.T, db *sql.DB) {
	t.Helper()
	eventually(t, "a statement waits for a lock", func() bool {
		var n int
		if err := db.QueryRow(`SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n > 0
	})
}

func TestAtomicOperationsInATransaction(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	for _, commit := range []bool{false, true} {
		if err := c.Set(ctx, "taken", "x", 0); err != nil {
			t.Fatal(err)
		}
		inTx(t, c, commit, func(tx *Cache) {
			if added, err := tx.Add(ctx, "added", "x", 0); err != nil || !added {
				t.Errorf("add: %t, %v", added, err)
			}
			if n, err := tx.Increment(ctx, "n", 2, 0); err != nil || n != 2 {
				t.Errorf("increment: %d, %v", n, err)
			}
			if v, found, err := tx.Take(ctx, "taken"); err != nil || !found || v.String() != "x" {
				t.Errorf("take: %q, %t, %v", v, found, err)
			}
			// Bad input does not poison the transaction.
			if _, err := tx.Add(ctx, "", 1, 0); !errors.Is(err, ErrInvalidKey) {
				t.Error(err)
			}
			if _, err := tx.Increment(ctx, "n", 1, -7); !errors.Is(err, ErrInvalidTTL) {
				t.Error(err)
			}
			if _, err := tx.Add(ctx, "k", func() {}, 0); err == nil {
				t.Error("a func was stored")
			}
			if _, _, err := tx.Take(ctx, "\xff"); !errors.Is(err, ErrInvalidKey) {
				t.Error(err)
			}
			wantEntry(t, tx, "n", "2")
			wantNoEntry(t, c, "n")
			wantEntry(t, c, "taken", "x")
		})
		if commit {
			wantEntry(t, c, "added", "x")
			wantEntry(t, c, "n", "2")
			wantNoEntry(t, c, "taken")
		} else {
			wantNoEntry(t, c, "added")
			wantNoEntry(t, c, "n")
			wantEntry(t, c, "taken", "x")
		}
	}
}

// A role confined to its own entries cannot reach another's, whatever the operation.
func TestOperationsAreConfinedToTheirUser(t *testing.T) {
	ctx := t.Context()
	dsn, admin := setUp(t)
	mine := openCache(t, dsn, Config{})
	theirs := openCache(t, admin, Config{User: "them"}) // the owner may
	forbidden := openCache(t, dsn, Config{User: "them", OnError: func(error) {}})
	for _, key := range []string{"a", "b"} {
		if err := errors.Join(mine.Set(ctx, key, "1", 0), theirs.Set(ctx, key, "2", 0)); err != nil {
			t.Fatal(err)
		}
	}
	_, err1 := forbidden.Add(ctx, "c", 1, 0)
	_, err2 := forbidden.Increment(ctx, "a", 1, 0)
	for _, err := range []error{err1, err2} {
		if !errors.Is(err, ErrNotPermitted) {
			t.Errorf("got %v, want ErrNotPermitted", err)
		}
	}
	if _, found, err := forbidden.Take(ctx, "a"); err != nil || found {
		t.Errorf("take: %t, %v", found, err)
	}
	if n, err := forbidden.Clear(ctx); err != nil || n != 0 {
		t.Errorf("clear: %d, %v", n, err)
	}
	for key, err := range forbidden.Keys(ctx, "") {
		t.Errorf("keys: %q, %v", key, err)
	}
	var got string
	if err := forbidden.GetOrSet(ctx, "a", &got, 0, returns("3")); err != nil || got != "3" {
		t.Errorf("get or set: %q, %v", got, err) // not stored, but loaded
	}
	if n, err := mine.Clear(ctx); err != nil || n != 2 {
		t.Errorf("clear: %d, %v, want 2", n, err)
	}
	wantEntry(t, theirs, "a", "2")
	wantEntry(t, theirs, "b", "2")
	if n, err := theirs.Clear(context.WithoutCancel(ctx)); err != nil || n != 2 {
		t.Errorf("clear: %d, %v, want 2", n, err)
	}
}
