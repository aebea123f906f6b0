// Command before measures what operations cost, so that two versions of this module can
// be compared: see scripts/compare. It is one file and finds what it needs by itself, for it
// is copied into the other version, which may lack whatever it would share here.
//
//	cd bench && go run ./before              # a line for each case, in µs
//	cd bench && go run ./before -base OTHER  # beside this program, built of another version, slice by slice in turn
package main

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	_ "github.com/lib/pq"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

var (
	slice        = flag.Duration("slice", 100*time.Millisecond, "how long a case runs before it is the other version's turn")
	rounds       = flag.Int("rounds", 30, "slices of each case")
	instructions = flag.Bool("instructions", false, "count the server's instructions, in thousands, which no other load changes, and not its time; without callers; needs valgrind, and 1 round will do")
	staleness    = flag.Duration("staleness", 0, "MaxStaleness of the writer")
	base         = flag.String("base", "", "this program, built of the version to compare with")
	served       = flag.Bool("serve", false, "run the cases that are named on standard input")
)

func main() {
	flag.Parse()
	if err := measure(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "before:", err)
		os.Exit(1)
	}
}

func measure(ctx context.Context) error {
	w, err := start(ctx)
	if err != nil {
		return err
	}
	defer w.stop()
	if *served {
		for s := bufio.NewScanner(os.Stdin); s.Scan(); {
			each, err := w.cost(ctx, s.Text())
			if err != nil {
				return err
			}
			fmt.Println(each)
		}
		return nil
	}
	var before func(kind string) (float64, error)
	if *base != "" {
		other := exec.Command(*base, "-serve", "-slice", slice.String(), "-staleness", staleness.String(), "-instructions="+strconv.FormatBool(*instructions))
		other.Stderr = os.Stderr
		in, _ := other.StdinPipe()
		out, _ := other.StdoutPipe()
		if err := other.Start(); err != nil {
			return err
		}
		defer func() { in.Close(); other.Wait() }()
		lines := bufio.NewScanner(out)
		before = func(kind string) (float64, error) {
			fmt.Fprintln(in, kind)
			if !lines.Scan() {
				return 0, errors.New("the other version has ended")
			}
			return strconv.ParseFloat(lines.Text(), 64)
		}
		fmt.Println("| case | before | now | ratio, quartiles |\n|---|--:|--:|--:|")
	}
	kinds := slices.Clone(statements)
	if !*instructions {
		kinds = append(kinds, callers...)
	}
	for _, kind := range kinds {
		var was, is, ratios []float64
		for i := range 2 * *rounds {
			mine := i%4 == 0 || i%4 == 3 // each goes first in every other round
			if !mine && before == nil {
				continue
			}
			cost := before
			if mine {
				cost = func(kind string) (float64, error) { return w.cost(ctx, kind) }
			}
			each, err := cost(kind)
			if err != nil {
				return err
			}
			if mine {
				is = append(is, each)
			} else {
				was = append(was, each)
			}
		}
		for i := range was {
			ratios = append(ratios, is[i]/was[i])
		}
		if before == nil {
			fmt.Printf("%s\t%.2f\n", kind, quantile(is, 2))
		} else {
			fmt.Printf("| %s | %.2f | %.2f | %.3f, %.3f to %.3f |\n", kind, quantile(was, 2), quantile(is, 2),
				quantile(ratios, 2), quantile(ratios, 1), quantile(ratios, 3))
		}
	}
	return nil
}

// quantile is the middle, or another quarter.
func quantile(all []float64, quarter int) float64 {
	slices.Sort(all)
	return all[min(len(all)*quarter/4, len(all)-1)]
}

const existing = 20_000

// The server's CPU per key, of statements that store so many keys, which are there or are new;
// and the time per operation of so many callers of a cache with ten connections, by key.
var (
	statements = []string{"existing 1", "new 1", "existing 20", "new 20", "existing 128", "new 128"}
	callers    = []string{"Get 1", "Get 8", "Get 64", "Get 256", "Set 1", "Set 8", "Set 64", "Set 256"}
)

