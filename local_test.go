package fastpgcache

import (
	"cmp"
	"context"
	"database/sql"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/maypok86/otter/v2"
)

// filled returns a local that answers n keys, and a keyspace of theirs.
func filled(t testing.TB, n int) (*local, []string) {
	l := newLocal(time.Hour, 64<<20)
	generation := l.kept.begin(l.now(), 0)
	keys := make([]string, n)
	err := l.misses.load(generation, 0, func() error {
		for i := range keys {
			keys[i] = fmt.Sprintf("user:%08d", i)
			l.misses.enter(hashOf(keys[i]))
		}
		return nil
	})
	check(t, err)
	text := fmt.Sprintf("%0100d", 1)
	for _, key := range keys {
		l.found(key, l.tickets(key)[0], text, noExpiry)
	}
	return l, keys
}

// draws returns indexes of n keys by Zipf's law.
func draws(n int) []int32 {
	zipf := rand.NewZipf(rand.New(rand.NewPCG(1, 2)), 1.01, 1, uint64(n-1))
	draws := make([]int32, 1<<20)
	for i := range draws {
		draws[i] = int32(zipf.Uint64())
	}
	return draws
}

func TestLocalAnswersAllocateNothing(t *testing.T) {
	l, keys := filled(t, 100)
	if n := testing.AllocsPerRun(1000, func() {
		if _, _, a := l.lookup(keys[7]); a != present {
			t.Fatal("no hit")
		}
		if _, _, a := l.lookup("not there"); a != absent {
			t.Fatal("no miss")
		}
	}); n != 0 {
		t.Errorf("got %v allocations", n)
	}
}

func BenchmarkLocalHit(b *testing.B) {
	l, keys := filled(b, 100_000)
	var text string
	for b.Loop() {
		v, _, _ := l.lookup(keys[7])
		text = v.text
	}
	_ = text
}

func BenchmarkLocalMiss(b *testing.B) {
	l, _ := filled(b, 100_000)
	for b.Loop() {
		l.lookup("not there")
	}
}

func BenchmarkLocalParallel(b *testing.B) {
	l, keys := filled(b, 100_000)
	draws := draws(len(keys))
	var n atomic.Int64
	b.SetParallelism(32)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for i := int(n.Add(7777)); pb.Next(); i++ {
			l.lookup(keys[draws[i&(1<<20-1)]])
		}
	})
}

func BenchmarkOtterParallel(b *testing.B) {
	l, keys := filled(b, 100_000)
	values := otter.Must(&otter.Options[string, *keptValue]{MaximumWeight: 64 << 20, Weigher: func(string, *keptValue) uint32 { return 300 }})
	for _, key := range keys {
		v, _ := l.kept.values.GetIfPresent(key)
		values.Set(key, v)
	}
	draws := draws(len(keys))
	var n atomic.Int64
	b.SetParallelism(32)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for i := int(n.Add(7777)); pb.Next(); i++ {
			values.GetIfPresent(keys[draws[i&(1<<20-1)]])
		}
	})
}

// keepKeys sets keys to "old" and has c keep them.
func keepKeys(t *testing.T, c, by *Cache, keys ...string) {
	t.Helper()
	for _, key := range keys {
		check(t, by.Set(t.Context(), key, "old", time.Hour))
	}
	catchUp(t, c)
	for _, key := range keys {
		eventually(t, "a hit from memory", func() bool {
			before := c.Stats().Local.Hits
			wantHit(t, c, key)
			return c.Stats().Local.Hits > before
		})
	}
}

