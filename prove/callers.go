package main

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/history"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

var callerScenarios = []scenario{
	{name: "client processes killed and stopped", run: clients,
		what: "Processes of their own are killed by SIGKILL, stopped by SIGSTOP while the feed is trimmed past what they have read, and go on."},
	{name: "deadlines near the p99", run: deadlines,
		what: "Callers whose contexts end about when the answer comes. How many connections that costs, by driver."},
	{name: "hot keys", run: hotKeys,
		what: "48 callers in three processes get, load, set and delete three keys as fast as they can."},
	{name: "conflicting batches", run: batches,
		what: "SetMany, DeleteMany, GetMany and GetOrSetMany of 60 keys that overlap, in three processes, beside SQL that locks rows in the other order."},
	{name: "tokens that change every second", run: tokens,
		what: "The password changes every second and the old one is refused; eight goroutines log in all the time, at least 500 times. None fails but one that takes longer than two tokens live."},
}

// segment is what came of a part of the time.
type segment struct {
	history.Verdict
	calls int64
	took  []time.Duration // in order
}

// segment has callers use p, alone, for d, also when the time of the load is over, and
// judges the answers.
func (t *trial) segment(p *process, callers int, d time.Duration, failed func(error)) (s segment) {
	// No keys of the segment before.
	time.Sleep(time.Duration((windowKeys/windowMoves + 2) * windowTime))
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.ctx), d)
	defer cancel()
	var mu sync.Mutex // guards s.took
	var wg sync.WaitGroup
	logs := make([]*history.Log, callers)
	var calls atomic.Int64
	for i := range callers {
		logs[i] = &history.Log{Number: 1 + rand.Int64N(1<<30), Process: p.number, Staleness: p.staleness}
		c := &caller{trial: t, process: p, Log: logs[i], random: rand.New(rand.NewPCG(rand.Uint64(), 0))}
		wg.Go(func() {
			c.run(ctx, func(ctx context.Context) error {
				calls.Add(1)
				begin := time.Now()
				err := c.act(ctx)
				mu.Lock()
				s.took = append(s.took, time.Since(begin))
				mu.Unlock()
				if err != nil {
					failed(err)
				}
				return err
			})
		})
	}
	wg.Wait()
	var events []history.Event
	for _, l := range logs {
		events = append(events, l.Events...)
	}
	slices.Sort(s.took)
	s.Verdict, s.calls = history.Check(events), calls.Load()
	return s
}

func asState(err error, e *interface{ SQLState() string }) bool {
	return errors.As(err, e) && (*e).SQLState() != ""
}

// countingConnector counts connections that are made.
type countingConnector struct {
	driver.Connector
	made *atomic.Int64
}

func (c countingConnector) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := c.Connector.Connect(ctx)
	if err == nil {
		c.made.Add(1)
	}
	return conn, err
}

func deadlines(t *trial) error {
	if err := t.start(pgtest.Config{}); err != nil {
		return err
	}
	t.pause = 0
	deadline, _ := t.ctx.Deadline()
	all := []struct {
		driver  string
		callers int
	}{{"pq", 1}, {"pgx", 1}, {"pq", 32}, {"pgx", 32}}
	for i, o := range all {
		d := time.Until(deadline) / time.Duration(len(all)-i)
		inner, err := connect(o.driver, t.dsn())
		if err != nil {
			return err
		}
		made := new(atomic.Int64)
		p, err := t.open(o.driver, t.dsn(), fastpgcache.Config{})
		if err != nil {
			return err
		}
		p.cache.Close()
		if p.cache, err = fastpgcache.OpenConnector(countingConnector{inner, made}, fastpgcache.Config{}); err != nil {
			return err
		}
		t.patience = 3 * time.Second
		took := t.segment(p, o.callers, max(d/5, time.Second), func(error) {}).took
		if len(took) == 0 {
			return errors.New("no call succeeded")
		}
		p99 := took[len(took)*99/100]
		before := made.Load()
		t.patience = p99
		var ended atomic.Int64
		s := t.segment(p, o.callers, max(d*4/5-2*time.Second, time.Second), func(error) { ended.Add(1) })
		t.patience = 3 * time.Second
		t.result.figure("%s, %d callers, contexts of %v: %s calls, %.2f %% ended by their context, %.1f connections made for 1,000 of these",
			map[string]string{"pq": "lib/pq", "pgx": "pgx"}[o.driver], o.callers, p99.Round(10*time.Microsecond), thousands(s.calls),
			100*float64(ended.Load())/float64(max(s.calls, 1)), 1000*float64(made.Load()-before)/float64(max(ended.Load(), 1)))
		t.result.Hits += int64(s.Hits)
		t.result.Misses += int64(s.Misses)
		t.result.Wrong += int64(len(s.Wrong))
		for _, w := range s.Wrong[:min(3, len(s.Wrong))] {
			t.failf("wrong: %s", w)
		}
	}
	return nil
}

