// Command cleanup measures a walk that removes expired entries, for a login that owns few
// of them, for one that owns nearly all, and for the owner of the table: by keys, by
// pages, and as cache_walk itself chooses.
//
//	go run ./cleanup -rows 1000000
//
// It runs on a throwaway PostgreSQL (FASTPGCACHE_TEST_BINDIR picks another one) and
// prints a Markdown table.
package main

import (
	"context"
	"database/sql"
	"flag"
	"fmt"
	"time"

	"github.com/fastpgcache/fastpgcache/bench/internal/program"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

var (
	rows = flag.Int("rows", 1_000_000, "entries in the table")
	few  = flag.Int("few", 1000, "entries of the login that owns few")
)

func main() {
	flag.Parse()
	program.Main(run)
}

func run(ctx context.Context) error { return program.WithServer(ctx, pgtest.Config{}, measure) }

func measure(ctx context.Context, server *pgtest.Server, admin *sql.DB) error {
	dsn := server.DSN("postgres")
	for _, statement := range []string{
		`CREATE ROLE few LOGIN PASSWORD 'few'`, `CREATE ROLE most LOGIN PASSWORD 'most'`,
		fmt.Sprintf(`INSERT INTO cache (user_id, key, value, expires_at, mark)
			SELECT CASE WHEN g %% %d = 0 THEN 'few' ELSE 'most' END, 'k' || g, repeat('v', 100), now() + interval '1 day', txid_current()
			FROM generate_series(1, %d) g ORDER BY md5(g::text)`, max(1, *rows / *few), *rows),
		`VACUUM ANALYZE cache`, `CHECKPOINT`,
	} {
		if _, err := admin.ExecContext(ctx, statement); err != nil {
			return fmt.Errorf("%s: %w", statement, err)
		}
	}
	fmt.Printf("PostgreSQL %d.%d, %d entries that live, %d of them few's\n\n", server.Version()/10000, server.Version()%10000, *rows, *few)
	fmt.Println("| login | begun by | bites | took | longest bite |")
	fmt.Println("|---|---|--:|--:|--:|")
	for _, login := range []string{"few", "most", "postgres"} {
		db, err := sql.Open("postgres", pgtest.WithUser(dsn, login))
		if err != nil {
			return err
		}
		defer db.Close()
		db.SetMaxOpenConns(1)
		for _, begin := range [][2]string{{"its own choice", ""}, {"pages", "b0"}} {
			var best time.Duration
			var bites int
			var longest time.Duration
			for range 3 {
				took, n, slowest, err := walk(ctx, db, begin[1])
				if err != nil {
					return err
				}
				if best == 0 || took < best {
					best, bites, longest = took, n, slowest
				}
			}
			fmt.Printf("| %s | %s | %d | %.1f ms | %.1f ms |\n", login, begin[0], bites, ms(best), ms(longest))
		}
	}
	return nil
}

// walk cleans up once.
func walk(ctx context.Context, db *sql.DB, position string) (took time.Duration, bites int, longest time.Duration, err error) {
	start := time.Now()
	for next := (sql.NullString{String: position, Valid: true}); next.Valid; bites++ {
		var removed int
		begin := time.Now()
		if err := db.QueryRowContext(ctx, `SELECT removed, next_position FROM cache_walk($1::text, NULL::interval)`, next.String).Scan(&removed, &next); err != nil {
			return 0, 0, 0, err
		}
		longest = max(longest, time.Since(begin))
	}
	return time.Since(start), bites, longest, nil
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
