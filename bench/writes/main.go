// Command writes measures what a statement that writes costs PostgreSQL, so that two
// versions of this module can be compared: see scripts/compare-writes.
//
//	cd bench && go run ./writes            # a line for each case: its name, and µs of the server's CPU per key
//	cd bench && go run ./writes old new    # files of such lines, from several runs in turn
package main

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	_ "github.com/lib/pq"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

var (
	perCase      = flag.Duration("duration", time.Second, "how long each case runs in each round")
	rounds       = flag.Int("rounds", 3, "how often")
	instructions = flag.Bool("instructions", false, "count the server's instructions, in thousands, which no other load changes, and not its time; needs valgrind")
	staleness    = flag.Duration("staleness", 0, "MaxStaleness of the writer")
)

func main() {
	flag.Parse()
	run := measure
	if flag.NArg() == 2 {
		run = compare
	}
	if err := run(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "writes:", err)
		os.Exit(1)
	}
}

func measure(ctx context.Context) (err error) {
	cfg := pgtest.Config{Settings: map[string]string{"shared_buffers": "512MB", "autovacuum": "off"}}
	if *instructions {
		if cfg.BinDir, err = counted(); err != nil {
			return err
		}
		defer os.RemoveAll(cfg.BinDir)
	}
	server, err := pgtest.Start(ctx, cfg)
	if err != nil {
		return err
	}
	defer server.Stop()
	admin, err := sql.Open("postgres", server.DSN("postgres"))
	if err != nil {
		return err
	}
	defer admin.Close()
	if err := fastpgcache.Setup(ctx, admin, fastpgcache.SetupConfig{}); err != nil {
		return err
	}
	if _, err := admin.Exec(`CREATE ROLE app LOGIN`); err != nil {
		return err
	}
	w := &writer{dsn: strings.Replace(server.DSN("postgres"), "user=postgres", "user=app", 1)}
	if err := w.open(); err != nil {
		return err
	}
	defer func() { w.Close() }()
	items := make(map[string]any, existing)
	for i := range existing {
		items["k"+strconv.Itoa(i)] = value
	}
	if err := w.SetMany(ctx, items, time.Hour); err != nil {
		return err
	}
	for range *rounds {
		for _, n := range []int{1, 20, 128} {
			for _, kind := range []string{"existing", "new"} {
				if _, err := admin.Exec(`VACUUM cache`); err != nil {
					return err
				}
				cost := w.time
				if *instructions {
					cost = w.count
				}
				each, err := cost(ctx, cfg.BinDir, kind, n)
				if err != nil {
					return err
				}
				fmt.Printf("%s %d\t%.3f\n", kind, n, each)
			}
		}
	}
	return nil
}

const existing = 50_000

var value = strings.Repeat("v", 100)

// writer has one connection.
type writer struct {
	dsn string
	*fastpgcache.Cache
	pid  int
	next int
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

// time returns the µs of the server's CPU that a key takes.
func (w *writer) time(ctx context.Context, _, kind string, n int) (float64, error) {
	before, keys := cpu(w.pid), 0
	for begin := time.Now(); time.Since(begin) < *perCase; keys += n {
		if err := w.write(ctx, kind, n); err != nil {
			return 0, err
		}
	}
	return float64(cpu(w.pid)-before) / 1e3 / float64(keys), nil
}

// count returns how many thousands of its own instructions the server spends on a key: what a
// session that stores thrice as many takes more than another, both too short to trim the feed,
// which goes by the clock, and that goes fast beside a server that is counted.
func (w *writer) count(ctx context.Context, dir, kind string, n int) (float64, error) {
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
			counts, _ := os.ReadFile(filepath.Join(dir, strconv.Itoa(w.pid)))
			_, total, _ := strings.Cut(string(counts), "\ntotals: ")
			totals[i], _ = strconv.ParseFloat(strings.TrimSpace(total), 64)
		}
	}
	return (totals[1] - totals[0]) / 1e3 / float64(2*statements*n), nil
}

// counted returns a directory of PostgreSQL's binaries whose server runs under callgrind, and
// leaves there what that counted of each session. It looks for them by itself, since the
// version that is compared with cannot be asked for them.
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

// compare prints the lower quartiles of two files.
func compare(context.Context) error {
	var all [2]map[string][]float64
	var cases []string
	for i := range all {
		all[i] = map[string][]float64{}
		f, err := os.Open(flag.Arg(i))
		if err != nil {
			return err
		}
		defer f.Close()
		for s := bufio.NewScanner(f); s.Scan(); {
			name, number, _ := strings.Cut(s.Text(), "\t")
			µs, err := strconv.ParseFloat(number, 64)
			if err != nil {
				return err
			}
			if i == 0 && all[0][name] == nil {
				cases = append(cases, name)
			}
			all[i][name] = append(all[i][name], µs)
		}
	}
	fmt.Println("| keys | before, a key | now | ratio |\n|--|--:|--:|--:|")
	for _, name := range cases {
		a, b := quartile(all[0][name]), quartile(all[1][name])
		fmt.Printf("| %s | %.2f | %.2f | %.3f |\n", name, a, b, b/a)
	}
	return nil
}

func quartile(all []float64) float64 {
	slices.Sort(all)
	return all[len(all)/4]
}