// writers are all ways to change what "k" answers, and some "k2", too.
func writers(t *testing.T, c *Cache, db *sql.DB) map[string]func() error {
	ctx := t.Context()
	exec := func(statements ...string) func() error {
		return func() error {
			for _, s := range statements {
				if _, err := db.Exec(s); err != nil {
					return err
				}
			}
			return nil
		}
	}
	inTx := func(write func(*Cache) error) func() error {
		return func() error {
			tx, err := db.BeginTx(ctx, nil)
			if err != nil {
				return err
			}
			defer tx.Rollback()
			return cmp.Or(write(c.WithTx(tx)), tx.Commit())
		}
	}
	return map[string]func() error{
		"Set":          func() error { return c.Set(ctx, "k", "new", 0) },
		"Set for long": func() error { return c.Set(ctx, "k", "new", time.Hour) },
		"merged sets": func() error {
			_, err := c.setBatch(ctx, []entry{{"k", stored{text: "new", isText: true}, noTTL}, {"k2", stored{text: "new", isText: true}, noTTL}})
			return err
		},
		"SetMany": func() error { return c.SetMany(ctx, map[string]any{"k": "new", "k2": []byte{0xff}}, 0) },
		"SetMany in chunks": func() error {
			items := map[string]any{"k": "new", "k2": "new"}
			for i := range chunkKeys {
				items[fmt.Sprint("more ", i)] = i
			}
			return c.SetMany(ctx, items, 0)
		},
		"Delete":      func() error { _, err := c.Delete(ctx, "k"); return err },
		"Delete, Set": func() error { _, err := c.Delete(ctx, "k"); return cmp.Or(err, c.Set(ctx, "k", "new", 0)) },
		"Delete, Add": func() error { c.Delete(ctx, "k"); _, err := c.Add(ctx, "k", "new", 0); return err },
		"DeleteMany":  func() error { _, err := c.DeleteMany(ctx, []string{"k", "k2"}); return err },
		"Take":        func() error { _, _, err := c.Take(ctx, "k"); return err },
		"Clear":       func() error { _, err := c.Clear(ctx); return err },
		"Increment":   func() error { c.Set(ctx, "k", 1, 0); _, err := c.Increment(ctx, "k", 1, 0); return err },
		"Expire":      func() error { _, err := c.Expire(ctx, "k", time.Minute); return err },
		"Expire, soon": func() error {
			_, err := c.Expire(ctx, "k", time.Millisecond)
			time.Sleep(2 * time.Millisecond)
			return err
		},
		"Persist": func() error { _, err := c.Persist(ctx, "k"); return err },
		"GetOrSet": func() error {
			c.Delete(ctx, "k")
			return c.GetOrSet(ctx, "k", nil, 0, returns("new"))
		},
		"Set in a transaction":    inTx(func(c *Cache) error { return c.Set(ctx, "k", "new", 0) }),
		"Delete in a transaction": inTx(func(c *Cache) error { _, err := c.Delete(ctx, "k"); return err }),
		"Clear in a transaction":  inTx(func(c *Cache) error { _, err := c.Clear(ctx); return err }),
		"INSERT":                  exec(`DELETE FROM cache WHERE key = 'k'`, `INSERT INTO cache (key, value) VALUES ('k', 'new')`),
		"upsert":                  exec(`INSERT INTO cache (key, value) VALUES ('k', 'new') ON CONFLICT (user_id, key) DO UPDATE SET value = 'new'`),
		"UPDATE":                  exec(`UPDATE cache SET value = 'new' WHERE key = 'k'`),
		"UPDATE of value_bytes":   exec(`UPDATE cache SET value = NULL, value_bytes = '\x01' WHERE key = 'k'`),
		"UPDATE of expires_at":    exec(`UPDATE cache SET expires_at = now() + interval '1 day' WHERE key = 'k'`),
		"UPDATE after a Set in the same transaction": inTx(func(tx *Cache) error {
			_, err := tx.tx.Exec(`UPDATE cache SET value = 'newer' WHERE key = 'k'`)
			return cmp.Or(tx.Set(ctx, "k2", "new", 0), err)
		}),
		"DELETE":       exec(`DELETE FROM cache WHERE key = 'k'`),
		"DELETE all":   exec(`DELETE FROM cache`),
		"cache_set":    exec(`SELECT cache_set(current_user::text, 'k', 'new')`),
		"cache_delete": exec(`SELECT cache_delete(current_user::text, 'k')`),
		"MERGE-like":   exec(`WITH gone AS (DELETE FROM cache WHERE key = 'k2') UPDATE cache SET value = 'new' WHERE key = 'k'`),
	}
}

