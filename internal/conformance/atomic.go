package conformance

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

var atomicTests = []test{
	{name: "OfManyAddsOneSucceeds", run: testAddOnce},
	{name: "IncrementLosesNoCount", run: testIncrement},
	{name: "IncrementChangesNothingThatIsNoInteger", run: testNotInteger},
	{name: "OfManyTakesOneGetsTheValue", run: testTakeOnce},
	{name: "KeysWalksInOrderOverAnyCharacters", run: testKeys},
	{name: "KeysReadsPageAfterPage", run: testKeysPages, lone: true},
	{name: "ClearRemovesTheUsersEntriesAlone", run: testClear, lone: true},
	{name: "SetManyIsAllOrNothing", run: testSetMany},
	{name: "CleanupInTheBackgroundEndsWithClose", run: testBackgroundCleanup, lone: true},
}

// atOnce runs f for many callers and waits for them.
func atOnce(f func(caller int)) {
	var wg sync.WaitGroup
	for caller := range 50 {
		wg.Go(func() { f(caller) })
	}
	wg.Wait()
}

func testAddOnce(s *suite, t *testing.T) {
	c := s.cache(t)
	ctx := bounded(t)
	for _, lies := range []string{"nothing", "an expired entry"} {
		if lies != "nothing" {
			s.expire(t, c, "k")
		}
		var winner atomic.Int64
		atOnce(func(caller int) {
			added, err := c.Add(ctx, "k", caller, time.Hour)
			if err != nil {
				t.Error(err)
			}
			if added && !winner.CompareAndSwap(0, int64(caller)+1) {
				t.Errorf("over %s: two callers added it", lies)
			}
		})
		wantHit(t, c, "k", fmt.Sprint(winner.Load()-1))
		wantTTL(t, c, "k", time.Hour)
	}
}

func testIncrement(s *suite, t *testing.T) {
	c := s.cache(t)
	ctx := bounded(t)
	mustSet(t, c, "n", 77, time.Hour)
	s.expire(t, c, "n")
	atOnce(func(int) {
		for range 4 {
			if _, err := c.Increment(ctx, "n", 1, time.Minute); err != nil {
				t.Error(err)
			}
		}
	})
	wantHit(t, c, "n", "200")
	if n, err := c.Increment(ctx, "n", -300, time.Hour); n != -100 || err != nil {
		t.Errorf("got %d, %v, want -100", n, err)
	}
	wantTTL(t, c, "n", time.Minute) // which the first one set
}

func testNotInteger(s *suite, t *testing.T) {
	c := s.cache(t)
	tx, in := begin(t, c)
	for _, value := range []string{"", "1.5", " 1", "+1", "01", "-0", "9223372036854775808", "9223372036854775807", "\xff"} {
		mustSet(t, in, "n", value, 0)
		_, err := in.Increment(bounded(t), "n", 1, time.Minute)
		wantError(t, "increment", err, fastpgcache.ErrNotInteger)
		wantHit(t, in, "n", value) // and the transaction lives
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
}

func testTakeOnce(s *suite, t *testing.T) {
	c := s.cache(t)
	ctx := bounded(t)
	for _, value := range [][]byte{[]byte("text"), {}, {0, 0xff}} {
		mustSet(t, c, "k", value, time.Hour)
		var takers atomic.Int64
		atOnce(func(int) {
			v, found, err := c.Take(ctx, "k")
			if err != nil {
				t.Error(err)
			}
			if found {
				takers.Add(1)
				if !bytes.Equal(v, value) {
					t.Errorf("got %q, want %q", v, value)
				}
			}
		})
		if takers.Load() != 1 {
			t.Errorf("%d callers took it, want 1", takers.Load())
		}
	}
}

// walk is the keys with a prefix.
func walk(t *testing.T, c *fastpgcache.Cache, prefix string) (keys []string) {
	t.Helper()
	for key, err := range c.Keys(bounded(t), prefix) {
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, key)
	}
	return keys
}

func testKeys(s *suite, t *testing.T) {
	c := s.cache(t)
	all := []string{"p", "p%", "p%a", "p%\x7f", "p*", "p\\", "p\\_", "p_", "p_a", "pa", "p\U0010ffff", "p\U0010ffffz", "é", "q"}
	for _, key := range all {
		mustSet(t, c, key, "v", time.Hour)
	}
	mustSet(t, c, "p expired", "v", time.Hour)
	s.expire(t, c, "p expired")
	slices.Sort(all)
	for _, prefix := range []string{"p", "p%", "p_", "p\\", "p\U0010ffff", "é", "none"} {
		want := slices.DeleteFunc(slices.Clone(all), func(key string) bool { return !strings.HasPrefix(key, prefix) })
		if got := walk(t, c, prefix); !slices.Equal(got, want) {
			t.Errorf("%q: got %q, want %q", prefix, got, want)
		}
	}
	for key, err := range c.Keys(bounded(t), "p") {
		if key != "p" || err != nil {
			t.Errorf("got %q, %v", key, err)
		}
		break
	}
	for _, err := range c.Keys(bounded(t), "\x00") {
		wantError(t, "keys", err, fastpgcache.ErrInvalidKey)
	}
}