func hotKeys(t *trial) error {
	if err := t.start(pgtest.Config{}); err != nil {
		return err
	}
	t.pause = 4 * time.Millisecond
	var loads, asked atomic.Int64
	for i, driver := range []string{"pq", "pgx", "pq"} {
		p, err := t.open(driver, t.dsn(), fastpgcache.Config{MaxStaleness: time.Duration(i) * 20 * time.Millisecond})
		if err != nil {
			return err
		}
		for range 16 {
			c := &caller{trial: t, process: p, Log: t.log(p), random: rand.New(rand.NewPCG(rand.Uint64(), 0))}
			t.wg.Go(func() {
				c.run(t.ctx, func(ctx context.Context) error {
					key := window()/250*250 + c.random.IntN(3) // the same three for five seconds
					start := history.Now()
					switch p := c.random.IntN(20); {
					case p == 0:
						value, text := c.Value()
						err := c.process.cache.Set(ctx, name(key), text, 0)
						c.Stored(key, value, start, 0, err)
						return err
					case p == 1:
						_, err := c.process.cache.Delete(ctx, name(key))
						c.Removed(key, start, err)
						return err
					case p < 10:
						asked.Add(1)
						return c.getOrSet(ctx, key)
					}
					return c.get(ctx, key)
				})
			})
		}
	}
	<-t.ctx.Done()
	t.wg.Wait()
	for _, p := range t.processes {
		loads.Add(p.cache.Stats().Loads)
	}
	t.result.figure("%s calls of GetOrSet made %s loads", thousands(asked.Load()), thousands(loads.Load()))
	return nil
}

func batches(t *trial) error {
	// What deadlocks waits that long, and all who wait for it.
	if err := t.start(pgtest.Config{Settings: map[string]string{"deadlock_timeout": "100ms"}}); err != nil {
		return err
	}
	t.pause, t.patience = 10*time.Millisecond, 30*time.Second
	const keys = 60
	for i, driver := range []string{"pq", "pgx", "pq"} {
		p, err := t.open(driver, t.dsn(), fastpgcache.Config{MaxStaleness: time.Duration(i) * 20 * time.Millisecond})
		if err != nil {
			return err
		}
		for range 5 {
			c := &caller{trial: t, process: p, Log: t.log(p), random: rand.New(rand.NewPCG(rand.Uint64(), 0))}
			t.wg.Go(func() { c.run(t.ctx, func(ctx context.Context) error { return c.batch(ctx, keys) }) })
		}
	}
	db, err := openAdmin(t.dsn())
	if err != nil {
		return err
	}
	t.cleanup(func() { db.Close() })
	deadlocks := int64(0)
	for t.ctx.Err() == nil { // SQL that locks the other way round
		base := window() / 250 * 250
		tx, err := db.BeginTx(t.ctx, nil)
		if err != nil {
			break
		}
		for key := base + keys - 1; key >= base && err == nil; key -= 7 {
			_, err = tx.ExecContext(t.ctx, `SELECT FROM cache WHERE user_id = current_user AND key = $1 FOR UPDATE`, name(key))
		}
		var e interface{ SQLState() string }
		if asState(err, &e) && e.SQLState() == "40P01" {
			deadlocks++
		}
		tx.Rollback()
		time.Sleep(20 * time.Millisecond)
	}
	t.result.figure("%d deadlocks fell on the SQL beside it", deadlocks)
	// One that loses all its attempts is an error, as documented.
	if n := t.errorsBut("40P01"); n > 0 || t.result.Errors["40P01"] > t.result.Operations/1000 {
		t.failf("%d calls failed: %s", n, t.result.errors())
	}
	return nil
}

