package fastpgcache

import (
	"context"
	"database/sql"
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// limit sets what the entries of user may take; the empty user is everybody.
func limit(t testing.TB, admin *sql.DB, user string, bytes int64) {
	t.Helper()
	if _, err := admin.Exec(`INSERT INTO cache_limit VALUES ($1, $2) ON CONFLICT (user_id) DO UPDATE SET max_bytes = excluded.max_bytes`, user, bytes); err != nil {
		t.Fatal(err)
	}
}

// takes is what a user's entries take, as cache_fit counts them.
func takes(t testing.TB, admin *sql.DB, user string) (bytes, entries int64) {
	t.Helper()
	if err := admin.QueryRow(`SELECT coalesce(sum(octet_length(key) + coalesce(pg_column_size(value), 0) + coalesce(pg_column_size(value_bytes), 0) + 128), 0), count(*)
		FROM cache WHERE user_id = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp())`, user).Scan(&bytes, &entries); err != nil {
		t.Fatal(err)
	}
	return bytes, entries
}

// atRest waits until the limit is kept.
func atRest(t testing.TB, admin *sql.DB, user string, most int64) {
	t.Helper()
	bytes, deadline := int64(math.MaxInt64), time.Now().Add(time.Minute)
	for ; bytes > most*105/100; time.Sleep(50 * time.Millisecond) {
		if bytes, _ = takes(t, admin, user); time.Now().After(deadline) {
			t.Fatalf("at rest %d bytes, the limit is %d", bytes, most)
		}
	}
}

func userOf(t testing.TB, c *Cache) (user string) {
	t.Helper()
	if err := c.DB().QueryRow(`SELECT current_user`).Scan(&user); err != nil {
		t.Fatal(err)
	}
	return user
}

// Writers that do nothing but write keep the bound by themselves: a half more than the
// limit for 2 s at most, and what it says once they rest.
func TestTheLimitHoldsUnderALoadOfSetMany(t *testing.T) {
	const most = 16 << 20
	ctx := t.Context()
	dsn, admin := setUp(t)
	sup := openDB(t, admin)
	limit(t, sup, "", most)
	var user string
	var wg sync.WaitGroup
	load, cancel := context.WithTimeout(ctx, 8*time.Second)
	defer cancel()
	var caches []*Cache
	for range 2 { // processes
		c := openCache(t, dsn, Config{})
		caches = append(caches, c)
		user = userOf(t, c)
	}
	for w, c := range caches {
		wg.Go(func() {
			for n := 0; load.Err() == nil; n++ {
				items := make(map[string]any, 500)
				for i := range 500 {
					items[fmt.Sprintf("w%d:%d:%d", w, n, i)] = strings.Repeat("v", 100)
				}
				if err := c.SetMany(ctx, items, time.Hour); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	var over, worst time.Duration
	var peak int64
	for last := time.Now(); load.Err() == nil; {
		bytes, _ := takes(t, sup, user)
		now := time.Now()
		if peak = max(peak, bytes); bytes <= most*3/2 {
			over = 0
		} else {
			over += now.Sub(last)
			worst = max(worst, over)
		}
		last = now
		time.Sleep(100 * time.Millisecond)
	}
	wg.Wait()
	written := caches[0].Stats().Sets + caches[1].Stats().Sets
	t.Logf("%d written, %d evicted, peak %.2f x, over 1.5 x for %v at most", written, caches[0].Stats().Evicted+caches[1].Stats().Evicted, float64(peak)/most, worst)
	if worst > 2*time.Second {
		t.Errorf("over 1.5 x for %v", worst)
	}
	atRest(t, sup, user, most)
	bytes, entries := takes(t, sup, user)
	t.Logf("at rest %d entries, %.3f x", entries, float64(bytes)/most)
	if bytes > most*105/100 || bytes < most/2 {
		t.Errorf("at rest %d bytes", bytes)
	}
}

// Popular keys that are answered from memory only, which no statement sees, stay while ten
// times the limit is written and read by nobody.
func TestWhatIsReadFromMemoryStays(t *testing.T) {
	const most, popular, size = 4 << 20, 200, 1000
	ctx := t.Context()
	dsn, admin := setUp(t)
	sup := openDB(t, admin)
	limit(t, sup, "", most)
	reader := openCache(t, dsn, Config{MaxStaleness: time.Minute})
	writer := openCache(t, dsn, Config{})
	user := userOf(t, writer)
	hot := make([]string, popular)
	for i := range hot {
		hot[i] = fmt.Sprint("hot:", i)
		if err := reader.Set(ctx, hot[i], strings.Repeat("h", 100), 0); err != nil {
			t.Fatal(err)
		}
	}
	reading, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		for reading.Err() == nil {
			for _, key := range hot {
				var v string
				if _, err := reader.Get(ctx, key, &v); err != nil {
					t.Error(err)
				}
			}
			time.Sleep(time.Millisecond)
		}
	})
	cold := func(i int) {
		t.Helper()
		items := map[string]any{}
		for j := range 100 {
			items[fmt.Sprintf("cold:%d:%d", i, j)] = strings.Repeat("c", size)
		}
		if err := writer.SetMany(ctx, items, 0); err != nil {
			t.Fatal(err)
		}
	}
	count := func(where string) (n int) {
		t.Helper()
		if err := sup.QueryRow(`SELECT count(*) FROM cache WHERE key LIKE 'hot:%' ` + where).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	batch := 0
	for ; batch*100*size < most/2; batch++ {
		cold(batch)
	}
	eventually(t, "it was told that they were read", func() bool { return count(`AND mark = 0`) == popular })
	for end := batch + 10*most/(100*size); batch < end; batch++ {
		cold(batch)
	}
	stop()
	wg.Wait()
	atRest(t, sup, user, most)
	left := count("")
	s := reader.Stats()
	if left != popular || s.LocalHits < s.Hits*9/10 {
		t.Errorf("%d of %d popular keys are left; %d of %d hits from memory", left, popular, s.LocalHits, s.Hits)
	}
	t.Logf("%d evicted, %d hits, %d of them from memory, %d statements of the reader", writer.Stats().Evicted+s.Evicted, s.Hits, s.LocalHits, s.Statements)
}

// One user writes a hundred times the limit; the other loses nothing, nor does one whose
// limit is their own. What compresses well counts as it is stored.
func TestTheLimitIsOfEachUser(t *testing.T) {
	t.Parallel()
	const most = 256 << 10
	ctx := t.Context()
	dsn, admin := setUp(t)
	sup := openDB(t, admin)
	limit(t, sup, "", most)
	modest, busy := openCache(t, dsn, Config{}), openCache(t, otherRole(t, admin), Config{})
	big := openCache(t, otherRole(t, admin), Config{})
	limit(t, sup, userOf(t, big), 10*most)
	one := func(c *Cache, i int) {
		t.Helper()
		if err := c.Set(ctx, fmt.Sprint("k", i), incompressible(1000), 0); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 150 { // two thirds of it
		one(modest, i)
	}
	for i := range 1500 {
		one(big, i)
	}
	// 20 MB that take little.
	if err := modest.Set(ctx, "compressible", strings.Repeat("abcdefgh", 20<<20/8), 0); err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		items := map[string]any{}
		for j := range most / 1000 {
			items[fmt.Sprintf("%d:%d", i, j)] = incompressible(1000)
		}
		if err := busy.SetMany(ctx, items, 0); err != nil {
			t.Fatal(err)
		}
	}
	atRest(t, sup, userOf(t, busy), most)
	for c, want := range map[*Cache]int64{modest: 151, big: 1500} {
		fit(t, sup, userOf(t, c))
		if bytes, entries := takes(t, sup, userOf(t, c)); entries != want {
			t.Errorf("%d entries of %d bytes are left, want %d", entries, bytes, want)
		}
	}
	if s := busy.Stats(); s.Evicted == 0 || modest.Stats().Evicted+big.Stats().Evicted > 0 {
		t.Errorf("evicted: %d, %d, %d", s.Evicted, modest.Stats().Evicted, big.Stats().Evicted)
	}
}

func otherRole(t testing.TB, admin string) (dsn string) {
	t.Helper()
	return pgtest.WithUser(admin, pgtest.Role(t, admin))
}

func incompressible(n int) string {
	from := rand.IntN(len(noise()) - n)
	return noise()[from : from+n]
}

var noise = sync.OnceValue(func() string {
	b := make([]byte, 1<<20)
	for i := range b {
		b[i] = byte(' ' + rand.IntN(94))
	}
	return string(b)
})

// fit brings the entries of user within their limit, by as many bites as it takes.
func fit(t testing.TB, db *sql.DB, user string) (removed, evicted, bites int) {
	t.Helper()
	for next := 0; ; bites++ {
		var r, e, n sql.NullInt64
		if err := db.QueryRow(`SELECT removed, evicted, next_bite FROM cache_fit($1, $2)`, user, next).Scan(&r, &e, &n); err != nil {
			t.Fatal(err)
		}
		removed += int(r.Int64)
		evicted += int(e.Int64)
		if !n.Valid {
			return removed, evicted, bites + 1
		}
		next = int(n.Int64)
	}
}

// What is being loaded is not touched: the load looks whether its entry changes.
func TestATouchLeavesAloneWhatIsBeingLoaded(t *testing.T) {
	ctx := t.Context()
	dsn, admin := setUp(t)
	c := openCache(t, dsn, Config{})
	check(t, c.SetMany(ctx, map[string]any{"loading": 1, "read": 1}, 0))
	sup := openDB(t, admin)
	_, err := sup.Exec(`INSERT INTO cache_lease (user_id, key, holder, expires_at) VALUES ($1, 'loading', 'h', now() + interval '10 s'), ($1, 'read', 'h', now())`, userOf(t, c))
	check(t, err)
	c.quota.reads.Store(&reads{})
	c.quota.read("loading")
	c.quota.read("read")
	c.quota.touchNoted(ctx)
	var touched string
	check(t, sup.QueryRow(`SELECT string_agg(key, ' ') FROM cache WHERE mark = 0`).Scan(&touched))
	if touched != "read" {
		t.Errorf("touched %q", touched)
	}
}

// A key whose hash is another's would never be touched while the process lives.
func TestNearlyEveryReadIsNoted(t *testing.T) {
	const keys, batch = 10_000, 500
	var r reads
	noted := 0
	for i := range keys {
		r.note(fmt.Sprint("key:", i))
		r.note(fmt.Sprint("key:", i))
		if i%batch == batch-1 {
			noted += len(r.take())
		}
	}
	if noted > keys || noted < keys*997/1000 {
		t.Errorf("%d of %d keys were noted", noted, keys)
	}
	t.Log(noted)
}