// state is what the database says.
func state(t *testing.T, c *Cache, key string) (text string, found bool, ttl time.Duration) {
	t.Helper()
	v, found, err := c.get(t.Context(), key)
	check(t, err)
	ttl, _, err = c.TTL(t.Context(), key)
	check(t, err)
	return v.string(), found, ttl
}

// wantState fails where c, which may answer from memory, says other than what other, which
// does not, says.
func wantState(t *testing.T, c, other *Cache) {
	t.Helper()
	for _, key := range []string{"k", "k2", "k3"} {
		text, found, ttl := state(t, other, key)
		for range 3 { // the second is from memory
			var got string
			gotFound, err := c.Get(t.Context(), key, &got)
			check(t, err)
			gotTTL, _, err := c.TTL(t.Context(), key)
			check(t, err)
			if got != text || gotFound != found || (gotTTL-ttl).Abs() > 20*time.Second {
				t.Errorf("%s: got %q, %v, %v, want %q, %v, %v", key, got, gotFound, gotTTL, text, found, ttl)
			}
		}
		if exists, err := c.Exists(t.Context(), key); exists != found || err != nil {
			t.Errorf("%s: Exists: got %v, %v", key, exists, err)
		}
		if values, err := c.GetMany(t.Context(), []string{key}); values[key].String() != text || err != nil {
			t.Errorf("%s: GetMany: got %q, %v", key, values, err)
		}
	}
}

func TestEveryKindOfWriteIsHeardOf(t *testing.T) {
	t.Parallel()
	dsn, admin := setUp(t)
	c := openFiltered(t, dsn, Config{MaxStaleness: hour})
	other := openCache(t, dsn, Config{})
	ws := writers(t, other, openDB(t, dsn))
	for name, write := range ws {
		t.Run(name, func(t *testing.T) {
			keepKeys(t, c, other, "k", "k2")
			check(t, write())
			catchUp(t, c)
			wantState(t, c, other)
		})
	}
	owner := openDB(t, admin)
	for name, statement := range map[string]string{
		"UPDATE of key": `UPDATE cache SET key = 'k3' WHERE key = 'k'`,
		"TRUNCATE":      `TRUNCATE cache`,
	} {
		t.Run(name, func(t *testing.T) {
			keepKeys(t, c, other, "k", "k2")
			_, err := owner.Exec(statement)
			check(t, err)
			catchUp(t, c)
			wantState(t, c, other)
		})
	}
}

func TestOwnWritesAreSeenAtOnce(t *testing.T) {
	t.Parallel()
	dsn, _ := setUp(t)
	other := openCache(t, dsn, Config{})
	for _, cfg := range []Config{{MaxStaleness: hour}, {MaxStaleness: hour, DisableCoalescing: true}, {MaxStaleness: hour, LocalBytes: -1}} {
		c := openFiltered(t, dsn, cfg)
		for name, write := range writers(t, c, c.db) {
			if strings.ToUpper(name[:2]) == name[:2] || strings.Contains(name, "transaction") || strings.HasPrefix(name, "cache_") || name == "upsert" {
				continue // not by c, or with its commit only
			}
			t.Run(name, func(t *testing.T) {
				if cfg.LocalBytes >= 0 {
					keepKeys(t, c, other, "k", "k2")
				}
				check(t, write())
				wantState(t, c, other)
				catchUp(t, c)
				wantState(t, c, other)
			})
		}
	}
}

func TestAWriteInATransactionIsNotKept(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openFiltered(t, dsn, Config{MaxStaleness: hour})
	keepKeys(t, c, c, "k")
	tx, err := c.db.BeginTx(ctx, nil)
	check(t, err)
	check(t, c.WithTx(tx).Set(ctx, "k", "undone", 0))
	check(t, tx.Rollback())
	wantText(t, c, "k", "old")
	tx, err = c.db.BeginTx(ctx, nil)
	check(t, err)
	check(t, c.WithTx(tx).Set(ctx, "k", "first", 0))
	_, err = tx.Exec(`UPDATE cache SET value = 'last' WHERE key = 'k'`)
	check(t, err)
	wantText(t, c, "k", "old")
	check(t, tx.Commit())
	catchUp(t, c)
	wantText(t, c, "k", "last")
}

