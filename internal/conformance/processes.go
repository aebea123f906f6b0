package conformance

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

// RunProcesses runs over d what several processes do to one cache. They are the
// test's own program, and run TestChildProcess, which must call Child.
func RunProcesses(t *testing.T, d Driver) {
	for _, test := range []test{
		{name: "AStampedeLoadsOnce", run: testStampede},
		{name: "OfAThousandAddsOneSucceeds", run: testAddAcrossProcesses},
		{name: "IncrementLosesNoCount", run: testIncrementAcrossProcesses},
		{name: "TheLeaseOfAKilledProcessIsTakenOver", run: testKilledLoader},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			test.run(newSuite(t, d, variant{}), t)
		})
	}
}

// A child is a process that does a job.
type child struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

// report is what a child tells at its end.
type report struct {
	Loads, Done int64
	Values      []string
	Took        time.Duration
}

const childEnv = "FASTPGCACHE_CHILD"

// start starts a child, which is ready but waits for in to be closed.
func (s *suite) start(t *testing.T, job, dsn string) child {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestChildProcess$")
	cmd.Env = append(os.Environ(), childEnv+"="+job, childEnv+"_DRIVER="+s.driver.Name, childEnv+"_DSN="+dsn)
	cmd.Stderr = os.Stderr
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	c := child{cmd, in, bufio.NewScanner(out)}
	c.wantLine(t, "ready")
	return c
}

func (c child) wantLine(t *testing.T, want string) {
	t.Helper()
	if !c.out.Scan() || c.out.Text() != want {
		t.Fatalf("a child said %q, %v, want %q", c.out.Text(), c.out.Err(), want)
	}
}

// together has n children do a job, which they begin at once.
func (s *suite) together(t *testing.T, n int, job, dsn string) (all []report) {
	t.Helper()
	var children []child
	for range n {
		children = append(children, s.start(t, job, dsn))
	}
	for _, c := range children {
		c.in.Close()
	}
	for _, c := range children {
		var r report
		c.out.Scan()
		if err := json.Unmarshal(c.out.Bytes(), &r); err != nil {
			t.Fatalf("a child said %q", c.out.Text())
		}
		for c.out.Scan() {
		}
		if err := c.cmd.Wait(); err != nil {
			t.Fatal(err)
		}
		all = append(all, r)
	}
	return all
}

// Child does, in a process that RunProcesses started over one of drivers, its job.
func Child(t *testing.T, drivers ...Driver) {
	job := os.Getenv(childEnv)
	if job == "" {
		t.Skip("no child process")
	}
	d := drivers[slices.IndexFunc(drivers, func(d Driver) bool { return d.Name == os.Getenv(childEnv+"_DRIVER") })]
	c := (&suite{driver: d}).open(t, os.Getenv(childEnv+"_DSN"))
	c.DB().SetMaxOpenConns(4)
	fmt.Println("ready")
	io.ReadAll(os.Stdin)
	start := time.Now()
	r := do(t, c, job)
	r.Loads, r.Took = c.Stats().Loads, time.Since(start)
	json.NewEncoder(os.Stdout).Encode(r)
}

func do(t *testing.T, c *fastpgcache.Cache, job string) (r report) {
	ctx := t.Context()
	var mu sync.Mutex // guards r
	var wg sync.WaitGroup
	callers := func(n int, f func() error) {
		for range n {
			wg.Go(func() {
				if err := f(); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	switch job {
	case "stampede":
		callers(250, func() error {
			var got string
			err := c.GetOrSet(ctx, "cold", &got, time.Minute, func(context.Context) (any, error) {
				time.Sleep(200 * time.Millisecond)
				return fmt.Sprint("loaded by ", os.Getpid()), nil
			})
			mu.Lock()
			defer mu.Unlock()
			if !slices.Contains(r.Values, got) {
				r.Values = append(r.Values, got)
			}
			return err
		})
	case "add":
		callers(250, func() error {
			added, err := c.Add(ctx, "once", os.Getpid(), time.Minute)
			mu.Lock()
			defer mu.Unlock()
			if added {
				r.Done++
			}
			return err
		})
	case "increment":
		callers(50, func() error {
			for range 100 {
				if _, err := c.Increment(ctx, "counter", 1, time.Minute); err != nil {
					return err
				}
			}
			return nil
		})
	case "load for ever":
		c.GetOrSet(ctx, "held", nil, time.Minute, func(ctx context.Context) (any, error) {
			fmt.Println("loading")
			<-ctx.Done()
			return nil, ctx.Err()
		})
	}
	return r
}

// A thousand callers in 4 processes, with 4 connections each, on a cold key that
// takes 200 ms to load.
func testStampede(s *suite, t *testing.T) {
	dsn, _ := s.role(t)
	var loads int64
	values := map[string]bool{}
	for _, r := range s.together(t, 4, "stampede", dsn) {
		loads += r.Loads
		for _, v := range r.Values {
			values[v] = true
		}
		t.Logf("a process with %d loads took %v", r.Loads, r.Took)
	}
	if loads != 1 || len(values) != 1 {
		t.Errorf("got %d loads and %d values, want 1 and 1", loads, len(values))
	}
}

func testAddAcrossProcesses(s *suite, t *testing.T) {
	dsn, _ := s.role(t)
	c := s.open(t, dsn)
	mustSet(t, c, "once", "v", time.Hour)
	s.expire(t, c, "once")
	var added int64
	for _, r := range s.together(t, 4, "add", dsn) {
		added += r.Done
	}
	if added != 1 {
		t.Errorf("%d callers added it, want 1", added)
	}
}

func testIncrementAcrossProcesses(s *suite, t *testing.T) {
	dsn, _ := s.role(t)
	c := s.open(t, dsn)
	mustSet(t, c, "counter", 77, time.Hour)
	s.expire(t, c, "counter")
	s.together(t, 2, "increment", dsn) // 50 callers of 100 each
	wantHit(t, c, "counter", "10000")
}

func testKilledLoader(s *suite, t *testing.T) {
	dsn, _ := s.role(t)
	c := s.open(t, dsn)
	holder := s.start(t, "load for ever", dsn)
	holder.in.Close()
	holder.wantLine(t, "loading")
	if err := holder.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	holder.cmd.Wait()
	start := time.Now()
	var got string
	err := c.GetOrSet(bounded(t), "held", &got, time.Minute, func(context.Context) (any, error) { return "taken over", nil })
	if took := time.Since(start); err != nil || got != "taken over" || took > 15*time.Second {
		t.Errorf("got %q, %v, after %v", got, err, took)
	}
	wantHit(t, c, "held", "taken over")
}
