package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/history"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// childEnv holds the job of a process that we started.
const childEnv = "FASTPGCACHE_PROVE_JOB"

// job is what a child is to do.
type job struct {
	Kind, Driver, DSN string
	Process           int
	Staleness         time.Duration
	Seconds           float64
}

// note is a line that a child writes: what a caller has done since the last.
type note struct {
	Number int64
	Events []history.Event
	Sample *sample
	Error  string
}

// startChild starts a process of its own, which does j.
func startChild(j job) (*exec.Cmd, *bufio.Scanner, error) {
	b, err := json.Marshal(j)
	if err != nil {
		return nil, nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), childEnv+"="+string(b))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, nil, err
	}
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<24)
	return cmd, lines, cmd.Start()
}

// child is main in such a process.
func child() {
	var j job
	if err := json.Unmarshal([]byte(os.Getenv(childEnv)), &j); err != nil {
		panic(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(j.Seconds*float64(time.Second)))
	defer cancel()
	t := &trial{ctx: ctx, result: &result{begin: time.Now(), Errors: map[string]int64{}}, patience: 3 * time.Second, pause: 5 * time.Millisecond}
	p, err := t.open(j.Driver, j.DSN, fastpgcache.Config{MaxStaleness: j.Staleness, CleanupInterval: time.Second})
	if err != nil {
		panic(err)
	}
	p.number = j.Process
	var mu sync.Mutex
	out := json.NewEncoder(os.Stdout)
	write := func(n note) {
		mu.Lock()
		defer mu.Unlock()
		if out.Encode(n) != nil {
			os.Exit(1) // the parent is gone
		}
	}
	if j.Kind == "soak" {
		soakChild(t, p, write)
		return
	}
	for i := range 3 {
		c := &caller{trial: t, process: p, random: rand.New(rand.NewPCG(rand.Uint64(), 0)),
			Log: &history.Log{Number: int64(j.Process*10 + i), Process: j.Process, Staleness: j.Staleness}}
		t.wg.Go(func() {
			c.run(ctx, func(ctx context.Context) error {
				err := c.act(ctx)
				n := note{Number: c.Number, Events: c.Events}
				if err != nil {
					n.Error = t.kind(err)
				}
				write(n)
				c.Events = nil
				return err
			})
		})
	}
	t.wg.Wait()
	p.cache.Close()
}

// client is a child that uses the cache, as its parent sees it.
type client struct {
	cmd     *exec.Cmd
	process int
	begun   int64
	done    chan struct{} // closed when all that it wrote has been read

	values map[int64]int64 // by number, the last
	times  map[int64]int64
	events []history.Event
}

func (t *trial) client(number int) (*client, error) {
	deadline, _ := t.ctx.Deadline()
	driver := []string{"pq", "pgx"}[number%2]
	c := &client{process: 1000 + number, begun: history.Now(), done: make(chan struct{}), values: map[int64]int64{}, times: map[int64]int64{}}
	dsn := t.dsn(fmt.Sprint("application_name=client-", c.process))
	cmd, lines, err := startChild(job{"client", driver, dsn, c.process, 30 * time.Millisecond, time.Until(deadline).Seconds()})
	if err != nil {
		return nil, err
	}
	c.cmd = cmd
	go func() {
		defer close(c.done)
		for lines.Scan() {
			var n note
			if json.Unmarshal(lines.Bytes(), &n) != nil {
				continue // it was killed in the middle of a line
			}
			t.result.called(0, nil)
			if n.Error != "" {
				t.result.failed1(n.Error)
			}
			for _, e := range n.Events {
				if e.Kind == history.Stored {
					c.values[n.Number] = max(c.values[n.Number], e.Value)
				}
			}
			c.times[n.Number] = history.Now() - int64(time.Second) // it may have lain in the pipe
			c.events = append(c.events, n.Events...)
		}
	}()
	return c, nil
}

// kill kills c and takes over its history, with what it may have done in its last moments.
func (t *trial) kill(c *client) error {
	c.cmd.Process.Kill()
	c.cmd.Wait()
	<-c.done
	var sessions int
	if !await(20*time.Second, func() bool {
		err := t.admin.QueryRow(`SELECT count(*) FROM pg_stat_activity WHERE application_name = $1`, fmt.Sprint("client-", c.process)).Scan(&sessions)
		return err == nil && sessions == 0
	}) {
		return fmt.Errorf("%d sessions of a killed process are left", sessions)
	}
	end := history.Now()
	t.result.events = append(t.result.events, c.events...)
	for i := range int64(3) {
		number := int64(c.process)*10 + i
		start := max(c.times[number], c.begun)
		t.result.events = append(t.result.events, history.Lost(number, c.values[number], start, end)...)
	}
	return nil
}

func clients(t *trial) error {
	if err := t.start(pgtest.Config{}); err != nil {
		return err
	}
	if err := t.usual(t.dsn()); err != nil {
		return err
	}
	t.emptied.Store(true)
	all := make([]*client, 4)
	next := 0
	defer func() {
		for _, c := range all {
			if c != nil {
				c.cmd.Process.Signal(syscall.SIGCONT)
				if err := t.kill(c); err != nil {
					t.failf("%v", err)
				}
			}
		}
	}()
	for i := range all {
		var err error
		if all[i], err = t.client(next); err != nil {
			return err
		}
		next++
	}
	return t.each(60, func(round int) (err error) {
		i := round % len(all)
		if round%2 == 0 {
			if err := t.kill(all[i]); err != nil {
				return err
			}
			all[i], err = t.client(next)
			next++
			return err
		}
		all[i].cmd.Process.Signal(syscall.SIGSTOP)
		for range 5 { // so that the feed is trimmed up to a moment ago
			time.Sleep(200 * time.Millisecond)
			err = errors.Join(err, t.exec(`UPDATE cache_epoch SET taken = ARRAY(SELECT t - interval '1 hour' FROM unnest(taken) t)`, `SELECT cache_trim('app', 100000)`))
		}
		all[i].cmd.Process.Signal(syscall.SIGCONT)
		return err
	})
}

// sample is of one minute of the soak.
type sample struct {
	Minute          float64
	Operations      int64
	Errors          int64
	Wrong           int
	Answers         int
	P50, P99        time.Duration
	Heap            uint64
	Goroutines      int
	Connections     int
	Table, Index    int64 // bytes, as all below
	Feed, FeedIndex int64
	Rows            int64
}

// soakChild uses p for as long as it is told, with entries that expire, and writes a sample
// each minute, or tenth of the time.
func soakChild(t *trial, p *process, write func(note)) {
	deadline, _ := t.ctx.Deadline()
	step := min(time.Minute, time.Until(deadline)/10)
	t.pause = 8 * time.Millisecond
	begin := time.Now()
	for time.Until(deadline) > step/2 {
		var mu sync.Mutex
		var took []time.Duration
		ctx, cancel := context.WithTimeout(t.ctx, step-100*time.Millisecond)
		for range 6 { // entries of 100 to 4,000 bytes that live for 1 to 30 seconds
			random := rand.New(rand.NewPCG(rand.Uint64(), 0))
			t.wg.Go(func() {
				for ctx.Err() == nil {
					start := time.Now()
					key := fmt.Sprint("churn ", random.IntN(200_000))
					var err error
					if random.IntN(2) == 0 {
						err = p.cache.Set(t.ctx, key, string(make([]byte, 100+random.IntN(3900)*random.IntN(2))), time.Duration(1000+random.IntN(29_000))*time.Millisecond)
					} else {
						_, err = p.cache.Get(t.ctx, key, nil)
					}
					t.result.called(time.Since(start), err)
					if err != nil && t.ctx.Err() == nil {
						t.result.failed1(t.kind(err))
					}
					mu.Lock()
					took = append(took, time.Since(start))
					mu.Unlock()
					time.Sleep(time.Duration(random.Int64N(int64(2 * t.pause))))
				}
			})
		}
		s := t.segment(p, 4, step-100*time.Millisecond, func(error) {})
		t.wg.Wait()
		cancel()
		// What the judged callers stored has no TTL.
		if _, err := p.cache.DeletePrefix(context.Background(), "key "); err != nil {
			t.result.failed1(t.kind(err))
		}
		slices.Sort(took)
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		operations := t.result.Operations
		write(note{Error: t.result.errors(), Sample: &sample{Minute: time.Since(begin).Minutes(), Operations: operations, Errors: t.errorCount(), Wrong: len(s.Wrong), Answers: s.Hits + s.Misses,
			P50: took[len(took)/2], P99: took[len(took)*99/100], Heap: m.HeapAlloc, Goroutines: runtime.NumGoroutine(), Connections: p.cache.DB().Stats().OpenConnections}})
	}
	p.cache.Close()
}