// batch does one operation on many of the keys.
func (c *caller) batch(ctx context.Context, keys int) error {
	cache, base := c.process.cache, window()/250*250
	some := make([]string, 0, keys)
	numbers := make([]int, 0, keys)
	for _, k := range c.random.Perm(keys)[:5+c.random.IntN(25)] {
		numbers = append(numbers, base+k)
		some = append(some, name(base+k))
	}
	start := history.Now()
	switch c.random.IntN(6) {
	case 0, 1:
		items, values := map[string]any{}, map[int]int64{}
		for i, key := range some {
			value, text := c.Value()
			items[key], values[numbers[i]] = text, value
		}
		err := cache.SetMany(ctx, items, 0)
		for key, value := range values {
			c.Stored(key, value, start, 0, err)
		}
		return err
	case 2:
		_, err := cache.DeleteMany(ctx, some)
		for _, key := range numbers {
			c.Removed(key, start, err)
		}
		return err
	case 3:
		texts := map[string]string{}
		loading := map[int]int64{}
		for i, key := range some {
			value, text := c.Value()
			texts[key], loading[numbers[i]] = text, value
		}
		got, err := cache.GetOrSetMany(ctx, some, 0, func(_ context.Context, missing []string) (map[string]any, error) {
			loaded := map[string]any{}
			for _, key := range missing {
				loaded[key] = texts[key]
			}
			return loaded, nil
		})
		for i, key := range numbers {
			c.Note(history.Event{Kind: history.Stored, Key: key, Value: loading[key], Start: start, End: history.Forever})
			if v, found := got[some[i]]; found && v.String() != texts[some[i]] {
				c.Answered(key, v.String(), true, start, err)
			}
		}
		return err
	default:
		got, err := cache.GetMany(ctx, some)
		for i, key := range numbers {
			v, found := got[some[i]]
			c.Answered(key, v.String(), found, start, err)
		}
		return err
	}
}

func tokens(t *trial) error {
	if err := t.start(pgtest.Config{HBA: "host all app 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust\n"}); err != nil {
		return err
	}
	var mu sync.Mutex // guards token, and that it is the password
	token := "app"
	rotations := 0
	tokens := fastpgcache.NewTokenCache(func(context.Context) (fastpgcache.Token, error) {
		mu.Lock()
		defer mu.Unlock()
		return fastpgcache.Token{Value: token, Expiry: time.Now().Add(time.Hour)}, nil // it does not know better
	})
	connector, err := fastpgcache.NewConnector(t.server.DSN(t.database, "user=app"), tokens)
	if err != nil {
		return err
	}
	made := new(atomic.Int64)
	cache, err := fastpgcache.OpenConnector(countingConnector{connector, made}, fastpgcache.Config{})
	if err != nil {
		return err
	}
	cache.DB().SetMaxIdleConns(1)
	p := &process{driver: "pq", cache: cache, number: 1}
	t.processes = append(t.processes, p)
	t.pause = 25 * time.Millisecond
	t.load(p, 8)
	for t.ctx.Err() == nil {
		time.Sleep(time.Second)
		mu.Lock()
		next := fmt.Sprint("token ", rotations)
		if err := t.exec(`ALTER ROLE app PASSWORD '` + next + `'`); err != nil {
			mu.Unlock()
			return err
		}
		token = next
		rotations++
		mu.Unlock()
		t.result.mark()
	}
	t.result.figure("%s logins with %d tokens", thousands(made.Load()), rotations)
	if deadline, _ := t.ctx.Deadline(); deadline.Sub(t.result.begin) > time.Minute && made.Load() < 500 {
		t.failf("only %d logins", made.Load())
	}
	// A login that takes longer than two tokens live is refused twice, and may be.
	if n := t.errorsBut("deadline"); n > made.Load()/1000 {
		t.failf("%d calls failed: %s", n, t.result.errors())
	}
	return nil
}
