// Command growth measures what a cache loses when it grows: GET and SET by 1, 64 and 256
// callers over random keys, beside the plain prepared statement and Redis with as many.
//
//	go run ./growth -keys 10000,1000000,10000000
//
// It starts a PostgreSQL and a Redis for each number of keys, all at once, and measures
// every system at every size in turn within each round, so that the machine's moods fall
// on all alike. It prints a Markdown table, with each rate beside the one of the first size.
package main

import (
	"context"
	"database/sql"
	"errors"
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	_ "github.com/lib/pq"
	"github.com/redis/go-redis/v9"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/bench/internal/peers"
	"github.com/fastpgcache/fastpgcache/bench/internal/program"
)

var (
	sizes   = flag.String("keys", "10000,1000000,10000000", "how many keys there are; the first is what the others are compared with")
	callers = flag.String("callers", "1,64,256", "concurrent callers")
	systems = flag.String("systems", "fastpgcache-pq,prepared-pq,go-redis", "what to measure")
	ops     = flag.String("ops", "get,set", "operations: get, set (existing keys, with TTL)")
	bytes   = flag.Int("bytes", 100, "bytes of a value")
	rounds  = flag.Int("rounds", 3, "rounds")
	length  = flag.Duration("length", time.Second, "length of one measurement")
	buffers = flag.String("shared-buffers", "4GB", "shared_buffers of PostgreSQL")
	more    = flag.String("settings", "", "further settings of PostgreSQL: name=value, with commas between")
	ready   = flag.String("ready", "", "a file to make once all is filled; measuring waits until it is gone")
)

func main() {
	flag.Parse()
	program.Main(run)
}

// place is a number of keys, and the servers that have them.
type place struct {
	keys    int
	servers *peers.Servers
	opened  map[string]*peers.System
	samples map[string][]peers.Sample // by system, operation and callers
}

func run(ctx context.Context) (err error) {
	settings := map[string]string{"shared_buffers": *buffers, "max_wal_size": "4GB"}
	for pair := range strings.SplitSeq(*more, ",") {
		if name, value, ok := strings.Cut(pair, "="); ok {
			settings[name] = value
		}
	}
	var places []*place
	for text := range strings.SplitSeq(*sizes, ",") {
		n, err := strconv.Atoi(text)
		if err != nil {
			return err
		}
		p := &place{keys: n, opened: map[string]*peers.System{}, samples: map[string][]peers.Sample{}}
		if p.servers, err = peers.StartWith(ctx, settings); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, p.servers.Stop()) }()
		if err := p.fill(ctx); err != nil {
			return err
		}
		for name := range strings.SplitSeq(*systems, ",") {
			if p.opened[name], err = p.servers.Open(ctx, name, 10); err != nil {
				return err
			}
			defer p.opened[name].Close()
		}
		fmt.Fprintf(os.Stderr, "filled %d keys\n", n)
		places = append(places, p)
	}
	if *ready != "" {
		if err := os.WriteFile(*ready, nil, 0o600); err != nil {
			return err
		}
		for _, err := os.Stat(*ready); err == nil && ctx.Err() == nil; _, err = os.Stat(*ready) {
			time.Sleep(100 * time.Millisecond)
		}
	}
	for round := range *rounds {
		for op := range strings.SplitSeq(*ops, ",") {
			for count := range strings.SplitSeq(*callers, ",") {
				n, err := strconv.Atoi(count)
				if err != nil {
					return err
				}
				for i := range places {
					p := places[(i+round)%len(places)]
					for name, sys := range p.opened {
						l := peers.Load{Op: op, Callers: n, Keys: p.keys, Value: strings.Repeat("x", *bytes), WarmUp: *length / 2, Length: *length}
						sample, err := peers.Measure(ctx, sys, l)
						if err != nil {
							return fmt.Errorf("%s, %+v: %w", name, l, err)
						}
						p.samples[name+op+count] = append(p.samples[name+op+count], sample)
					}
				}
			}
		}
	}
	print(places)
	return nil
}

func print(places []*place) {
	fmt.Printf("%d rounds of %v, medians, shared_buffers %s %s\n\n| op | callers | system |", *rounds, *length, *buffers, *more)
	for i, p := range places {
		fmt.Printf(" %d keys |", p.keys)
		if i > 0 {
			fmt.Print(" × | × by CPU |")
		}
	}
	fmt.Printf("\n|---|--:|---|%s\n", strings.Repeat("--:|", 3*len(places)-2))
	for op := range strings.SplitSeq(*ops, ",") {
		for count := range strings.SplitSeq(*callers, ",") {
			for name := range strings.SplitSeq(*systems, ",") {
				fmt.Printf("| %s | %s | %s |", op, count, name)
				first := places[0].samples[name+op+count]
				for i, p := range places {
					s := p.samples[name+op+count]
					fmt.Printf(" %.0f |", peers.Median(s, peers.Rate))
					if i > 0 {
						fmt.Printf(" %.2f | %.2f |", peers.Ratio(s, first, peers.Rate), peers.Ratio(s, first, perCPU))
					}
				}
				fmt.Println()
			}
		}
	}
}

// perCPU is how many operations a second of the server's processors makes.
func perCPU(s peers.Sample) float64 { return s.PerSecond / s.Server }

// fill stores the keys in both servers. The client would take as long as all the rest.
func (p *place) fill(ctx context.Context) error {
	db, err := sql.Open("postgres", p.servers.DSN())
	if err != nil {
		return err
	}
	defer db.Close()
	if err := fastpgcache.Setup(ctx, db, fastpgcache.SetupConfig{}); err != nil {
		return err
	}
	// In the order of the table, which is not that of the keys, as in life.
	for _, statement := range []string{
		fmt.Sprintf(`INSERT INTO cache (user_id, key, value, expires_at, mark)
			SELECT current_user, 'key:' || i, repeat('x', %d), now() + interval '1 day', txid_current()
			FROM generate_series(0, %d) i ORDER BY hashint4(i)`, *bytes, p.keys-1),
		`VACUUM (ANALYZE, FREEZE) cache`,
		`CREATE EXTENSION IF NOT EXISTS pg_prewarm`,
		`SELECT pg_prewarm('cache_pkey')`,
		`SELECT pg_prewarm('cache')`,
	} {
		if _, err := db.ExecContext(ctx, statement); err != nil {
			return fmt.Errorf("%s: %w", statement, err)
		}
	}
	if !strings.Contains(*systems, "redis") && !strings.Contains(*systems, "rueidis") {
		return nil
	}
	r := redis.NewClient(&redis.Options{Addr: p.servers.Redis, ReadTimeout: -1, WriteTimeout: -1})
	defer r.Close()
	value := strings.Repeat("x", *bytes)
	for i := 0; i < p.keys; i += 10_000 {
		pipe := r.Pipeline()
		for j := i; j < min(i+10_000, p.keys); j++ {
			pipe.Set(ctx, "key:"+strconv.Itoa(j), value, 24*time.Hour)
		}
		if _, err := pipe.Exec(ctx); err != nil {
			return err
		}
	}
	return nil
}
