package fastpgcache

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// encodings tells of each time that it is encoded.
type encodings struct{ tell func() }

func (e encodings) MarshalJSON() ([]byte, error) {
	e.tell()
	return []byte("1"), nil
}

// hugeItems are more than SetMany encodes once: those of small are encoded again
// when they are sent.
func hugeItems(small int, tell func()) map[string]any {
	items := make(map[string]any)
	for i := range maxHeldBytes/chunkBytes + 1 {
		items[fmt.Sprint("large ", i)] = strings.Repeat("x", chunkBytes)
	}
	for i := range small {
		items[fmt.Sprint("small ", i)] = encodings{tell}
	}
	return items
}

func TestSetManyEncodesAgainWhatItDoesNotHold(t *testing.T) {
	t.Parallel()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	var encoded atomic.Int64
	if err := c.SetMany(t.Context(), hugeItems(3, func() { encoded.Add(1) }), time.Hour); err != nil {
		t.Fatal(err)
	}
	if got := encoded.Load(); got != 6 {
		t.Errorf("encoded %d times, want twice each", got)
	}
	var rows int
	err := c.DB().QueryRow(`SELECT count(*) FROM cache WHERE octet_length(value) = $1 OR value = '1'`, chunkBytes).Scan(&rows)
	if want := maxHeldBytes/chunkBytes + 1 + 3; err != nil || rows != want {
		t.Errorf("got %d rows, %v, want %d", rows, err, want)
	}
}

// The map is the caller's again once SetMany has returned: the race detector sees.
func TestSetManyLeavesTheMapAloneOnceItHasReturned(t *testing.T) {
	t.Parallel()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	ctx, cancel := context.WithCancel(t.Context())
	var encoded atomic.Int64
	items := hugeItems(100, func() {
		if encoded.Add(1) == 101 {
			cancel()
			time.Sleep(50 * time.Millisecond) // there is more to encode
		}
	})
	if err := c.SetMany(ctx, items, time.Hour); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want Canceled", err)
	}
	clear(items)
	if n := len(keysOf(t, c, "")); n != 0 {
		t.Errorf("%d keys are stored, want none", n)
	}
}

func TestSetManyAfterCloseLeavesNothingPrepared(t *testing.T) {
	dsn, _ := setUp(t)
	owner := openCache(t, dsn, Config{})
	owner.db.SetMaxOpenConns(1)
	c, err := New(owner.db, Config{})
	check(t, err)
	check(t, c.Close())
	items := make(map[string]any)
	for i := range chunkKeys + 1 {
		items[fmt.Sprint(i)] = i
	}
	if err := c.SetMany(t.Context(), items, 0); !errors.Is(err, ErrClosed) {
		t.Errorf("got %v, want ErrClosed", err)
	}
	var n int
	check(t, owner.db.QueryRow(`SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%INSERT%'`).Scan(&n))
	if n != 0 {
		t.Errorf("%d statements are prepared", n)
	}
}

func TestATransactionRunsWhatIsPrepared(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	c.db.SetMaxOpenConns(1)
	if _, err := c.Get(ctx, "k", nil); err != nil {
		t.Fatal(err)
	}
	tx, err := c.db.BeginTx(ctx, nil)
	check(t, err)
	defer tx.Rollback()
	in := c.WithTx(tx)
	for range 3 {
		if _, err := in.Get(ctx, "k", nil); err != nil {
			t.Fatal(err)
		}
	}
	var runs int
	check(t, tx.QueryRow(`SELECT sum(generic_plans + custom_plans) FROM pg_prepared_statements WHERE statement LIKE '%value_bytes%'`).Scan(&runs))
	if runs != 4 {
		t.Errorf("the prepared statement ran %d times, want 4", runs)
	}
}

func TestEncodedEntriesCountWithWhatTheyTakeBesideTheirValues(t *testing.T) {
	keys := make([]string, chunkKeys)
	items := make(map[string]any)
	for i := range keys {
		keys[i] = fmt.Sprint(i)
		items[keys[i]] = ""
	}
	if _, bytes, err := encodeChunk(keys, items, noTTL); bytes < chunkKeys*entryBytes || err != nil {
		t.Errorf("got %d bytes, %v", bytes, err)
	}
}

// What concurrent writes have changed is deleted with the rest, not key by key.
func TestDeletingContendedKeysTakesFewStatements(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	writer, deleter := openCache(t, dsn, Config{}), openCache(t, dsn, Config{})
	items := make(map[string]any)
	for i := range 300 {
		items[fmt.Sprint("k", i)] = i
	}
	keys := slices.Sorted(maps.Keys(items))
	writing, stop := context.WithCancel(ctx)
	var writers sync.WaitGroup
	for range 4 {
		writers.Go(func() {
			for writing.Err() == nil {
				if err := writer.SetMany(writing, items, 0); err != nil && writing.Err() == nil {
					t.Error(err)
				}
			}
		})
	}
	const calls = 30
	before := deleter.Stats().Statements
	for range calls {
		if _, err := deleter.DeleteMany(ctx, keys); err != nil {
			t.Error(err)
		}
	}
	stop()
	writers.Wait()
	if each := float64(deleter.Stats().Statements-before) / calls; each > 3 {
		t.Errorf("%.1f statements a call", each)
	} else {
		t.Logf("%.1f statements a call", each)
	}
}