var value = strings.Repeat("v", 100)

// writer has one connection, and a cache for many callers.
type writer struct {
	server *pgtest.Server
	dir    string // where counts are left
	dsn    string
	*fastpgcache.Cache
	pid    int
	next   int
	shared *fastpgcache.Cache
}

// start begins with keys that were all written several times, so that their pages are as they
// are in use: full, with as much of what is dead as updates leave.
func start(ctx context.Context) (_ *writer, err error) {
	w := &writer{}
	defer func() {
		if err != nil {
			w.stop()
		}
	}()
	if *instructions {
		if w.dir, err = counted(); err != nil {
			return nil, err
		}
	}
	w.server, err = pgtest.Start(ctx, pgtest.Config{BinDir: w.dir, Settings: map[string]string{"shared_buffers": "512MB", "autovacuum": "off"}})
	if err != nil {
		return nil, err
	}
	admin, err := sql.Open("postgres", w.server.DSN("postgres"))
	if err != nil {
		return nil, err
	}
	defer admin.Close()
	if err := fastpgcache.Setup(ctx, admin, fastpgcache.SetupConfig{}); err != nil {
		return nil, err
	}
	if _, err := admin.Exec(`CREATE ROLE app LOGIN`); err != nil {
		return nil, err
	}
	w.dsn = strings.Replace(w.server.DSN("postgres"), "user=postgres", "user=app", 1)
	if err := w.open(); err != nil {
		return nil, err
	}
	w.shared, err = fastpgcache.Open(w.dsn, fastpgcache.Config{MaxStaleness: *staleness})
	if err != nil {
		return nil, err
	}
	w.shared.DB().SetMaxOpenConns(10)
	w.shared.DB().SetMaxIdleConns(10)
	for range 3 {
		items := make(map[string]any, 1000)
		for i := range existing {
			if items["k"+strconv.Itoa(i*7919%existing)] = value; len(items) == 1000 {
				if err := w.SetMany(ctx, items, time.Hour); err != nil {
					return nil, err
				}
				clear(items)
			}
		}
	}
	return w, nil
}

func (w *writer) stop() {
	if w.Cache != nil {
		w.Close()
	}
	if w.shared != nil {
		w.shared.Close()
	}
	if w.server != nil {
		w.server.Stop()
	}
	if w.dir != "" {
		os.RemoveAll(w.dir)
	}
}

func (w *writer) open() (err error) {
	w.Cache, err = fastpgcache.Open(w.dsn, fastpgcache.Config{DisableCoalescing: true, MaxStaleness: *staleness})
	if err != nil {
		return err
	}
	w.DB().SetMaxOpenConns(1)
	return w.DB().QueryRow(`SELECT pg_backend_pid()`).Scan(&w.pid)
}

// write stores n keys, which are there or are not.
func (w *writer) write(ctx context.Context, kind string, n int) error {
	items := make(map[string]any, n)
	for range n {
		key := "k" + strconv.Itoa(w.next*7919%existing)
		if kind == "new" {
			key = "n" + strconv.Itoa(w.next)
		}
		w.next++
		items[key] = value
		if n == 1 {
			return w.Set(ctx, key, value, time.Hour)
		}
	}
	return w.SetMany(ctx, items, time.Hour)
}

func (w *writer) cost(ctx context.Context, name string) (float64, error) {
	kind, number, _ := strings.Cut(name, " ")
	n, err := strconv.Atoi(number)
	if err != nil {
		return 0, err
	}
	switch {
	case kind == "Get" || kind == "Set":
		return w.callers(ctx, kind, n)
	case *instructions:
		return w.count(ctx, kind, n)
	}
	return w.time(ctx, kind, n)
}

