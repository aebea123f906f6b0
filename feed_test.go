package fastpgcache

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// openFiltered returns a cache whose filter has been loaded.
func openFiltered(t testing.TB, dsn string, cfg Config) *Cache {
	t.Helper()
	c := openCache(t, dsn, cfg)
	loadFilter(t, c)
	return c
}

// loadFilter asks until a new filter answers.
func loadFilter(t testing.TB, c *Cache) {
	t.Helper()
	before := c.Stats()
	eventually(t, "a filter", func() bool {
		wantMiss(t, c, "no such key")
		now := c.Stats()
		return now.Local.FilterLoads > before.Local.FilterLoads && now.Local.Misses > before.Local.Misses
	})
}

func wantHit(t testing.TB, c *Cache, key string) {
	t.Helper()
	if found, err := c.Get(context.Background(), key, nil); !found || err != nil {
		t.Errorf("Get(%q): got %v, %v, want a hit", key, found, err)
	}
}

func wantMiss(t testing.TB, c *Cache, key string) {
	t.Helper()
	if found, err := c.Get(context.Background(), key, nil); found || err != nil {
		t.Errorf("Get(%q): got %v, %v, want a miss", key, found, err)
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// hour is a staleness at which nothing but the filter's own logic makes a key visible.
const hour = time.Hour

// outdate makes what is held as good as too old, as waiting for MaxStaleness does.
func outdate(c *Cache) {
	k := c.local.kept
	k.mu.Lock()
	defer k.mu.Unlock()
	if m := k.current.Load(); m != nil {
		old := *m
		old.at.monotonic -= int64(c.local.maxStaleness)
		old.at.wall -= int64(c.local.maxStaleness)
		k.current.Store(&old)
	}
}

// catchUp lets the cache catch up, or begin anew, until its filter answers.
func catchUp(t testing.TB, c *Cache) {
	t.Helper()
	eventually(t, "the goroutine's end", func() bool { return !c.feed.busy.Load() })
	before := c.Stats()
	outdate(c)
	eventually(t, "a catch-up", func() bool {
		wantMiss(t, c, "no such key")
		now := c.Stats()
		return now.Local.CatchUps > before.Local.CatchUps && now.Local.Misses > before.Local.Misses
	})
}

func TestAMissIsAnsweredWithoutTheDatabase(t *testing.T) {
	// Upstream's filter is empty, and thereby skipped, for ever.
	ctx := t.Context()
	dsn, _ := setUp(t)
	check(t, openCache(t, dsn, Config{}).SetMany(ctx, map[string]any{"there": 1, "gone": 1}, 0))
	c := openFiltered(t, dsn, Config{MaxStaleness: hour})
	wantHit(t, c, "there")
	before := c.Stats()
	wantMiss(t, c, "missing")
	if exists, err := c.Exists(ctx, "missing"); exists || err != nil {
		t.Error(exists, err)
	}
	if _, found, err := c.TTL(ctx, "missing"); found || err != nil {
		t.Error(found, err)
	}
	if values, err := c.GetMany(ctx, []string{"missing", "also missing"}); len(values) > 0 || err != nil {
		t.Error(values, err)
	}
	after := c.Stats()
	if got := after.Statements - before.Statements; got != 0 {
		t.Errorf("got %d statements, want none", got)
	}
	if got := after.FilterAnswers - before.FilterAnswers; got != 5 || after.Misses-before.Misses != 5 {
		t.Errorf("got %d answers and %d misses, want 5", got, after.Misses-before.Misses)
	}
	if after.Local.FilterKeys != 2 || after.Local.FilterBytes == 0 {
		t.Errorf("got %d keys in %d bytes, want 2 keys", after.Local.FilterKeys, after.Local.FilterBytes)
	}
	if values, err := c.GetMany(ctx, []string{"missing", "there", "there"}); len(values) != 1 || err != nil {
		t.Error(values, err)
	}
	check(t, c.Close())
	if _, err := c.Get(ctx, "missing", nil); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: got %v, want ErrClosed", err)
	}
}

func TestWithoutMaxStalenessNothingIsFiltered(t *testing.T) {
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	wantMiss(t, c, "missing")
	wantMiss(t, c, "missing")
	if got := c.Stats(); got.Misses != 2 || got.Statements != 2 || got.Local.Misses != 0 || got.Local != (LocalStats{}) {
		t.Errorf("got %+v, want 2 misses by 2 statements", got)
	}
}

func TestOwnWritesAreNeverMissed(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openFiltered(t, dsn, Config{MaxStaleness: hour})
	inTx := func(write func(*Cache) error) error {
		tx, err := c.db.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		defer tx.Rollback()
		if err := write(c.WithTx(tx)); err != nil {
			return err
		}
		return tx.Commit()
	}
	many := make(map[string]any)
	for i := range 2*chunkKeys + 1 {
		many[fmt.Sprint("many ", i)] = i
	}
	writes := map[string]func(key string) error{
		"Set":     func(key string) error { return c.Set(ctx, key, 1, 0) },
		"SetMany": func(key string) error { return c.SetMany(ctx, map[string]any{key: 1}, 0) },
		"SetMany in chunks": func(key string) error {
			many[key] = 1
			return c.SetMany(ctx, many, 0)
		},
		"Add": func(key string) error {
			_, err := c.Add(ctx, key, 1, 0)
			return err
		},
		"Increment": func(key string) error {
			_, err := c.Increment(ctx, key, 1, 0)
			return err
		},
		"GetOrSet": func(key string) error { return c.GetOrSet(ctx, key, nil, 0, returns(1)) },
		"Set in a transaction": func(key string) error {
			return inTx(func(c *Cache) error { return c.Set(ctx, key, 1, 0) })
		},
		"GetOrSet in a transaction": func(key string) error {
			return inTx(func(c *Cache) error { return c.GetOrSet(ctx, key, nil, 0, returns(1)) })
		},
	}
	for name, write := range writes {
		check(t, write(name))
		wantHit(t, c, name)
		if exists, err := c.Exists(ctx, name); !exists || err != nil {
			t.Errorf("%s: Exists: %v, %v", name, exists, err)
		}
		if _, found, err := c.TTL(ctx, name); !found || err != nil {
			t.Errorf("%s: TTL: %v, %v", name, found, err)
		}
		if values, err := c.GetMany(ctx, []string{name}); len(values) != 1 || err != nil {
			t.Errorf("%s: GetMany: %v, %v", name, values, err)
		}
	}
	for key := range many {
		wantHit(t, c, key)
	}
}

// Writes that are under way while a filter is loaded are in it when they have ended:
// in 100 loads, of which some are published between a commit and its return.
func TestOwnWritesDuringARebuildAreNeverMissed(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dsn, admin := setUp(t)
	c := openFiltered(t, dsn, Config{MaxStaleness: hour})
	stop := make(chan struct{})
	done := make(chan int, 3)
	for w := range 3 {
		go func() {
			i := 0
			defer func() { done <- i }()
			for ; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				key := fmt.Sprint(w, " ", i)
				if err := c.Set(ctx, key, 1, 0); err != nil {
					t.Error(err)
					return
				}
				if found, err := c.Get(ctx, key, nil); !found || err != nil {
					t.Errorf("%s: got %v, %v after Set", key, found, err)
					return
				}
				if _, err := c.Delete(ctx, key); err != nil {
					t.Error(err)
					return
				}
			}
		}()
	}
	db := openDB(t, admin)
	for range 100 {
		if _, err := db.Exec(`UPDATE cache_epoch SET id = gen_random_uuid()`); err != nil {
			t.Error(err)
			break
		}
		catchUp(t, c)
	}
	close(stop)
	t.Log(<-done+<-done+<-done, "writes", c.Stats().Local.FilterLoads, "rebuilds")
}

