package fastpgcache

import (
	"bufio"
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache/internal/history"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// The model: processes act at random on a few keys, and note for everything that may
// change what a key answers, and for each answer, when it began and ended. Afterwards
// each answer is held against that.

// Keys are of a window that moves on: so that there always are some that have never
// been there, which a filter can tell.
const (
	modelKeys   = 20
	windowMoves = 5
	windowTime  = int64(80 * time.Millisecond)
)

func window() (first int) { return windowMoves * int(history.Now()/windowTime) }

// actor is one goroutine of a process.
type actor struct {
	history.Log
	cache  *Cache
	db     *sql.DB
	random *rand.Rand
	wrote  int // the key of the last write
	ops    *atomic.Int64
}

// run acts until stop, in ways of a Cache or of plain SQL.
func (a *actor) run(ctx context.Context, stop func() bool, act func(context.Context) error) {
	for !stop() {
		a.ops.Add(1)
		if err := act(ctx); err != nil {
			time.Sleep(2 * time.Millisecond) // PostgreSQL is down, or the table gone
		}
	}
}

func name(key int) string { return fmt.Sprint("key ", key) }

func (a *actor) get(ctx context.Context, key int) error {
	var text string
	start := history.Now()
	found, err := a.cache.Get(ctx, name(key), &text)
	a.Answered(key, text, found, start, err)
	return err
}

func (a *actor) useCache(ctx context.Context) error {
	key, ttl := window()+a.random.IntN(modelKeys), time.Duration(1+a.random.IntN(20))*time.Millisecond
	start := history.Now()
	value, text := a.Value()
	switch p := a.random.IntN(100); {
	case p < 40: // of a few keys, and the one just written
		if a.wrote > 0 && a.random.IntN(2) == 0 {
			key = a.wrote
		}
		first := key
		for ; a.random.IntN(40) > 0; key = first + a.random.IntN(3) {
			a.ops.Add(1)
			if err := a.get(ctx, key); err != nil {
				return err
			}
		}
		return nil
	case p < 48:
		found, err := a.cache.Exists(ctx, name(key))
		if !found {
			a.Answered(key, "", false, start, err)
		}
		return err
	case p < 54:
		_, found, err := a.cache.TTL(ctx, name(key))
		if !found {
			a.Answered(key, "", false, start, err)
		}
		return err
	case p < 62:
		values, err := a.cache.GetMany(ctx, []string{name(key), name(key + 1), name(key + 2)})
		for i := range 3 {
			v, found := values[name(key+i)]
			a.Answered(key+i, v.String(), found, start, err)
		}
		return err
	case p < 75:
		a.wrote = key
		err := a.cache.Set(ctx, name(key), text, 0)
		a.Stored(key, value, start, 0, err)
		for i := 0; i < 12 && err == nil && p < 68; i++ { // whatever happens meanwhile
			a.ops.Add(1)
			err = a.get(ctx, key)
		}
		return err
	case p < 81:
		err := a.cache.Set(ctx, name(key), text, ttl)
		a.Stored(key, value, start, ttl, err)
		return err
	case p < 84:
		value2, text2 := a.Value()
		err := a.cache.SetMany(ctx, map[string]any{name(key): text, name(key + 1): text2}, 0)
		a.Stored(key, value, start, 0, err)
		a.Stored(key+1, value2, start, 0, err)
		return err
	case p < 86:
		added, err := a.cache.Add(ctx, name(key), text, 0)
		if added || err != nil {
			a.Stored(key, value, start, 0, err)
		}
		return err
	case p < 87:
		v, found, err := a.cache.Take(ctx, name(key))
		a.Removed(key, start, err)
		if found {
			e := history.Event{Kind: history.Hit, Key: key, Start: start, End: history.Now()} // not from memory
			e.Value, _ = strconv.ParseInt(v.String(), 10, 64)
			a.Note(e)
		}
		return err
	case p < 89:
		var got string
		loaded := false
		err := a.cache.GetOrSet(ctx, name(key), &got, 0, func(context.Context) (any, error) { loaded = true; return text, nil })
		a.Note(history.Event{Kind: history.Stored, Key: key, Value: value, Start: start, End: history.Forever}) // there is no telling
		if !loaded {
			a.Answered(key, got, true, start, err)
		}
		return err
	case p < 91:
		tx, err := a.db.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		defer tx.Rollback()
		if err = a.cache.WithTx(tx).Set(ctx, name(key), text, 0); err == nil {
			time.Sleep(time.Duration(a.random.IntN(5)) * time.Millisecond)
			err = tx.Commit()
		}
		process := a.Process
		a.Process = 0 // what is written in a transaction counts as somebody else's
		a.Stored(key, value, start, 0, err)
		a.Process = process
		return err
	case p < 93:
		found, err := a.cache.Expire(ctx, name(key), ttl)
		if found || err != nil {
			a.Note(history.Event{Kind: history.Retimed, Key: key, Start: start, End: history.Now()})
			a.Note(history.Event{Kind: history.Removed, Key: key, Start: start + int64(ttl) - history.Slack, End: history.Now() + int64(ttl) + history.Slack})
		}
		return err
	case p < 94:
		_, err := a.cache.Persist(ctx, name(key))
		a.Note(history.Event{Kind: history.Retimed, Key: key, Start: start, End: history.Now()})
		return err
	case p < 95 && a.random.IntN(10) == 0:
		_, err := a.cache.Clear(ctx) // entries that are written meanwhile may stay
		a.Removed(history.AllKeys, start, err)
		return err
	case p < 96: // a caller that leaves
		ctx, cancel := context.WithTimeout(ctx, time.Duration(a.random.IntN(500))*time.Microsecond)
		defer cancel()
		err := a.cache.Set(ctx, name(key), text, 0)
		a.Stored(key, value, start, 0, err)
		return nil
	default:
		_, err := a.cache.Delete(ctx, name(key))
		a.Removed(key, start, err)
		return err
	}
}

// TestNoAnswerIsWrong runs for a few seconds; FASTPGCACHE_MODEL_OPS says how many
// operations are to be made instead.
func TestNoAnswerIsWrong(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	most, _ := strconv.ParseInt(os.Getenv("FASTPGCACHE_MODEL_OPS"), 10, 64)
	const short = 4 * time.Second
	server := pgtest.Own(t, pgtest.Config{})
	admin := server.Database(t)
	adminDB := openDB(t, admin)
	adminDB.SetMaxIdleConns(0)
	check(t, Setup(ctx, adminDB, SetupConfig{}))
	user := pgtest.Role(t, admin)
	dsn := pgtest.WithUser(admin, user)

	var ops atomic.Int64
	begin := time.Now()
	stop := func() bool {
		if most > 0 {
			return ops.Load() >= most
		}
		took := time.Since(begin)
		return took >= short && ops.Load() >= 6000 || took >= 10*short // on a busy machine it is slow
	}
	var actors []*actor
	var wg sync.WaitGroup
	start := func(a *actor, act func(context.Context) error) {
		a.Number, a.ops, a.random = int64(len(actors)+1), &ops, rand.New(rand.NewPCG(uint64(len(actors)), uint64(begin.UnixNano())))
		actors = append(actors, a)
		wg.Go(func() { a.run(ctx, stop, act) })
	}
	var caches []*Cache
	for i, cfg := range []Config{
		{MaxStaleness: 3 * time.Millisecond},
		{MaxStaleness: 15 * time.Millisecond},
		{MaxStaleness: 60 * time.Millisecond},
		{MaxStaleness: 500 * time.Millisecond}, // longer than a load
		{MaxStaleness: 15 * time.Millisecond, DisableCoalescing: true, DisablePrepare: true},
	} {
		cfg.OnError = func(error) {}
		c, err := Open(dsn, cfg)
		check(t, err)
		t.Cleanup(func() { c.Close() }) // whose connections may have died
		if i == 1 {
			c.db.SetMaxOpenConns(1)
		}
		caches = append(caches, c)
		for range 2 {
			a := &actor{Log: history.Log{Process: i + 1, Staleness: cfg.MaxStaleness}, cache: c, db: c.db}
			start(a, a.useCache)
		}
	}
	db := openDB(t, dsn)
	for range 2 {
		a := &actor{db: db}
		start(a, a.useSQL)
	}
	c := &chaos{actor: actor{db: adminDB}, server: server, user: user}
	next := time.Now().Add(short / 2)
	start(&c.actor, func(ctx context.Context) error {
		switch {
		case time.Now().After(next): // every few seconds, since each takes one
			next = time.Now().Add(4 * short)
			return c.crash(ctx)
		case c.random.IntN(20) == 0:
			return c.force(ctx)
		case c.random.IntN(10) == 0:
			return c.truncate(ctx)
		}
		if c.random.IntN(4) == 0 {
			return c.fill(ctx)
		}
		time.Sleep(time.Duration(20+c.random.IntN(100)) * time.Millisecond)
		return c.restore(ctx)
	})
	wg.Wait()

	var events []history.Event
	for _, a := range actors {
		events = append(events, a.Events...)
	}
	report(t, events)
	var sum Stats
	for _, c := range caches {
		s := c.Stats()
		sum.Local.Misses += s.Local.Misses
		sum.Local.Hits += s.Local.Hits
		sum.Local.Resets += s.Local.Resets
		sum.Local.CatchUps += s.Local.CatchUps
		sum.Local.FilterLoads += s.Local.FilterLoads
	}
	t.Logf("%d operations in %v: %d misses and %d hits answered from memory, %d catch-ups, %d resets, %d filters",
		ops.Load(), time.Since(begin).Round(time.Millisecond), sum.Local.Misses, sum.Local.Hits, sum.Local.CatchUps, sum.Local.Resets, sum.Local.FilterLoads)
	if sum.Local.Misses < 50 || sum.Local.Hits < 500 || sum.Local.CatchUps < 20 || sum.Local.FilterLoads < 10 {
		t.Error("too little for a verdict")
	}
}

// report fails the test for violations among events.
func report(t *testing.T, events []history.Event) {
	t.Helper()
	verdict := history.Check(events)
	counts := map[history.Kind]int{}
	for _, e := range events {
		counts[e.Kind]++
	}
	t.Logf("%d stores, %d removals, %d misses and %d hits, %d of them wrong",
		counts[history.Stored], counts[history.Removed], verdict.Misses, verdict.Hits, len(verdict.Wrong))
	for _, v := range verdict.Wrong[:min(len(verdict.Wrong), 10)] {
		t.Error(v)
	}
}

// The same with real processes, each with a Cache, whose server is killed under load.
func TestNoAnswerIsWrongAcrossProcesses(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	server := pgtest.Own(t, pgtest.Config{})
	admin := server.Database(t)
	adminDB := openDB(t, admin)
	adminDB.SetMaxIdleConns(0)
	check(t, Setup(ctx, adminDB, SetupConfig{}))
	dsn := pgtest.WithUser(admin, pgtest.Role(t, admin))

	var mu sync.Mutex
	var events []history.Event // guarded by mu
	var answers int64
	var wg sync.WaitGroup
	for process := 1; process <= 3; process++ {
		cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestModelProcess$")
		cmd.Env = append(os.Environ(), "FASTPGCACHE_MODEL_DSN="+dsn, fmt.Sprint("FASTPGCACHE_MODEL_PROCESS=", process))
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		check(t, err)
		check(t, cmd.Start())
		wg.Go(func() {
			var got struct {
				Events  []history.Event
				Answers int64
			}
			err := json.NewDecoder(bufio.NewReader(out)).Decode(&got)
			if err := cmp.Or(err, cmd.Wait()); err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			events = append(events, got.Events...)
			answers += got.Answers
		})
	}
	c := &chaos{actor: actor{db: adminDB}, server: server}
	for range 2 {
		time.Sleep(1500 * time.Millisecond)
		check(t, c.crash(ctx))
	}
	wg.Wait()
	report(t, append(events, c.Events...))
	if answers < 50 {
		t.Errorf("got %d answers of filters, too few for a verdict", answers)
	}
}

// TestModelProcess is no test, but one of those processes.
func TestModelProcess(t *testing.T) {
	process, _ := strconv.Atoi(os.Getenv("FASTPGCACHE_MODEL_PROCESS"))
	if process == 0 {
		t.Skip("no child process")
	}
	const staleness = 15 * time.Millisecond
	c, err := Open(os.Getenv("FASTPGCACHE_MODEL_DSN"), Config{MaxStaleness: staleness})
	check(t, err)
	begin := time.Now()
	stop := func() bool { return time.Since(begin) > 5*time.Second }
	var ops atomic.Int64
	var actors []*actor
	var wg sync.WaitGroup
	for i := range 3 {
		a := &actor{Log: history.Log{Number: int64(100*process + i), Process: process, Staleness: staleness}, cache: c, db: c.db, ops: &ops,
			random: rand.New(rand.NewPCG(uint64(i), uint64(begin.UnixNano())))}
		actors = append(actors, a)
		act := a.useCache
		if i == 0 {
			a.Process, a.Staleness, act = 0, 0, a.useSQL
		}
		wg.Go(func() { a.run(t.Context(), stop, act) })
	}
	wg.Wait()
	var got struct {
		Events  []history.Event
		Answers int64
	}
	for _, a := range actors {
		got.Events = append(got.Events, a.Events...)
	}
	got.Answers = c.Stats().Local.Misses
	c.Close()
	check(t, json.NewEncoder(os.Stdout).Encode(got))
}