func wantText(t testing.TB, c *Cache, key, want string) {
	t.Helper()
	var got string
	if _, err := c.Get(context.Background(), key, &got); got != want || err != nil {
		t.Errorf("%s: got %q, %v, want %q", key, got, err, want)
	}
}

func TestOwnWritesAreAnsweredFromMemory(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	c := openFiltered(t, dsn, Config{MaxStaleness: hour})
	check(t, c.Set(ctx, "a", "v", time.Hour))
	check(t, c.SetMany(ctx, map[string]any{"b": "v", "c": []byte("v")}, 0))
	_, err := c.Add(ctx, "d", "v", time.Minute)
	check(t, err)
	catchUp(t, c) // which brings their own rows
	before := c.Stats()
	for _, key := range []string{"a", "b", "c", "d"} {
		wantText(t, c, key, "v")
	}
	if ttl, _, err := c.TTL(ctx, "a"); ttl > time.Hour || ttl < time.Hour-time.Minute || err != nil {
		t.Errorf("got TTL %v, %v, want an hour", ttl, err)
	}
	if after := c.Stats(); after.Statements != before.Statements || after.Local.Hits-before.Local.Hits != 5 || after.Hits-before.Hits != 5 {
		t.Errorf("got %+v, had %+v", after, before)
	}
}

func TestWhoSleptPastTheTrimmingStartsAnew(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	other := openCache(t, dsn, Config{})
	db := openDB(t, dsn)
	trim := func() (removed int) {
		for range 2 {
			_, err := db.Exec(`UPDATE cache_epoch SET taken = ARRAY(SELECT t - interval '1 hour' FROM unnest(taken) t)`)
			check(t, err)
			var n sql.NullInt64
			check(t, db.QueryRow(`SELECT cache_trim(current_user::text, 100000)`).Scan(&n))
			removed += int(n.Int64)
		}
		return removed
	}
	c := openFiltered(t, dsn, Config{MaxStaleness: hour})
	late, err := db.Begin() // runs when c reads the feed, and ends unheard
	check(t, err)
	defer late.Rollback()
	_, err = late.Exec(`INSERT INTO cache (key, value) VALUES ('late', 'v')`)
	check(t, err)
	check(t, other.Set(ctx, "short", "v", 0)) // so that xmax is past it
	keepKeys(t, c, other, "k")
	check(t, late.Commit())
	check(t, other.Set(ctx, "k", "new", 0))
	eventually(t, "the feed is empty", func() bool {
		trim()
		var n int
		check(t, db.QueryRow(`SELECT count(*) FROM cache_change WHERE 'k' = ANY (keys)`).Scan(&n))
		return n == 0
	})
	before := c.Stats().Local.Resets
	catchUp(t, c)
	wantText(t, c, "k", "new")
	wantText(t, c, "late", "v")
	if got := c.Stats().Local.Resets - before; got != 1 {
		t.Errorf("got %d resets, want 1", got)
	}
}

func TestTheFeedStaysSmallWhoeverWrites(t *testing.T) {
	ctx := t.Context()
	dsn, _ := setUp(t)
	db := openDB(t, dsn)
	c := openCache(t, dsn, Config{}) // who only writes
	rows := func() (n int) {
		check(t, db.QueryRow(`SELECT count(*) FROM cache_change`).Scan(&n))
		return n
	}
	for i := range 100 {
		check(t, c.Set(ctx, fmt.Sprint(i), 1, 0))
	}
	eventually(t, "trimming", func() bool {
		_, err := db.Exec(`UPDATE cache_epoch SET taken = ARRAY(SELECT t - interval '1 hour' FROM unnest(taken) t)`)
		check(t, err)
		c.feed.trimAt.Store(0)
		check(t, c.Set(ctx, "k", 1, 0))
		return rows() < 50
	})
}