func TestInATransactionTheDatabaseIsAsked(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openFiltered(t, dsn, Config{MaxStaleness: hour})
	check(t, openCache(t, dsn, Config{}).Set(ctx, "other's", 1, 0))
	wantMiss(t, c, "other's")
	tx, err := c.db.BeginTx(ctx, nil)
	check(t, err)
	defer tx.Rollback()
	wantHit(t, c.WithTx(tx), "other's")
}

// Upstream's filter loses items at high load where its capacity is no power of two,
// is filled by duplicates, and loses other keys when one that it does not have is
// deleted.
func TestTheFilterGrowsAndLosesNothing(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openFiltered(t, dsn, Config{MaxStaleness: hour})
	other := openCache(t, dsn, Config{})
	const keys = 9000
	write := map[bool]*Cache{true: c, false: other}
	for from := 0; from < keys; from += 750 {
		items := make(map[string]any)
		for i := from; i < from+750; i++ {
			items[fmt.Sprint("k", i)] = i
		}
		check(t, write[from%1500 == 0].SetMany(ctx, items, 0))
		for range 20 {
			check(t, c.Set(ctx, "k0", "again", 0))
			_, err := c.Delete(ctx, "never there")
			check(t, err)
		}
		catchUp(t, c)
	}
	loadFilterAfter(t, c)
	var all []string
	for i := range keys {
		all = append(all, fmt.Sprint("k", i))
	}
	values, err := c.GetMany(ctx, all)
	if len(values) != keys || err != nil {
		t.Errorf("got %d keys, %v, want %d", len(values), err, keys)
	}
	s := c.Stats()
	// Keys with the same fingerprint and buckets are held once.
	if s.Local.FilterKeys < keys-keys/1000 || s.Local.FilterLoads < 2 || s.Local.FilterLoads > 12 || s.Local.FilterBytes > 4*keys {
		t.Errorf("got %d keys, %d bytes, after %d rebuilds", s.Local.FilterKeys, s.Local.FilterBytes, s.Local.FilterLoads)
	}
}

