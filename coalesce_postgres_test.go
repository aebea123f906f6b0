package fastpgcache

import (
	"context"
	"database/sql"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// openSetUp returns a cache in a database of its own, and its DSN.
func openSetUp(t testing.TB, cfg Config) (*Cache, string) {
	t.Helper()
	dsn := pgtest.Database(t)
	c, err := Open(dsn, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := Setup(t.Context(), c.DB(), SetupConfig{}); err != nil {
		t.Fatal(err)
	}
	return c, dsn
}

func TestARowLockedByAStrangerHoldsUpNobodyElse(t *testing.T) {
	c, _ := openSetUp(t, Config{})
	ctx := t.Context()
	if err := c.Set(ctx, "locked", "v", 0); err != nil {
		t.Fatal(err)
	}
	tx, err := c.DB().Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec("SELECT FROM cache WHERE key = 'locked' FOR UPDATE"); err != nil {
		t.Fatal(err)
	}
	var stuck sync.WaitGroup
	for range 3 {
		stuck.Go(func() {
			if err := c.Set(ctx, "locked", "w", 0); err != nil {
				t.Error(err)
			}
		})
	}
	var others sync.WaitGroup
	for i := range 200 {
		others.Go(func() {
			for j := range 5 {
				// The first may share a statement with the stuck ones.
				ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
				err := c.Set(ctx, fmt.Sprint(i, j), "v", 0)
				cancel()
				if err != nil && j > 0 {
					t.Errorf("while a stranger holds another row: %v", err)
				}
			}
		})
	}
	go func() {
		time.Sleep(3 * time.Second)
		tx.Rollback()
	}()
	others.Wait()
	stuck.Wait()
	var v string
	if _, err := c.Get(ctx, "locked", &v); err != nil || v != "w" {
		t.Errorf("got %q, %v after the lock was gone", v, err)
	}
}

func TestAPoisonedEntryFailsAlone(t *testing.T) {
	c, _ := openSetUp(t, Config{})
	if _, err := c.DB().Exec("ALTER TABLE cache ADD CHECK (value <> 'poison')"); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			value := "fine"
			if i%50 == 7 {
				value = "poison"
			}
			for range 5 {
				err := c.Set(t.Context(), fmt.Sprint(i), value, 0)
				if (err != nil) != (value == "poison") {
					t.Errorf("set %s: %v", value, err)
				}
			}
		})
	}
	wg.Wait()
}

func TestConnectionsKilledInMidBatchLoseNothing(t *testing.T) {
	t.Parallel()
	c, dsn := openSetUp(t, Config{})
	killer, err := sql.Open("postgres", dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer killer.Close()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			key, last, unsure := fmt.Sprint(i), "", false
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				value := fmt.Sprint(n)
				if c.Set(t.Context(), key, value, 0) == nil {
					last, unsure = value, false
				} else {
					unsure = true // stored or not
				}
				var got string
				found, err := c.Get(t.Context(), key, &got)
				if err == nil && !unsure && (!found || got != last) {
					t.Errorf("key %s: found %v %q after %q was stored", key, found, got, last)
				}
			}
		})
	}
	for range 20 {
		time.Sleep(50 * time.Millisecond)
		if _, err := killer.Exec(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity
			WHERE datname = current_database() AND pid <> pg_backend_pid()`); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	wg.Wait()
	for try := 0; ; try++ { // a dead connection of the pool fails one call each
		if err := c.Set(t.Context(), "after", "v", 0); err == nil {
			break
		} else if try > 10 {
			t.Fatalf("still failing: %v", err)
		}
	}
}

func TestAPoolOfOneConnectionServesManyCallers(t *testing.T) {
	c, _ := openSetUp(t, Config{})
	c.DB().SetMaxOpenConns(1)
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			key := fmt.Sprint(i % 50)
			if err := c.Set(t.Context(), key, key, time.Minute); err != nil {
				t.Error(err)
			}
			var got string
			if found, err := c.Get(t.Context(), key, &got); err != nil || !found || got != key {
				t.Errorf("get %s: %v %q %v", key, found, got, err)
			}
			if _, err := c.Exists(t.Context(), key); err != nil {
				t.Error(err)
			}
			if _, err := c.Delete(t.Context(), key+"?"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestOfSeveralDeletesOfAKeyOneGetsTrue(t *testing.T) {
	c, _ := openSetUp(t, Config{})
	for round := range 20 {
		if err := c.Set(t.Context(), "k", "v", 0); err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		deleted := 0
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				ok, err := c.Delete(t.Context(), "k")
				if err != nil {
					t.Error(err)
				}
				if ok {
					mu.Lock()
					deleted++
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		if deleted != 1 {
			t.Fatalf("round %d: %d deletes got true, want 1", round, deleted)
		}
	}
}
