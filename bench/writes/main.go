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
	"flag"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	_ "github.com/lib/pq"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

var (
	perCase   = flag.Duration("duration", time.Second, "how long each case runs in each round")
	rounds    = flag.Int("rounds", 3, "how often")
	staleness = flag.Duration("staleness", 0, "MaxStaleness of the writer")
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
	server, err := pgtest.Start(ctx, pgtest.Config{Settings: map[string]string{"shared_buffers": "512MB", "autovacuum": "off"}})
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
	c, err := fastpgcache.Open(strings.Replace(server.DSN("postgres"), "user=postgres", "user=app", 1), fastpgcache.Config{DisableCoalescing: true, MaxStaleness: *staleness})
	if err != nil {
		return err
	}
	defer c.Close()
	c.DB().SetMaxOpenConns(1)
	const existing = 50_000
	value := strings.Repeat("v", 100)
	items := make(map[string]any, existing)
	for i := range existing {
		items["k"+strconv.Itoa(i)] = value
	}
	if err := c.SetMany(ctx, items, time.Hour); err != nil {
		return err
	}
	var pid int
	if err := c.DB().QueryRow(`SELECT pg_backend_pid()`).Scan(&pid); err != nil {
		return err
	}
	next := 0
	for range *rounds {
		for _, n := range []int{1, 20, 128} {
			for _, kind := range []string{"existing", "new"} {
				if _, err := admin.Exec(`VACUUM cache`); err != nil {
					return err
				}
				before, keys := cpu(pid), 0
				for begin := time.Now(); time.Since(begin) < *perCase; keys += n {
					items := make(map[string]any, n)
					for range n {
						key := "k" + strconv.Itoa(next*7919%existing)
						if kind == "new" {
							key = "n" + strconv.Itoa(next)
						}
						next++
						items[key] = value
						if n == 1 {
							if err := c.Set(ctx, key, value, time.Hour); err != nil {
								return err
							}
						}
					}
					if n > 1 {
						if err := c.SetMany(ctx, items, time.Hour); err != nil {
							return err
						}
					}
				}
				fmt.Printf("%s %d\t%.3f\n", kind, n, float64(cpu(pid)-before)/1e3/float64(keys))
			}
		}
	}
	return nil
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
	fmt.Println("| keys | before, µs a key | now | ratio |\n|--|--:|--:|--:|")
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