func TestAFilterOfDeletedKeysIsReplaced(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dsn, _ := setUp(t)
	other := openCache(t, dsn, Config{})
	items := make(map[string]any)
	var keys []string
	for i := range 1000 {
		keys = append(keys, fmt.Sprint("k", i))
		items[keys[i]] = i
	}
	check(t, other.SetMany(ctx, items, 0))
	c := openFiltered(t, dsn, Config{MaxStaleness: hour})
	_, err := other.DeleteMany(ctx, keys)
	check(t, err)
	eventually(t, "a new filter", func() bool {
		_, err := c.GetMany(ctx, keys)
		check(t, err)
		return c.Stats().Local.FilterLoads == 2 && c.Stats().Local.FilterKeys == 0
	})
	if s := c.Stats(); s.Local.FalsePositives < 256 {
		t.Errorf("got %+v", s)
	}

	// Entries that are expired, but there, make every filter as bad: that costs at
	// most a rebuild for each 256 lookups or more.
	check(t, other.SetMany(ctx, items, time.Millisecond))
	before := c.Stats()
	for range 20 {
		_, err := c.GetMany(ctx, keys)
		check(t, err)
		catchUp(t, c)
	}
	after := c.Stats()
	if got, most := after.Local.FilterLoads-before.Local.FilterLoads, (after.Local.FalsePositives-before.Local.FalsePositives)/256; got > most {
		t.Errorf("got %d rebuilds, want at most %d", got, most)
	}
}

func TestOneConnectionIsEnough(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dsn, _ := setUp(t)
	items := make(map[string]any)
	for i := range 3 * pageKeys {
		items[fmt.Sprint("k", i)] = i
	}
	check(t, openCache(t, dsn, Config{}).SetMany(ctx, items, 0))
	c := openCache(t, dsn, Config{MaxStaleness: time.Millisecond})
	c.db.SetMaxOpenConns(1)
	wantMiss(t, c, "missing")
	served := 0
	for c.Stats().Local.FilterLoads == 0 {
		wantHit(t, c, "k1")
		served++
	}
	if served < 2 {
		t.Errorf("got %d lookups served while the filter was loaded, want more", served)
	}
	for i := range 500 {
		wantMiss(t, c, "missing")
		if i%5 == 0 {
			check(t, c.Set(ctx, fmt.Sprint("own ", i), 1, 0))
			wantHit(t, c, fmt.Sprint("own ", i))
		}
	}
}

