package fastpgcache

import (
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/DATA-DOG/go-sqlmock"
)

func TestBackgroundCleanupKeepsItsIntervalUntilClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const interval = time.Minute
		start := time.Now()
		var mu sync.Mutex
		var turns []time.Time // guarded by mu
		count := func() int {
			mu.Lock()
			defer mu.Unlock()
			return len(turns)
		}
		db, mock, err := sqlmock.New(sqlmock.QueryMatcherOption(sqlmock.QueryMatcherFunc(func(_, sql string) error {
			mu.Lock()
			defer mu.Unlock()
			turns = append(turns, time.Now())
			return nil
		})))
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		failure := errors.New("down")
		const n = 50
		for i := range n {
			query := mock.ExpectQuery("").WithArgs("", interval.Microseconds())
			if i == 5 {
				query.WillReturnError(failure)
			} else {
				query.WillReturnRows(sqlmock.NewRows([]string{"removed", "evicted", "next_position"}).AddRow(1, 0, nil))
			}
		}
		mock.ExpectClose()
		var reported []error
		c, err := New(db, Config{
			CleanupInterval: interval, DisablePrepare: true,
			OnError: func(err error) { reported = append(reported, err) },
		})
		if err != nil {
			t.Fatal(err)
		}
		for count() < n {
			time.Sleep(time.Second)
		}
		synctest.Wait()
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		if count() != n {
			t.Errorf("got %d turns, want %d and none after Close", count(), n)
		}
		if first := turns[0].Sub(start); first >= interval {
			t.Errorf("the first turn came after %v", first)
		}
		pauses := map[time.Duration]bool{}
		for i := range turns[1:] {
			pause := turns[i+1].Sub(turns[i])
			pauses[pause] = true
			if pause < interval || pause > interval*9/8 {
				t.Errorf("a pause of %v", pause)
			}
		}
		if len(pauses) < n/2 {
			t.Errorf("only %d different pauses: no jitter", len(pauses))
		}
		if len(reported) != 1 || !errors.Is(reported[0], failure) {
			t.Errorf("reported: %v, want %v", reported, failure)
		}
	})
}

func TestBackgroundCleanupIsOneProcessAtATime(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	one, other := openCache(t, dsn, Config{}), openCache(t, dsn, Config{})
	owner := openCache(t, dsn, Config{}) // of the entries
	hour := time.Hour.Microseconds()

	expired(t, owner, "a", 1)
	if n, err := one.cleanup(ctx, hour); err != nil || n != 1 {
		t.Errorf("got %d, %v, want 1", n, err)
	}
	expired(t, owner, "b", 1)
	if n, err := other.cleanup(ctx, hour); err != nil || n != 0 || !other.Stats().LastCleanup.IsZero() {
		t.Errorf("within the hour: got %d, %v, want nothing done", n, err)
	}
	if n, err := other.cleanup(ctx, int64(1)); err != nil || n != 1 {
		t.Errorf("after a microsecond: got %d, %v, want 1", n, err)
	}

	// Cleanup itself asks nobody.
	expired(t, owner, "c", 1)
	if n, err := one.Cleanup(ctx); err != nil || n != 1 {
		t.Errorf("got %d, %v, want 1", n, err)
	}

	// In the middle of another's bite.
	tx, err := owner.DB().Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec(`SELECT cache_walk('', '1 microsecond')`); err != nil {
		t.Fatal(err)
	}
	expired(t, owner, "d", 1)
	if n, err := one.cleanup(ctx, int64(1)); err != nil || n != 0 {
		t.Errorf("while another is at it: got %d, %v, want nothing done", n, err)
	}
}

func TestBackgroundCleanupRemovesExpiredEntries(t *testing.T) {
	dsn, admin := setUp(t)
	for range 3 {
		openCache(t, dsn, Config{CleanupInterval: 20 * time.Millisecond})
	}
	c := openCache(t, dsn, Config{})
	fillKeys(t, c, "%s", 1000)
	execAdmin(t, admin, `UPDATE cache SET expires_at = statement_timestamp() WHERE key < '0000900'`)
	db := openDB(t, admin)
	eventually(t, "only live entries are left", func() bool {
		var n int
		if err := db.QueryRow(`SELECT count(*) FROM cache`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n == 101
	})
	time.Sleep(50 * time.Millisecond)
	if got := len(keysOf(t, c, "")); got != 101 {
		t.Errorf("got %d keys, want the 101 that live", got)
	}
}