// time returns the µs of the server's CPU that a key takes.
func (w *writer) time(ctx context.Context, kind string, n int) (float64, error) {
	before, keys := cpu(w.pid), 0
	for begin := time.Now(); time.Since(begin) < *slice; keys += n {
		if err := w.write(ctx, kind, n); err != nil {
			return 0, err
		}
	}
	return float64(cpu(w.pid)-before) / 1e3 / float64(keys), nil
}

// callers returns the µs that an operation takes all of them, of one key each.
func (w *writer) callers(ctx context.Context, kind string, n int) (float64, error) {
	var wg sync.WaitGroup
	var done atomic.Int64
	failed := make(chan error, n)
	begin := time.Now()
	for range n {
		wg.Go(func() {
			for time.Since(begin) < *slice {
				key, held := "k"+strconv.Itoa(rand.IntN(existing)), ""
				var err error
				if kind == "Set" {
					err = w.shared.Set(ctx, key, value, time.Hour)
				} else {
					_, err = w.shared.Get(ctx, key, &held)
				}
				if err != nil {
					failed <- err
					return
				}
				done.Add(1)
			}
		})
	}
	wg.Wait()
	close(failed)
	return float64(time.Since(begin).Nanoseconds()) / 1e3 / float64(done.Load()), <-failed
}

// count returns how many thousands of its own instructions the server spends on a key: what a
// session that stores thrice as many takes more than another, both too short to trim the feed,
// which goes by the clock, and that goes fast beside a server that is counted.
func (w *writer) count(ctx context.Context, kind string, n int) (float64, error) {
	const plans = 6 // are made anew, then PostgreSQL keeps one
	statements := 100/n + 2
	var totals [2]float64
	for i, times := range []int{1, 3} {
		w.Close()
		if err := w.open(); err != nil {
			return 0, err
		}
		for range plans + times*statements {
			if err := w.write(ctx, kind, n); err != nil {
				return 0, err
			}
		}
		w.Close() // the session writes its count as it ends
		for begin := time.Now(); totals[i] == 0; time.Sleep(10 * time.Millisecond) {
			if time.Since(begin) > time.Minute {
				return 0, errors.New("the session left no count of its instructions")
			}
			counts, _ := os.ReadFile(filepath.Join(w.dir, strconv.Itoa(w.pid)))
			_, total, _ := strings.Cut(string(counts), "\ntotals: ")
			totals[i], _ = strconv.ParseFloat(strings.TrimSpace(total), 64)
		}
	}
	return (totals[1] - totals[0]) / 1e3 / float64(2*statements*n), nil
}

// counted returns a directory of PostgreSQL's binaries whose server runs under callgrind, and
// leaves there what that counted of each session.
func counted() (dir string, err error) {
	found, err := exec.Command("sh", "-c", `ls -d "${FASTPGCACHE_TEST_BINDIR:-/none}" /usr/lib/postgresql/*/bin 2>/dev/null | head -n 1`).Output()
	if err != nil {
		return "", err
	}
	bin := strings.TrimSpace(string(found))
	if dir, err = os.MkdirTemp("", "counted"); err != nil {
		return "", err
	}
	if err := errors.Join(os.Chmod(dir, 0o777), os.Symlink(filepath.Join(bin, "initdb"), filepath.Join(dir, "initdb"))); err != nil {
		return "", err
	}
	script := fmt.Sprintf("#!/bin/sh\nexec valgrind -q --tool=callgrind --callgrind-out-file=%s/%%p %s/postgres \"$@\"\n", dir, bin)
	return dir, os.WriteFile(filepath.Join(dir, "postgres"), []byte(script), 0o755)
}

// cpu is what Linux's scheduler says a process has run, in nanoseconds.
func cpu(pid int) int64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/schedstat", pid))
	ran, _, _ := strings.Cut(string(b), " ")
	ns, _ := strconv.ParseInt(ran, 10, 64)
	return ns
}
