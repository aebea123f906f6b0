// Command misses measures what a filter of the keys brings a cache, and costs it:
//
//	cd bench && go run ./misses [-keys 1000000] [-open 3m]
//
// It starts a throwaway PostgreSQL and a Redis, and prints lookups of missing keys with
// and without filter and on Redis; loading and catching up with few keys and with many;
// and what the filter costs a process that only ever hits, over a driver that answers
// at once.
package main

import (
	"context"
	"database/sql"
	"errors"
	"flag"
	"fmt"
	"net"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/lib/pq"
	"github.com/redis/go-redis/v9"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/bench/internal/program"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

var openFor time.Duration

func main() {
	keys := flag.Int("keys", 1_000_000, "keys in the larger table")
	flag.DurationVar(&openFor, "open", 0, "how long a transaction has been open when catching up beside it is measured")
	flag.Parse()
	program.Main(func(ctx context.Context) error { return run(ctx, *keys) })
}

func run(ctx context.Context, keys int) error {
	server, err := pgtest.Start(ctx, pgtest.Config{Settings: map[string]string{"shared_buffers": "1GB", "autovacuum": "off"}})
	if err != nil {
		return err
	}
	defer server.Stop()
	dsn := server.DSN("postgres")
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		return err
	}
	defer db.Close()

	if err := hits(ctx); err != nil {
		return err
	}
	for _, n := range []int{10_000, keys} {
		if err := fastpgcache.Setup(ctx, db, fastpgcache.SetupConfig{Force: true}); err != nil {
			return err
		}
		if _, err := db.ExecContext(ctx, `INSERT INTO cache (key, value) SELECT 'key ' || i, repeat('x', 100) FROM generate_series(1, $1) i`, n); err != nil {
			return err
		}
		if _, err := db.ExecContext(ctx, `VACUUM ANALYZE cache`); err != nil {
			return err
		}
		fmt.Printf("\n%d keys\n", n)
		if err := loading(ctx, dsn, n); err != nil {
			return err
		}
		if n == 10_000 {
			if err := misses(ctx, dsn); err != nil {
				return err
			}
		}
		if err := catchUps(ctx, dsn, db); err != nil {
			return err
		}
	}
	return nil
}

// open returns a cache whose filter is loaded.
func open(dsn string, staleness time.Duration) (*fastpgcache.Cache, error) {
	c, err := fastpgcache.Open(dsn, fastpgcache.Config{MaxStaleness: staleness})
	if err == nil {
		err = load(c)
	}
	return c, err
}

func load(c *fastpgcache.Cache) error {
	for begin := time.Now(); c.Stats().Local.FilterLoads == 0; runtime.Gosched() {
		if time.Since(begin) > time.Minute {
			return errors.New("no filter")
		}
		if c.Stats().Misses == 0 {
			if _, err := c.Get(context.Background(), "missing", nil); err != nil {
				return err
			}
		}
	}
	return nil
}

// measure returns the median of five rounds of each, taken in turns.
func measure(each ...func(b *testing.B)) []testing.BenchmarkResult {
	rounds := make([][]testing.BenchmarkResult, len(each))
	for range 5 {
		for i, f := range each {
			rounds[i] = append(rounds[i], testing.Benchmark(func(b *testing.B) { b.ReportAllocs(); f(b) }))
		}
	}
	medians := make([]testing.BenchmarkResult, len(each))
	for i, r := range rounds {
		slices.SortFunc(r, func(a, b testing.BenchmarkResult) int { return int(a.NsPerOp() - b.NsPerOp()) })
		medians[i] = r[len(r)/2]
	}
	return medians
}

func getter(ctx context.Context, c *fastpgcache.Cache, key string, want bool) func(b *testing.B) {
	return func(b *testing.B) {
		for range b.N {
			if found, err := c.Get(ctx, key, nil); found != want || err != nil {
				b.Fatal(found, err)
			}
		}
	}
}

// misses compares lookups of a missing key by one caller, whose ctx can end as any
// request's can.
func misses(ctx context.Context, dsn string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	off, err := fastpgcache.Open(dsn, fastpgcache.Config{})
	if err != nil {
		return err
	}
	defer off.Close()
	on, err := open(dsn, time.Hour)
	if err != nil {
		return err
	}
	defer on.Close()
	addr, stop, err := startRedis(ctx)
	if err != nil {
		return err
	}
	defer stop()
	rdb := redis.NewClient(&redis.Options{Addr: addr})
	defer rdb.Close()
	r := measure(getter(ctx, on, "missing", false), getter(ctx, off, "missing", false), func(b *testing.B) {
		for range b.N {
			if err := rdb.Get(ctx, "missing").Err(); !errors.Is(err, redis.Nil) {
				b.Fatal(err)
			}
		}
	})
	for i, name := range []string{"with filter", "without", "go-redis"} {
		fmt.Printf("missing key, %-12s %9d ns  %3d allocs  %6.0f x\n", name, r[i].NsPerOp(), r[i].AllocsPerOp(),
			float64(r[i].NsPerOp())/float64(r[0].NsPerOp()))
	}

	fresh, err := open(dsn, 100*time.Millisecond)
	if err != nil {
		return err
	}
	defer fresh.Close()
	var rounds []time.Duration
	for range 5 {
		time.Sleep(200 * time.Millisecond) // so that it has to catch up
		before := fresh.Stats()
		begin := time.Now()
		for i := range 10_000 {
			if _, err := fresh.Get(ctx, fmt.Sprint("missing ", i), nil); err != nil {
				return err
			}
		}
		rounds = append(rounds, time.Since(begin))
		if after := fresh.Stats(); after.Local.CatchUps == before.Local.CatchUps {
			return errors.New("no catch-up")
		}
	}
	slices.Sort(rounds)
	fmt.Printf("10,000 missing keys in a row, staleness 100 ms, catch-ups included: %v\n", rounds[2])
	return nil
}