func testKeysPages(s *suite, t *testing.T) {
	const n = 5001 // a page and one
	c := s.cache(t)
	items := make(map[string]any, n)
	for i := range n {
		items[fmt.Sprintf("%05d", i)] = i
	}
	if err := c.SetMany(bounded(t), items, time.Hour); err != nil {
		t.Fatal(err)
	}
	c.DB().SetMaxOpenConns(1)
	i := 0
	for key, err := range c.Keys(bounded(t), "") {
		if err != nil || key != fmt.Sprintf("%05d", i) {
			t.Fatalf("got %q, %v, want %05d", key, err, i)
		}
		if i++; i%1000 == 0 { // the loop may use the cache
			wantHit(t, c, key, strconv.Itoa(i-1))
		}
	}
	if i != n {
		t.Errorf("got %d keys, want %d", i, n)
	}
}

func testClear(s *suite, t *testing.T) {
	c, other := s.cache(t), s.cache(t)
	mustSet(t, other, "theirs", "v", 0)
	items := map[string]any{"binary": []byte{0}}
	for i := range 2500 {
		items[fmt.Sprint(i)] = i
	}
	if err := c.SetMany(bounded(t), items, 0); err != nil {
		t.Fatal(err)
	}
	s.expire(t, c, "0")
	if n, err := c.Clear(bounded(t)); n != 2500 || err != nil {
		t.Errorf("got %d, %v, want 2500: an expired entry does not count", n, err)
	}
	if keys := walk(t, c, ""); keys != nil || s.rows(t, c, "0") != 0 {
		t.Errorf("left: %q", keys)
	}
	wantHit(t, other, "theirs", "v")
}

func testSetMany(s *suite, t *testing.T) {
	c := s.cache(t)
	// More than a statement holds, of every kind, one of which changes its kind.
	items := make(map[string]any)
	for i := range 1001 {
		items[fmt.Sprint("many/", i)] = []any{i, "text", []byte{0xff, byte(i)}, []byte{}, `"\,{}NULL`}[i%5]
	}
	mustSet(t, c, "many/0", []byte{0}, time.Hour)
	for range 2 {
		if err := c.SetMany(bounded(t), items, time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	keys := walk(t, c, "many/")
	values, err := c.GetMany(bounded(t), append(keys, "none", keys[0]))
	if err != nil || len(values) != len(items) {
		t.Fatalf("got %d values, %v, want %d", len(values), err, len(items))
	}
	for key, item := range items {
		want := fmt.Sprint(item)
		if b, ok := item.([]byte); ok {
			want = string(b)
		}
		if got := values[key].String(); got != want {
			t.Errorf("%s: got %q, want %q", key, got, want)
		}
	}
	wantTTL(t, c, "many/0", time.Hour)

	wantForm(t, "set many", c.SetMany(bounded(t), map[string]any{"many/0": "new", "many/z": func() {}}, 0))
	wantHit(t, c, "many/0", "0")

	tx, in := begin(t, c)
	items["many/0"] = "uncommitted"
	if err := in.SetMany(bounded(t), items, 0); err != nil {
		t.Fatal(err)
	}
	wantHit(t, in, "many/0", "uncommitted")
	wantHit(t, c, "many/0", "0")
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	if n, err := c.DeleteMany(bounded(t), append(keys, "none", keys[0])); n != len(items) || err != nil {
		t.Errorf("got %d, %v, want %d deleted", n, err, len(items))
	}
}

func testBackgroundCleanup(s *suite, t *testing.T) {
	c := s.cache(t)
	mustSet(t, c, "k", "v", time.Hour)
	s.expire(t, c, "k")
	cleaner := s.open(t, s.dsn, func(cfg *fastpgcache.Config) { cfg.CleanupInterval = 20 * time.Millisecond })
	await(t, "another user's expired entry is removed", func() bool { return s.rows(t, c, "k") == 0 })
	await(t, "that is noted", func() bool { return !cleaner.Stats().LastCleanup.IsZero() })
	if err := cleaner.Close(); err != nil {
		t.Error(err)
	}
	await(t, "the server's end of the last statement", func() (none bool) {
		err := s.admin.QueryRow(`SELECT count(*) = 0 FROM pg_stat_activity
			WHERE datname = current_database() AND state = 'active' AND query LIKE '%cache_walk(%' AND pid <> pg_backend_pid()`).Scan(&none)
		if err != nil {
			t.Fatal(err)
		}
		return none
	})
	mustSet(t, c, "k", "v", time.Hour)
	s.expire(t, c, "k")
	time.Sleep(100 * time.Millisecond)
	if s.rows(t, c, "k") != 1 {
		t.Error("it went on after Close")
	}
}
