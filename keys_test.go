package fastpgcache

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"
)

// keysOf walks to the end.
func keysOf(t *testing.T, c *Cache, prefix string) []string {
	t.Helper()
	var all []string
	for key, err := range c.Keys(t.Context(), prefix) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, key)
	}
	return all
}

// fillKeys stores n entries, named by the format.
func fillKeys(t testing.TB, c *Cache, format string, n int) {
	t.Helper()
	if _, err := c.DB().Exec(`INSERT INTO cache (user_id, key, value)
		SELECT current_user, format($1::text, to_char(i, 'FM0000000')), 'x' FROM generate_series(1, $2::int) i`, format, n); err != nil {
		t.Fatal(err)
	}
}

func TestKeysComeInOrderByPrefixAndNothingIsSpecial(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	const last = "\U0010FFFF"
	keys := []string{"a", "a%", "a%b", "a_", "a_b", `a\`, `a\b`, "a'b", "a\x01", "ab", "abc", "B", "b", "é", "éa", "z", "zz",
		"\u007f", "\u0080", "\uD7FF", "\uD7FFx", "\uE000", "\uFFFF", "\uFFFFx", last, last + last, last + "x", "x" + last, "y", "*", "?",
		strings.Repeat(last, maxKeyBytes/4), strings.Repeat("k", maxKeyBytes), " ", "  "}
	for _, key := range keys {
		if err := c.Set(ctx, key, 1, 0); err != nil {
			t.Fatal(err)
		}
	}
	expired(t, c, "a gone", 1)
	prefixes := append([]string{"", "a gone", "nothing", strings.Repeat(last, 255)}, keys...)
	for _, prefix := range prefixes {
		var want []string
		for _, key := range keys {
			if strings.HasPrefix(key, prefix) {
				want = append(want, key)
			}
		}
		slices.Sort(want)
		if got := keysOf(t, c, prefix); !slices.Equal(got, want) {
			t.Errorf("prefix %.20q: got %.20q, want %.20q", prefix, got, want)
		}
	}
	for _, prefix := range []string{"\xff", "a\x00", "é"[:1], strings.Repeat("k", maxKeyBytes+1)} {
		n := 0
		for key, err := range c.Keys(ctx, prefix) {
			if n++; key != "" || !errors.Is(err, ErrInvalidKey) {
				t.Errorf("prefix %.20q: got %q, %v", prefix, key, err)
			}
		}
		if n != 1 {
			t.Errorf("prefix %.20q: got %d pairs, want one error", prefix, n)
		}
	}
}

func TestKeysSeesEachKeyThatStaysExactlyOnce(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	fillKeys(t, c, "stays %s", 3*keysPage)
	fillKeys(t, c, "goes %s", 100)
	fillKeys(t, c, "t%s", 100)
	seen := map[string]int{}
	n := 0
	for key, err := range c.Keys(ctx, "") {
		if err != nil {
			t.Fatal(err)
		}
		seen[key]++
		// Keys before, at and after the cursor come, go and are written anew.
		if n++; n%100 == 0 {
			fillKeys(t, c, fmt.Sprintf("stays %d new %%s", n), 5)
			fillKeys(t, c, fmt.Sprintf("a%d %%s", n), 5)
			_, err1 := c.Delete(ctx, fmt.Sprintf("goes %07d", n/100))
			_, err2 := c.Delete(ctx, fmt.Sprintf("t%07d", n/100))
			if err := errors.Join(err1, err2, c.Set(ctx, key, "again", time.Hour)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for key, times := range seen {
		if times != 1 {
			t.Errorf("%q came %d times", key, times)
		}
	}
	for i := range 3 * keysPage {
		if key := fmt.Sprintf("stays %07d", i+1); seen[key] != 1 {
			t.Fatalf("%q came %d times, want once", key, seen[key])
		}
	}
}

func TestKeysHoldsNothingBetweenPagesAndStopsWithItsLoop(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openCache(t, dsn, Config{})
	c.DB().SetMaxOpenConns(1)
	fillKeys(t, c, "%s", 2*keysPage+5)
	walk := func(c *Cache) {
		before := c.Stats().Statements
		n := 0
		for key, err := range c.Keys(ctx, "") {
			if err != nil {
				t.Fatal(err)
			}
			if c.tx == nil && c.DB().Stats().InUse != 0 {
				t.Fatal("a connection is in use")
			}
			if n++; n == keysPage+1 {
				break
			}
			if n == 1 { // the only connection is free
				if found, err := c.Exists(ctx, key); err != nil || !found {
					t.Error(found, err)
				}
			}
		}
		if got := c.Stats().Statements - before; got != 3 {
			t.Errorf("got %d statements, want two pages and an Exists", got)
		}
	}
	walk(c)
	inTx(t, c, true, walk)

	// A sequence may be walked again, and from within another walk.
	seq := c.Keys(ctx, "000001")
	for range seq {
		n := 0
		for range seq {
			n++
		}
		if n != 10 {
			t.Fatalf("got %d keys, want 10", n)
		}
	}
	if got := len(keysOf(t, c, "")); got != 2*keysPage+5 {
		t.Errorf("got %d keys", got)
	}
}

func TestKeysRunsOnThePrimaryKey(t *testing.T) {
	t.Parallel()
	dsn, admin := setUp(t)
	c := openCache(t, dsn, Config{})
	service := openCache(t, admin, Config{User: pgUser(t, c)})
	fillKeys(t, c, "%s", 60_000)
	for _, analysed := range []bool{false, true} {
		if analysed {
			execAdmin(t, admin, `ANALYZE cache`)
		}
		for _, c := range []*Cache{c, service} {
			for _, mode := range []string{"force_custom_plan", "force_generic_plan"} {
				plan := explain(t, c, mode, c.walks.keys.text, c.args("0", "0030000", "0"+beyondKeys)...)
				nodes := nodesOf(plan)
				if want := map[string]string{"Limit": "", "Result": "", "Index Scan": "cache_pkey"}; !maps.Equal(nodes, want) {
					t.Errorf("analysed %t, %s: got %v, want %v", analysed, mode, nodes, want)
				}
				if rows := plan["Shared Hit Blocks"].(float64) + plan["Shared Read Blocks"].(float64); rows > 1500 {
					t.Errorf("analysed %t, %s: a page touched %v blocks", analysed, mode, rows)
				}
			}
		}
	}
}

func pgUser(t *testing.T, c *Cache) (name string) {
	t.Helper()
	if err := c.DB().QueryRow(`SELECT current_user`).Scan(&name); err != nil {
		t.Fatal(err)
	}
	return name
}

// explain runs a statement and returns the root of its plan.
func explain(t *testing.T, c *Cache, mode, text string, args ...any) map[string]any {
	t.Helper()
	ctx := t.Context()
	conn, err := c.DB().Conn(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.ExecContext(ctx, `SET plan_cache_mode = `+mode); err != nil {
		t.Fatal(err)
	}
	var out []byte
	if err := conn.QueryRowContext(ctx, `EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) `+text, args...).Scan(&out); err != nil {
		t.Fatal(err)
	}
	var plans []struct{ Plan map[string]any }
	if err := json.Unmarshal(out, &plans); err != nil {
		t.Fatal(err)
	}
	return plans[0].Plan
}

// nodesOf is each kind of node, with its index.
func nodesOf(plan map[string]any) map[string]string {
	index, _ := plan["Index Name"].(string)
	nodes := map[string]string{plan["Node Type"].(string): index}
	inner, _ := plan["Plans"].([]any)
	for _, p := range inner {
		maps.Copy(nodes, nodesOf(p.(map[string]any)))
	}
	return nodes
}

func TestClearRemovesTheUsersEntriesInBatches(t *testing.T) {
	ctx := t.Context()
	dsn, admin := setUp(t)
	c := openCache(t, dsn, Config{})
	other := openCache(t, admin, Config{})
	if err := other.Set(ctx, "theirs", 1, 0); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Clear(ctx); err != nil || n != 0 {
		t.Errorf("nothing: got %d, %v", n, err)
	}
	fillKeys(t, c, "%s", 2*clearPage+5)
	expired(t, c, "expired", 1)
	before := c.Stats().Statements
	if n, err := c.Clear(ctx); err != nil || n != 2*clearPage+5 {
		t.Errorf("got %d, %v, want %d: expired entries do not count", n, err, 2*clearPage+5)
	}
	if got := c.Stats().Statements - before; got != 5 {
		t.Errorf("got %d statements, want the leases, three batches, and an empty one", got)
	}
	var rows int
	if err := other.DB().QueryRow(`SELECT count(*) FROM cache WHERE user_id <> current_user`).Scan(&rows); err != nil || rows != 0 {
		t.Errorf("%d rows are left, %v", rows, err)
	}
	wantEntry(t, other, "theirs", "1")

	fillKeys(t, c, "%s", 10)
	inTx(t, c, false, func(c *Cache) {
		if n, err := c.Clear(ctx); err != nil || n != 10 {
			t.Errorf("in a transaction: got %d, %v", n, err)
		}
	})
	if got := len(keysOf(t, c, "")); got != 10 {
		t.Errorf("after a rollback: got %d keys, want 10", got)
	}
}

// An entry whose TTL somebody changes meanwhile is removed all the same.
func TestClearRemovesWhatIsBeingRetimed(t *testing.T) {
	ctx := t.Context()
	dsn, admin := setUp(t)
	c := openCache(t, dsn, Config{})
	fillKeys(t, c, "%s", 10)
	tx, err := openDB(t, dsn).Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := c.WithTx(tx).Expire(ctx, "0000005", time.Hour); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		n, err := c.Clear(ctx)
		if err == nil && n != 10 {
			err = fmt.Errorf("%d entries removed, want 10", n)
		}
		ended <- err
	}()
	eventuallyBlocked(t, openDB(t, admin))
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if left := keysOf(t, c, ""); len(left) != 0 {
		t.Errorf("%v stayed", left)
	}
}