func TestAnIdleFilterDoesNothingAndCloseLeavesNothing(t *testing.T) {
	dsn, _ := setUp(t)
	db := openDB(t, dsn)
	db.SetMaxIdleConns(0) // their goroutines are the pool's
	check(t, db.Ping())
	before := runtime.NumGoroutine()
	c, err := New(db, Config{MaxStaleness: time.Millisecond})
	check(t, err)
	if s := c.Stats(); s.Statements != 0 {
		t.Errorf("New: got %d statements, want none", s.Statements)
	}
	wantMiss(t, c, "missing")
	eventually(t, "a filter", func() bool { return c.Stats().Local.FilterLoads == 1 })
	eventually(t, "no goroutine", func() bool { return runtime.NumGoroutine() <= before })
	idle := c.Stats()
	time.Sleep(30 * time.Millisecond)
	if got := c.Stats(); got.Statements != idle.Statements {
		t.Errorf("idle: got %+v, want %+v", got, idle)
	}
	for range 100 {
		outdate(c)
		wantMiss(t, c, "missing")
	}
	check(t, c.Close())
	eventually(t, "no goroutine", func() bool { return runtime.NumGoroutine() <= before })
}

func TestWithoutATableNothingRunsInTheBackground(t *testing.T) {
	ctx := t.Context()
	c := openCache(t, pgtest.Database(t), Config{MaxStaleness: hour})
	for range 50 {
		if _, err := c.Get(ctx, "k", nil); !errors.Is(err, ErrNotSetUp) {
			t.Fatalf("got %v, want ErrNotSetUp", err)
		}
	}
	if got := c.Stats().Statements; got > 50 {
		t.Errorf("got %d statements, want those of the lookups", got)
	}
	check(t, Setup(ctx, c.db, SetupConfig{}))
	loadFilterAfter(t, c)
}

func TestAFilterThatCannotBeLoadedIsReportedAndNotTriedAllTheTime(t *testing.T) {
	ctx := t.Context()
	dsn, admin := setUp(t)
	_, err := openDB(t, admin).Exec(`REVOKE ALL ON cache_epoch FROM PUBLIC`)
	check(t, err)
	reported := make(chan error, 1000)
	c := openCache(t, dsn, Config{MaxStaleness: hour, OnError: func(err error) { reported <- err }})
	for begin := time.Now(); time.Since(begin) < 250*time.Millisecond; {
		if _, err := c.Get(ctx, "k", nil); err != nil {
			t.Fatal(err)
		}
	}
	if got := len(reported); got < 1 || got > 3 {
		t.Errorf("got %d errors in 250 ms, want 1 to 3", got)
	}
	if err := <-reported; !errors.Is(err, ErrNotPermitted) || !strings.HasPrefix(err.Error(), "fastpgcache: catch up: ") {
		t.Errorf("got %v, want ErrNotPermitted", err)
	}
	_, err = openDB(t, admin).Exec(`GRANT SELECT, INSERT (user_id), UPDATE ON cache_epoch TO PUBLIC`)
	check(t, err)
	loadFilterAfter(t, c)
}

func TestAnAnswerOfTheFilterAllocatesNothing(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openFiltered(t, dsn, Config{MaxStaleness: hour})
	if got := testing.AllocsPerRun(1000, func() { c.Get(ctx, "missing", nil) }); got != 0 {
		t.Errorf("got %v allocations, want none", got)
	}
}

func TestALabelAndAnOddSchemaHaveAFilterOfTheirOwn(t *testing.T) {
	ctx := t.Context()
	admin := pgtest.Database(t)
	const schema = `it's "odd"`
	check(t, Setup(ctx, openDB(t, admin), SetupConfig{Schema: schema}))
	a := openFiltered(t, admin, Config{MaxStaleness: hour, Schema: schema, User: "a"})
	b := openCache(t, admin, Config{Schema: schema, User: "b"})
	check(t, b.Set(ctx, "b's", 1, 0))
	check(t, openCache(t, admin, Config{Schema: schema, User: "a"}).Set(ctx, "a's", 1, 0))
	catchUp(t, a)
	wantHit(t, a, "a's")
	if got := a.Stats().Local.FilterKeys; got != 1 {
		t.Errorf("got %d keys, want 1", got)
	}
}
