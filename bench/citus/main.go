// Command citus measures merged calls through Citus: on a schema of a worker through the
// coordinator and through the worker itself, beside a schema of that worker which Citus does
// not know, in turns within each round.
//
//	cd bench && go run ./citus -bin DIRECTORY
//
// The directory has the programs of a PostgreSQL that has Citus: see scripts/citus.
package main

import (
	"context"
	"database/sql"
	"errors"
	"flag"
	"fmt"
	"strings"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/bench/internal/peers"
	"github.com/fastpgcache/fastpgcache/bench/internal/program"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

var (
	bin     = flag.String("bin", "", "directory of the programs of a PostgreSQL that has Citus")
	callers = flag.String("callers", "64,256", "concurrent callers")
	rounds  = flag.Int("rounds", 5, "rounds")
	length  = flag.Duration("length", time.Second, "length of one measurement")
	keys    = flag.Int("keys", 100_000, "entries")
)

func main() {
	flag.Parse()
	program.Main(run)
}

func run(ctx context.Context) (err error) {
	callers, err := program.Numbers(*callers)
	if err != nil {
		return err
	}
	nodes, err := pgtest.StartCitus(ctx, *bin, 1)
	defer func() {
		for _, n := range nodes {
			err = errors.Join(err, n.Stop())
		}
	}()
	if err != nil {
		return err
	}
	coordinator, worker := nodes[0].DSN("postgres"), nodes[1].DSN("postgres")
	for _, schema := range []struct {
		dsn    string
		config fastpgcache.SetupConfig
	}{{worker + ` options=-ccitus.enable_ddl_propagation=off`, fastpgcache.SetupConfig{Schema: "own"}}, {coordinator, fastpgcache.SetupConfig{Schema: "kept", Citus: true}}} {
		if err := fill(ctx, schema.dsn, schema.config); err != nil {
			return err
		}
	}
	var systems []*peers.System
	for _, way := range []struct {
		dsn    string
		config fastpgcache.Config
	}{
		{worker, fastpgcache.Config{Schema: "own"}},
		{worker, fastpgcache.Config{Schema: "kept", Citus: true}},
		{coordinator, fastpgcache.Config{Schema: "kept", Citus: true}},
	} {
		c, err := fastpgcache.Open(way.dsn, way.config)
		if err != nil {
			return err
		}
		sys := peers.Of(c)
		defer sys.Close()
		systems = append(systems, sys)
	}
	fmt.Printf("%d entries of 100 bytes, %d rounds of %v, × what the node gives by itself\n\n", *keys, *rounds, *length)
	fmt.Println("| | callers | the node by itself, a second | through the worker | through the coordinator |")
	fmt.Println("|---|--:|--:|--:|--:|")
	for _, op := range []string{"get", "set"} {
		for _, n := range callers {
			samples := make([][]peers.Sample, len(systems))
			for range *rounds {
				for i, sys := range systems {
					s, err := peers.Measure(ctx, sys, peers.Load{Op: op, Callers: n, Keys: *keys, Value: value, WarmUp: *length / 2, Length: *length})
					if err != nil {
						return err
					}
					samples[i] = append(samples[i], s)
				}
			}
			fmt.Printf("| %s | %d | %.0f | %.2f | %.2f |\n", strings.ToUpper(op), n, peers.Median(samples[0], peers.Rate),
				peers.Ratio(samples[1], samples[0], peers.Rate), peers.Ratio(samples[2], samples[0], peers.Rate))
		}
	}
	return nil
}

var value = strings.Repeat("x", 100)

// fill sets a schema up and stores the entries in it.
func fill(ctx context.Context, dsn string, config fastpgcache.SetupConfig) error {
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		return err
	}
	defer db.Close()
	if err := fastpgcache.Setup(ctx, db, config); err != nil {
		return err
	}
	_, err = db.ExecContext(ctx, fmt.Sprintf(`INSERT INTO %s.cache (user_id, key, value) SELECT 'postgres', 'key:' || i, $1::text FROM generate_series(0, $2::integer) i`, config.Schema), value, *keys-1)
	if err == nil {
		_, err = db.ExecContext(ctx, `VACUUM ANALYZE `+config.Schema+`.cache`)
	}
	return err
}
