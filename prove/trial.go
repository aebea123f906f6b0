package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/goroutines"
	"github.com/fastpgcache/fastpgcache/internal/history"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
	"github.com/lib/pq"
)

var serverVersion string // of PostgreSQL, for the page

// trial is one run of a scenario: a server, processes that use it, and what is done to them.
type trial struct {
	ctx    context.Context // ends with the time of the load
	begin  func()          // that time, anew
	result *result

	server   *pgtest.Server
	database string
	admin    *sql.DB // the superuser's
	user     string  // the role whose entries all are

	patience time.Duration // of a caller: its context's
	pause    time.Duration // of a caller between two calls, on average
	emptied  atomic.Bool   // entries have been lost, as they may

	stopPooler func()     // nil without one
	vain       [][2]int64 // when deletions had no effect

	mu        sync.Mutex // guards all below
	processes []*process
	logs      []*history.Log
	cleanups  []func()
	wg        sync.WaitGroup
}

// try runs a scenario for about d.
func try(ctx context.Context, s scenario, d time.Duration) *result {
	r := &result{Name: s.name, What: s.what, begin: time.Now(), Errors: map[string]int64{}}
	goroutines.Do(ctx, s.name, func(ctx context.Context) {
		t := &trial{result: r, patience: 3 * time.Second, pause: 5 * time.Millisecond, database: "postgres"}
		cancel := func() {}
		defer func() { cancel() }()
		t.begin = func() {
			cancel()
			t.ctx, cancel = context.WithTimeout(ctx, d)
		}
		t.begin()
		if err := s.run(t); err != nil {
			var skip skipped
			if errors.As(err, &skip) {
				r.Skipped = string(skip)
			} else {
				t.failf("%v", err)
			}
		}
		t.end(cancel)
		if r.Operations == 0 && r.Skipped == "" {
			t.failf("nothing was asked")
		}
	})
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		n, stacks := ours(goroutines.Of(s.name))
		if n == 0 || time.Now().After(deadline) {
			if r.Goroutines = n; n > 0 {
				r.Failures = append(r.Failures, fmt.Sprintf("%d goroutines are left:\n%.3000s", n, stacks))
			}
			break
		}
	}
	r.Took = time.Since(r.begin)
	return r
}

// ours leaves those of the proxy out, which forgets some.
func ours(_ int, stacks string) (n int, some string) {
	for _, record := range strings.Split(stacks, "\n\n") {
		var count int
		if fmt.Sscan(record, &count); !strings.Contains(record, "toxiproxy") {
			n += count
			some += record
		}
	}
	return n, some
}

// skipped is why a scenario cannot run on this machine.
type skipped string

func (s skipped) Error() string { return string(s) }

func (t *trial) failf(format string, args ...any) {
	t.result.mu.Lock()
	defer t.result.mu.Unlock()
	if len(t.result.Failures) < 20 {
		t.result.Failures = append(t.result.Failures, fmt.Sprintf(format, args...))
	}
}

// cleanup has f run at the end, the last first.
func (t *trial) cleanup(f func()) { t.cleanups = append(t.cleanups, f) }

// start starts the server and sets the cache up, for one role.
func (t *trial) start(cfg pgtest.Config) error {
	server, err := pgtest.Start(context.Background(), cfg)
	if err != nil {
		return err
	}
	t.server = server
	t.cleanup(func() {
		if err := server.Stop(); err != nil {
			t.failf("%v", err)
		}
	})
	return t.prepare()
}

// prepare opens the superuser's pool and sets the cache up; then the time of the load begins.
func (t *trial) prepare() (err error) {
	t.admin, err = openAdmin(t.server.DSN(t.database))
	if err != nil {
		return err
	}
	admin := t.admin
	t.cleanup(func() { admin.Close() })
	serverVersion = fmt.Sprintf("%d.%d", t.server.Version()/10000, t.server.Version()%10000)
	t.user = "app"
	err = errors.Join(t.exec(`CREATE ROLE app LOGIN PASSWORD 'app'`), t.setup(fastpgcache.SetupConfig{}))
	t.begin() // a slow machine takes seconds to come here
	return err
}

func openAdmin(dsn string) (*sql.DB, error) {
	db, err := sql.Open("postgres", dsn)
	if err == nil {
		db.SetMaxIdleConns(0) // a crash shall leave nothing behind
	}
	return db, err
}

func (t *trial) setup(cfg fastpgcache.SetupConfig) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return fastpgcache.Setup(ctx, t.admin, cfg)
}

// exec runs statements as the superuser, whom a deadlock with the load does not stop.
func (t *trial) exec(statements ...string) error {
	for _, statement := range statements {
		var err error
		for range 20 {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			_, err = t.admin.ExecContext(ctx, statement)
			cancel()
			if e := (*pq.Error)(nil); !errors.As(err, &e) || e.Code != "40P01" {
				break
			}
		}
		if err != nil {
			return fmt.Errorf("%s: %w", statement, err)
		}
	}
	return nil
}

// dsn is the role's, with options, each "name=value".
func (t *trial) dsn(options ...string) string {
	return t.server.DSN(t.database, append([]string{"user=" + t.user, "password=app"}, options...)...)
}

// usual opens the processes that most scenarios have, over dsn.
func (t *trial) usual(dsn string) error {
	for i, o := range []struct {
		driver    string
		staleness time.Duration
	}{{"pq", 0}, {"pgx", 50 * time.Millisecond}, {"pq", 15 * time.Millisecond}} {
		cfg := fastpgcache.Config{MaxStaleness: o.staleness}
		if i == 0 {
			cfg.CleanupInterval = time.Second
		}
		p, err := t.open(o.driver, dsn, cfg)
		if err != nil {
			return err
		}
		t.load(p, 3)
	}
	return nil
}

