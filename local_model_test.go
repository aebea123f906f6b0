package fastpgcache

import (
	"bufio"
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// The model: processes act at random on a few keys, and note for everything that may
// make a key present or absent, and for each miss, when it began and ended. Afterwards
// each miss is held against that.

// event is what happened to a key between two moments, in nanoseconds.
type event struct {
	Kind       kind
	Key        int // or allKeys
	Process    int // whose Cache it was; 0: nobody's
	Staleness  int64
	Start, End int64
}

type kind int

const (
	wasStored  kind = iota + 1 // there from End at the latest, for good
	wasRemoved                 // gone at any moment from Start to End, or not at all
	wasMissed                  // said to be absent
)

const allKeys = -1

// Keys are of a window that moves on: so that there always are some that have never
// been there, which a filter can tell.
const (
	modelKeys   = 20
	windowMoves = 5
	windowTime  = int64(80 * time.Millisecond)
)

func window() (first int) { return windowMoves * int(now()/windowTime) }

var modelStart = time.Now()

// now is monotonic, and comparable across processes of one machine.
func now() int64 { return modelStart.UnixNano() + int64(time.Since(modelStart)) }

// violations describes every miss of a key that was there all the time from its
// staleness before the lookup began until it ended, or, stored by the same Cache, when
// the lookup began.
func violations(events []event) (found []string, misses int) {
	slices.SortFunc(events, func(a, b event) int { return cmp.Compare(a.Start, b.Start) })
	byKey := make(map[int][]event)
	var ofAll []event
	for _, e := range events {
		if e.Key == allKeys {
			ofAll = append(ofAll, e)
		} else {
			byKey[e.Key] = append(byKey[e.Key], e)
		}
	}
	for key, events := range byKey {
		first, last := events[0].Start, int64(0)
		for _, e := range events {
			last = max(last, e.End)
		}
		for _, e := range ofAll {
			if e.End >= first && e.Start <= last {
				events = append(events, e)
			}
		}
		// In order of Start; gone[i] is the last End of the removals that began
		// before event i.
		slices.SortFunc(events, func(a, b event) int { return cmp.Compare(a.Start, b.Start) })
		gone := make([]int64, len(events)+1)
		for i, e := range events {
			gone[i+1] = gone[i]
			if e.Kind == wasRemoved {
				gone[i+1] = max(gone[i], e.End)
			}
		}
		for i, miss := range events {
			if miss.Kind != wasMissed {
				continue
			}
			misses++
			last, _ := slices.BinarySearchFunc(events, miss.End, func(e event, at int64) int { return cmp.Compare(e.Start, at) })
			removedUntil := gone[last]
			// A store is within reach if no removal can have followed it.
			for j := i - 1; j >= 0 && events[j].Start > removedUntil; j-- {
				s := events[j]
				if s.Kind != wasStored {
					continue
				}
				own := s.Process != 0 && s.Process == miss.Process && s.End <= miss.Start
				if own || s.End <= miss.Start-miss.Staleness {
					found = append(found, fmt.Sprintf("process %d, staleness %v, missed key %d, own %v, there since %v before, from %v on; removed until %v before",
						miss.Process, time.Duration(miss.Staleness), key, own, time.Duration(miss.Start-s.End),
						time.Duration(s.End-modelStart.UnixNano()), time.Duration(miss.Start-removedUntil)))
					break
				}
			}
		}
	}
	return found, misses
}

func TestTheModelTellsRightMissesFromWrongOnes(t *testing.T) {
	const process, other, staleness = 1, 2, 10
	store := func(by int, start, end int64) event { return event{wasStored, 0, by, 0, start, end} }
	remove := func(start, end int64) event { return event{wasRemoved, allKeys, 0, 0, start, end} }
	miss := func(start, end int64) event { return event{wasMissed, 0, process, staleness, start, end} }
	for _, test := range []struct {
		events []event
		want   int
	}{
		{[]event{miss(100, 101)}, 0},
		{[]event{store(other, 80, 90), miss(100, 101)}, 1},
		{[]event{store(other, 80, 91), miss(100, 101)}, 0},
		{[]event{store(process, 80, 100), miss(100, 101)}, 1},
		{[]event{store(process, 80, 101), miss(100, 101)}, 0},
		{[]event{store(other, 50, 60), remove(70, 80), miss(100, 101)}, 0},
		{[]event{store(other, 50, 60), remove(70, 80), store(other, 81, 82), miss(100, 101)}, 1},
		{[]event{store(other, 50, 60), remove(40, 51), miss(100, 101)}, 0},
		{[]event{store(other, 50, 60), remove(40, 49), miss(100, 101)}, 1},
		{[]event{store(other, 50, 60), remove(101, 102), miss(100, 110)}, 0},
		{[]event{store(other, 50, 60), remove(111, 112), miss(100, 110)}, 1},
	} {
		if got, _ := violations(test.events); len(got) != test.want {
			t.Errorf("%v: got %v, want %d", test.events, got, test.want)
		}
	}
}

// actor is one goroutine of a process.
type actor struct {
	process   int
	staleness time.Duration
	cache     *Cache
	db        *sql.DB
	random    *rand.Rand
	events    []event
	wrote     int // the key of the last write
	ops       *atomic.Int64
}

func (a *actor) note(k kind, key, process int, start, end int64) {
	a.events = append(a.events, event{k, key, process, int64(a.staleness), start, end})
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

// expiryOf notes that key, given ttl by a call from start to end, may vanish by it.
func (a *actor) expiryOf(key int, ttl time.Duration, start, end int64) {
	const slack = 3 * time.Millisecond // between the server's clock and ours
	a.note(wasRemoved, key, 0, start+int64(ttl-slack), end+int64(ttl+slack))
}

func (a *actor) useCache(ctx context.Context) error {
	key, ttl := window()+a.random.IntN(modelKeys), time.Duration(1+a.random.IntN(20))*time.Millisecond
	start := now()
	lookup := func(found bool, err error) error {
		if err == nil && !found {
			a.note(wasMissed, key, a.process, start, now())
		}
		return err
	}
	write := func(did bool, err error) error {
		if err == nil && did {
			a.wrote = key
			a.note(wasStored, key, a.process, start, now())
		}
		return err
	}
	switch p := a.random.IntN(100); {
	case p < 40: // of a few keys, and the one just written
		if a.wrote > 0 && a.random.IntN(2) == 0 {
			key = a.wrote
		}
		for ; a.random.IntN(5) > 0; key++ {
			a.ops.Add(1)
			start = now()
			if err := lookup(a.cache.Get(ctx, name(key), nil)); err != nil {
				return err
			}
		}
		return nil
	case p < 50:
		return lookup(a.cache.Exists(ctx, name(key)))
	case p < 57:
		_, found, err := a.cache.TTL(ctx, name(key))
		return lookup(found, err)
	case p < 63:
		keys := []string{name(key), name(key + 1), name(key + 2)}
		values, err := a.cache.GetMany(ctx, keys)
		for i, k := range keys {
			if _, found := values[k]; !found && err == nil {
				a.note(wasMissed, key+i, a.process, start, now())
			}
		}
		return err
	case p < 76:
		err := write(true, a.cache.Set(ctx, name(key), 1, 0))
		for i := 0; i < 12 && err == nil && p < 68; i++ { // whatever happens meanwhile
			a.ops.Add(1)
			start = now()
			err = lookup(a.cache.Get(ctx, name(key), nil))
		}
		return err
	case p < 82:
		err := a.cache.Set(ctx, name(key), 1, ttl)
		a.expiryOf(key, ttl, start, now())
		return err
	case p < 85:
		err := a.cache.SetMany(ctx, map[string]any{name(key): 1, name(key + 1): 2}, 0)
		if err == nil {
			a.note(wasStored, key+1, a.process, start, now())
		}
		return write(true, err)
	case p < 87:
		return write(a.cache.Add(ctx, name(key), 1, 0))
	case p < 88:
		_, err := a.cache.Increment(ctx, name(key), 1, 0)
		return write(true, err)
	case p < 90:
		// There is no telling whether it stored anything.
		return a.cache.GetOrSet(ctx, name(key), nil, 0, func(context.Context) (any, error) { return 1, nil })
	case p < 92:
		tx, err := a.db.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		defer tx.Rollback()
		if err := a.cache.WithTx(tx).Set(ctx, name(key), 1, 0); err != nil {
			return err
		}
		time.Sleep(time.Duration(a.random.IntN(5)) * time.Millisecond)
		if err := tx.Commit(); err != nil {
			return err
		}
		a.note(wasStored, key, 0, start, now())
		return nil
	case p < 94:
		_, err := a.cache.Expire(ctx, name(key), ttl)
		a.expiryOf(key, ttl, start, now())
		return err
	default:
		_, err := a.cache.Delete(ctx, name(key))
		a.note(wasRemoved, key, 0, start, now())
		return err
	}
}

const (
	modelUpsert = `INSERT INTO cache (key, value) VALUES ($1, '1')
		ON CONFLICT (user_id, key) DO UPDATE SET value = '1', value_bytes = NULL, expires_at = NULL`
	modelDelete = `DELETE FROM cache WHERE user_id = current_user AND key = $1`
)

func (a *actor) useSQL(ctx context.Context) error {
	key := window() + a.random.IntN(modelKeys)
	start := now()
	switch p := a.random.IntN(1000); {
	case p < 300:
		_, err := a.db.ExecContext(ctx, modelUpsert, name(key))
		if err == nil {
			a.note(wasStored, key, 0, start, now())
		}
		return err
	case p < 500:
		_, err := a.db.ExecContext(ctx, modelDelete, name(key))
		a.note(wasRemoved, key, 0, start, now())
		return err
	case p < 503:
		_, err := a.db.ExecContext(ctx, `DELETE FROM cache WHERE user_id = current_user`)
		a.note(wasRemoved, allKeys, 0, start, now())
		return err
	}
	return a.transaction(ctx)
}

// transaction writes some keys, and maybe others in a savepoint that it rolls back
// to, and after a while commits, as a prepared transaction or not, or rolls back.
func (a *actor) transaction(ctx context.Context) error {
	conn, err := a.db.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer conn.ExecContext(ctx, `ROLLBACK`)
	exec := func(statement string, args ...any) {
		if err == nil {
			_, err = conn.ExecContext(ctx, statement, args...)
		}
	}
	exec(`BEGIN`)
	keys := a.random.Perm(modelKeys)[:1+a.random.IntN(3)]
	slices.Sort(keys)
	begin, first := window(), len(a.events)
	for _, key := range keys {
		key += begin
		switch start := now(); a.random.IntN(5) {
		case 0:
			exec(modelDelete, name(key))
			a.note(wasRemoved, key, 0, start, math.MaxInt64)
		case 1:
			exec(`SAVEPOINT s`)
			exec(modelUpsert, name(key))
			exec(`ROLLBACK TO s`)
		case 2:
			exec(`SAVEPOINT t`)
			fallthrough
		default:
			exec(modelUpsert, name(key))
			a.note(wasStored, key, 0, start, math.MaxInt64)
		}
	}
	wait := func() { time.Sleep(time.Duration(a.random.IntN(20)) * time.Millisecond) }
	wait()
	committed := false
	switch id := strconv.FormatUint(a.random.Uint64(), 36); a.random.IntN(8) {
	case 0:
		exec(`ROLLBACK`)
	case 1:
		exec(`PREPARE TRANSACTION '` + id + `'`)
		wait()
		exec(`COMMIT PREPARED '` + id + `'`)
		committed = err == nil
	default:
		exec(`COMMIT`)
		committed = err == nil
	}
	end := now()
	kept := a.events[:first]
	for _, e := range a.events[first:] {
		e.End = end
		if committed || e.Kind == wasRemoved {
			kept = append(kept, e)
		}
	}
	a.events = kept
	return err
}

// chaos is what an administrator does.
type chaos struct {
	actor
	server *pgtest.Server
	user   string
}

// restore makes a table of which no xid tells the age, as a copy restored would be.
func (c *chaos) restore(ctx context.Context) error {
	start := now()
	tx, err := c.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	exec := func(statement string, args ...any) (n int64) {
		if err == nil {
			var result sql.Result
			if result, err = tx.ExecContext(ctx, statement, args...); err == nil {
				n, err = result.RowsAffected()
			}
		}
		return n
	}
	exec(`ALTER TABLE cache DISABLE TRIGGER cache_stamp_insert`)
	var keys []int
	for key := window(); len(keys) < 5; key++ {
		if exec(`INSERT INTO cache (user_id, key, value, created_xid) VALUES ($1, $2, '1', 3) ON CONFLICT DO NOTHING`, c.user, name(key)) == 1 || err != nil {
			keys = append(keys, key)
		}
	}
	exec(`ALTER TABLE cache ENABLE ALWAYS TRIGGER cache_stamp_insert`)
	exec(`UPDATE cache_epoch SET id = gen_random_uuid()`)
	if err == nil {
		err = tx.Commit()
	}
	if err == nil {
		for _, key := range keys {
			c.note(wasStored, key, 0, start, now())
		}
	}
	return err
}

// fill inserts many keys that nobody asks for, so that catching up, and loading after the
// others, take their time.
func (c *chaos) fill(ctx context.Context) error {
	_, err := c.db.ExecContext(ctx, `DELETE FROM cache WHERE key LIKE '~%'`)
	if err == nil {
		_, err = c.db.ExecContext(ctx, `INSERT INTO cache (user_id, key, value) SELECT $1, '~' || i, '' FROM generate_series(1, 6000) i`, c.user)
	}
	return err
}

func (c *chaos) force(ctx context.Context) error {
	start := now()
	err := Setup(ctx, c.db, SetupConfig{Force: true})
	c.note(wasRemoved, allKeys, 0, start, now())
	return err
}

func (c *chaos) crash(ctx context.Context) error {
	start := now()
	err := c.server.Crash(ctx)
	if err == nil {
		err = repair(ctx, c.db)
	}
	c.note(wasRemoved, allKeys, 0, start, now())
	return err
}

// repair sees to what a server that commits asynchronously may have lost, or left.
func repair(ctx context.Context, db *sql.DB) error {
	for {
		var id string
		err := db.QueryRowContext(ctx, `SELECT gid FROM pg_prepared_xacts`).Scan(&id)
		if err != nil {
			return Setup(ctx, db, SetupConfig{})
		}
		db.ExecContext(ctx, `ROLLBACK PREPARED '`+id+`'`)
	}
}

// TestNoMissIsWrong runs for a few seconds; FASTPGCACHE_MODEL_OPS says how many
// operations are to be made instead.
func TestNoMissIsWrong(t *testing.T) {
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
		return time.Since(begin) >= short
	}
	var actors []*actor
	var wg sync.WaitGroup
	start := func(a *actor, act func(context.Context) error) {
		a.ops, a.random = &ops, rand.New(rand.NewPCG(uint64(len(actors)), uint64(begin.UnixNano())))
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
			a := &actor{process: i + 1, staleness: cfg.MaxStaleness, cache: c, db: c.db}
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
		}
		if c.random.IntN(4) == 0 {
			return c.fill(ctx)
		}
		time.Sleep(time.Duration(20+c.random.IntN(100)) * time.Millisecond)
		return c.restore(ctx)
	})
	wg.Wait()

	var events []event
	for _, a := range actors {
		events = append(events, a.events...)
	}
	report(t, events)
	var sum Stats
	for _, c := range caches {
		s := c.Stats()
		sum.FilterAnswers += s.FilterAnswers
		sum.Local.CatchUps += s.Local.CatchUps
		sum.Local.FilterLoads += s.Local.FilterLoads
	}
	t.Logf("%d operations in %v: %d misses answered by filters, %d catch-ups, %d rebuilds",
		ops.Load(), time.Since(begin).Round(time.Millisecond), sum.FilterAnswers, sum.Local.CatchUps, sum.Local.FilterLoads)
	if sum.FilterAnswers < 50 || sum.Local.CatchUps < 20 || sum.Local.FilterLoads < 10 {
		t.Error("too little for a verdict")
	}
}