// loading measures time, memory and false positives.
func loading(ctx context.Context, dsn string, n int) error {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	begin := time.Now()
	c, err := open(dsn, time.Hour)
	if err != nil {
		return err
	}
	defer c.Close()
	took := time.Since(begin)
	runtime.ReadMemStats(&after)
	const asked = 2_000_000
	for i := range asked {
		if _, err := c.Get(ctx, fmt.Sprint("missing ", i), nil); err != nil {
			return err
		}
	}
	s := c.Stats()
	fmt.Printf("loaded in %v, %.2f bytes a key, %.4f %% false positives; the heap grew to %d MB from %d MB\n",
		took.Round(time.Millisecond), float64(s.Local.FilterBytes)/float64(n), 100*float64(s.Local.FalsePositives)/asked, after.HeapSys>>20, before.HeapSys>>20)
	return nil
}

// catchUps measures them in each state of the database, beside a lookup's round trip.
func catchUps(ctx context.Context, dsn string, db *sql.DB) error {
	connector, err := pq.NewConnector(dsn)
	if err != nil {
		return err
	}
	timed := &timer{Connector: connector}
	c, err := fastpgcache.OpenConnector(timed, fastpgcache.Config{MaxStaleness: time.Nanosecond})
	if err != nil {
		return err
	}
	defer c.Close()
	if err := load(c); err != nil {
		return err
	}
	round := func(name string) error {
		var lookups []time.Duration
		before := c.Stats()
		timed.reset()
		for range 1000 {
			begin := time.Now()
			if _, err := c.Get(ctx, "missing", nil); err != nil {
				return err
			}
			lookups = append(lookups, time.Since(begin))
			time.Sleep(time.Millisecond) // for a catch-up
		}
		each, after := timed.reset(), c.Stats()
		slices.Sort(lookups)
		slices.Sort(each)
		fmt.Printf("catch-up, %-28s %6d µs, 90 %% in %6d; a lookup %5d µs; %.1f keys each, %d rebuilds\n", name,
			each[len(each)/2].Microseconds(), each[len(each)*9/10].Microseconds(), lookups[500].Microseconds(),
			float64(after.Local.FilterKeys-before.Local.FilterKeys)/float64(len(each)), after.Local.FilterLoads-before.Local.FilterLoads)
		return nil
	}
	if err := round("nothing new"); err != nil {
		return err
	}
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if _, err := tx.ExecContext(ctx, `INSERT INTO cache (key, value) SELECT 'open ' || i, '' FROM generate_series(1, 100000) i`); err != nil {
		return err
	}
	// As many transactions as come in minutes.
	if _, err := db.ExecContext(ctx, `DO $$ BEGIN FOR i IN 1..20000 LOOP PERFORM txid_current(); COMMIT; END LOOP; END $$`); err != nil {
		return err
	}
	time.Sleep(openFor)
	if err := round("100,000 rows uncommitted"); err != nil {
		return err
	}
	if err := tx.Rollback(); err != nil {
		return err
	}

	w, err := fastpgcache.Open(dsn, fastpgcache.Config{})
	if err != nil {
		return err
	}
	defer w.Close()
	writing, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; writing.Err() == nil; i++ {
			items := make(map[string]any)
			for j := range 100 {
				items[fmt.Sprint("new ", i, " ", j)] = 1
			}
			w.SetMany(writing, items, 0)
		}
	})
	defer wg.Wait()
	defer stop()
	begin := time.Now()
	err = round("a writer at full speed")
	if s := w.Stats(); err == nil {
		fmt.Printf("  which wrote %.0f keys a second\n", float64(s.Keys)/time.Since(begin).Seconds())
	}
	return err
}

// hits measures what the filter costs a lookup that hits, over a driver that answers at
// once.
func hits(ctx context.Context) error {
	get := func(staleness time.Duration) (func(b *testing.B), error) {
		c, err := fastpgcache.New(sql.OpenDB(stub{}), fastpgcache.Config{MaxStaleness: staleness, DisableCoalescing: true})
		if err == nil && staleness > 0 {
			err = load(c)
		}
		return getter(ctx, c, "key", true), err
	}
	off, err1 := get(0)
	on, err2 := get(time.Hour)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	r := measure(off, on)
	fmt.Printf("a hit over a stub driver: %d ns, %d allocs; with filter %+d ns, %+d allocs\n",
		r[0].NsPerOp(), r[0].AllocsPerOp(), r[1].NsPerOp()-r[0].NsPerOp(), r[1].AllocsPerOp()-r[0].AllocsPerOp())
	return nil
}

func startRedis(ctx context.Context) (addr string, stop func(), err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	addr = l.Addr().String()
	l.Close()
	_, port, _ := net.SplitHostPort(addr)
	cmd := exec.CommandContext(ctx, "redis-server", "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
	if err := cmd.Start(); err != nil {
		return "", nil, fmt.Errorf("%w (install redis-server)", err)
	}
	stop = func() {
		cmd.Process.Kill()
		cmd.Wait()
	}
	for range 100 {
		if conn, err := net.Dial("tcp", addr); err == nil {
			conn.Close()
			return addr, stop, nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	stop()
	return "", nil, errors.New("redis-server does not answer")
}