// open opens a cache as a process of its own would.
func (t *trial) open(driver, dsn string, cfg fastpgcache.Config) (*process, error) {
	cfg.OnError = func(err error) { t.result.failed1(t.kind(err)) }
	p := &process{driver: driver, staleness: cfg.MaxStaleness}
	var err error
	if driver == "pq" {
		p.cache, err = fastpgcache.Open(dsn, cfg)
	} else if c, failed := connect(driver, dsn); failed != nil {
		return nil, failed
	} else {
		p.cache, err = fastpgcache.OpenConnector(c, cfg)
	}
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.processes = append(t.processes, p)
	p.number = len(t.processes)
	return p, nil
}

// log returns a new one for a caller of p, or for nobody's if p is nil.
func (t *trial) log(p *process) *history.Log {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := &history.Log{Number: int64(len(t.logs) + 1)}
	if p != nil {
		l.Process, l.Staleness = p.number, p.staleness
	}
	t.logs = append(t.logs, l)
	return l
}

// load has callers use p until the time is over.
func (t *trial) load(p *process, callers int) {
	for range callers {
		c := &caller{trial: t, process: p, Log: t.log(p), random: rand.New(rand.NewPCG(rand.Uint64(), 0))}
		t.wg.Go(func() { c.run(t.ctx, c.act) })
	}
}

// each calls f about n times until the load ends, and notes how long the processes took to
// answer again after each.
func (t *trial) each(n int, f func(round int) error) error {
	deadline, _ := t.ctx.Deadline()
	gap := min(max(time.Until(deadline)/time.Duration(n+1), 1500*time.Millisecond), 10*time.Second)
	for round := 0; ; round++ {
		if time.Until(deadline) < 2*gap && round > 0 {
			<-t.ctx.Done()
			return nil
		}
		time.Sleep(gap)
		t.result.mark()
		if err := f(round); err != nil {
			return fmt.Errorf("round %d: %w", round, err)
		}
		t.recover()
	}
}

// recover waits until a call that begins now has succeeded in each process.
func (t *trial) recover() {
	begin := time.Now()
	since := history.Now()
	for _, p := range t.processes {
		for p.succeeded.Load() < since {
			if t.ctx.Err() != nil {
				return // nobody asks any more
			}
			if time.Since(begin) > 40*time.Second {
				t.failf("process %d (%s) does not recover: %v", p.number, p.driver, p.lastError.Load())
				return
			}
			time.Sleep(time.Millisecond)
		}
	}
	t.result.recovered(time.Since(begin))
}

// wiped notes that all entries went at some time from start on.
func (t *trial) wiped(l *history.Log, start int64) {
	t.emptied.Store(true)
	l.Removed(history.AllKeys, start, nil)
}

// end ends the load, judges the answers, closes all and looks for what is left.
func (t *trial) end(cancel func()) {
	cancel()
	t.wg.Wait()
	for _, p := range t.processes {
		p.checkCounter(t)
		t.result.addStats(p.cache.Stats())
		db := p.cache.DB()
		if err := p.cache.Close(); err != nil && !isConnection(err) {
			t.failf("Close: %v", err)
		}
		await(5*time.Second, func() bool { return db.Stats().OpenConnections == 0 })
		t.result.Connections += db.Stats().OpenConnections
	}
	if t.stopPooler != nil {
		t.stopPooler()
	}
	if t.admin != nil {
		var sessions int
		await(10*time.Second, func() bool {
			err := t.admin.QueryRow(`SELECT count(*) FROM pg_stat_activity WHERE usename = $1`, t.user).Scan(&sessions)
			return err == nil && sessions == 0
		})
		if t.result.Sessions = sessions; sessions > 0 {
			t.failf("%d sessions are left", sessions)
		}
	}
	for i := len(t.cleanups) - 1; i >= 0; i-- {
		t.cleanups[i]()
	}
	var events []history.Event
	for _, l := range t.logs {
		events = append(events, l.Events...)
	}
	for i, e := range events {
		for _, v := range t.vain {
			if e.Kind == history.Removed && e.Key != history.AllKeys && e.Start < v[1] && e.End > v[0] {
				events[i].Certain = false
			}
		}
	}
	verdict := history.Check(append(events, t.result.events...))
	t.result.Hits += int64(verdict.Hits)
	t.result.Misses += int64(verdict.Misses)
	t.result.Wrong += int64(len(verdict.Wrong))
	for _, w := range verdict.Wrong[:min(len(verdict.Wrong), 5)] {
		t.failf("wrong: %s", w)
	}
	t.logs, t.result.events = nil, nil
}

// await polls until cond holds, or for d.
func await(d time.Duration, cond func() bool) bool {
	for deadline := time.Now().Add(d); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

// kind is a word for an error, for the table.
func (t *trial) kind(err error) string {
	for _, s := range []struct {
		is   error
		name string
	}{
		{context.DeadlineExceeded, "deadline"}, {context.Canceled, "cancelled"},
		{fastpgcache.ErrNotSetUp, "not set up"}, {fastpgcache.ErrNotPermitted, "not permitted"}, {fastpgcache.ErrClosed, "closed"},
	} {
		if errors.Is(err, s.is) {
			return s.name
		}
	}
	var e interface{ SQLState() string }
	if errors.As(err, &e) && e.SQLState() != "" {
		return e.SQLState()
	}
	if isConnection(err) {
		return "connection"
	}
	text := err.Error()
	for part, kind := range map[string]string{"the driver panicked": "driver panicked", "the triggers that feed": "triggers disabled", "Scan error": "another's columns", "sql: expected": "another's columns"} {
		if strings.Contains(text, part) {
			return kind
		}
	}
	return fmt.Sprintf("%.60s", strings.TrimPrefix(text, "fastpgcache: "))
}