// report fails the test for violations among events.
func report(t *testing.T, events []event) {
	t.Helper()
	wrong, misses := violations(events)
	counts := map[kind]int{}
	for _, e := range events {
		counts[e.Kind]++
	}
	t.Logf("%d stores, %d removals, %d misses, %d of them wrong", counts[wasStored], counts[wasRemoved], misses, len(wrong))
	for _, v := range wrong[:min(len(wrong), 10)] {
		t.Error(v)
	}
}

// The same with real processes, each with a Cache, whose server is killed under load.
func TestNoMissIsWrongAcrossProcesses(t *testing.T) {
	ctx := t.Context()
	server := pgtest.Own(t, pgtest.Config{})
	admin := server.Database(t)
	adminDB := openDB(t, admin)
	adminDB.SetMaxIdleConns(0)
	check(t, Setup(ctx, adminDB, SetupConfig{}))
	dsn := pgtest.WithUser(admin, pgtest.Role(t, admin))

	var mu sync.Mutex
	var events []event // guarded by mu
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
				Events  []event
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
	report(t, append(events, c.events...))
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
		a := &actor{process: process, staleness: staleness, cache: c, db: c.db, ops: &ops,
			random: rand.New(rand.NewPCG(uint64(i), uint64(begin.UnixNano())))}
		actors = append(actors, a)
		act := a.useCache
		if i == 0 {
			a.staleness, act = 0, a.useSQL
		}
		wg.Go(func() { a.run(t.Context(), stop, act) })
	}
	wg.Wait()
	var got struct {
		Events  []event
		Answers int64
	}
	for _, a := range actors {
		got.Events = append(got.Events, a.events...)
	}
	got.Answers = c.Stats().FilterAnswers
	c.Close()
	check(t, json.NewEncoder(os.Stdout).Encode(got))
}
