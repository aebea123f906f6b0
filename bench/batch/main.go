// Command batch measures SetMany against a loop of Set and against the ways to write
// an upsert of many rows by hand, over lib/pq and pgx, in turn within each round.
package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"flag"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib"
	"github.com/lib/pq"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/bench/internal/program"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

const (
	chunk  = 1000
	upsert = ` ON CONFLICT (user_id, key) DO UPDATE SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at`
)

func main() {
	rounds := flag.Int("rounds", 3, "rounds")
	items := flag.Int("items", 100_000, "new items of 100 bytes")
	flag.Parse()
	program.Main(func(ctx context.Context) error { return run(ctx, *rounds, *items) })
}

// way is one way to store items, and how many it should be tried with.
type way struct {
	name  string
	share int // it is given 1/share of the items
	store func(ctx context.Context, db *sql.DB, c *fastpgcache.Cache, keys []string, value string) error
}

// input is what SetMany is given: made beforehand, as the others' keys are.
var input map[string]any

var ways = []way{
	{"SetMany", 1, func(ctx context.Context, _ *sql.DB, c *fastpgcache.Cache, keys []string, value string) error {
		return c.SetMany(ctx, input, time.Hour)
	}},
	{"loop of Set", 20, func(ctx context.Context, _ *sql.DB, c *fastpgcache.Cache, keys []string, value string) error {
		for _, key := range keys {
			if err := c.Set(ctx, key, value, time.Hour); err != nil {
				return err
			}
		}
		return nil
	}},
	{"unnest of text arrays", 1, chunked(func(ctx context.Context, tx *sql.Tx, keys []string, value string) error {
		values := make([]string, len(keys))
		for i := range values {
			values[i] = value
		}
		_, err := tx.ExecContext(ctx, `INSERT INTO cache (user_id, key, value, expires_at)
			SELECT current_user, k, v, now() + interval '1 h' FROM unnest($1::text[], $2::text[]) u(k, v)`+upsert, pq.Array(keys), pq.Array(values))
		return err
	})},
	{"unnest of slices", 1, chunked(func(ctx context.Context, tx *sql.Tx, keys []string, value string) error {
		values := make([]string, len(keys))
		for i := range values {
			values[i] = value
		}
		_, err := tx.ExecContext(ctx, `INSERT INTO cache (user_id, key, value, expires_at)
			SELECT current_user, k, v, now() + interval '1 h' FROM unnest($1::text[], $2::text[]) u(k, v)`+upsert, keys, values)
		return err
	})},
	{"multi-row VALUES", 1, chunked(func(ctx context.Context, tx *sql.Tx, keys []string, value string) error {
		var b strings.Builder
		args := make([]any, 0, 2*len(keys))
		for i, key := range keys {
			if i > 0 {
				b.WriteByte(',')
			}
			fmt.Fprintf(&b, "(current_user,$%d,$%d,now() + interval '1 h')", 2*i+1, 2*i+2)
			args = append(args, key, value)
		}
		_, err := tx.ExecContext(ctx, `INSERT INTO cache (user_id, key, value, expires_at) VALUES `+b.String()+upsert, args...)
		return err
	})},
	{"JSON", 1, chunked(func(ctx context.Context, tx *sql.Tx, keys []string, value string) error {
		type item struct{ K, V string }
		items := make([]item, len(keys))
		for i, key := range keys {
			items[i] = item{key, value}
		}
		b, err := json.Marshal(items)
		if err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, `INSERT INTO cache (user_id, key, value, expires_at)
			SELECT current_user, "K", "V", now() + interval '1 h' FROM json_to_recordset($1::json) AS x("K" text, "V" text)`+upsert, string(b))
		return err
	})},
	{"COPY into a staging table", 1, func(ctx context.Context, db *sql.DB, _ *fastpgcache.Cache, keys []string, value string) error {
		tx, err := db.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		defer tx.Rollback()
		if _, err := tx.ExecContext(ctx, `CREATE TEMP TABLE staging (k text, v text) ON COMMIT DROP`); err != nil {
			return err
		}
		stmt, err := tx.PrepareContext(ctx, `COPY staging (k, v) FROM STDIN`)
		if err != nil {
			return err
		}
		for _, key := range keys {
			if _, err := stmt.ExecContext(ctx, key, value); err != nil {
				return err
			}
		}
		if _, err := stmt.ExecContext(ctx); err != nil {
			return err
		}
		if err := stmt.Close(); err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, `INSERT INTO cache (user_id, key, value, expires_at)
			SELECT current_user, k, v, now() + interval '1 h' FROM staging`+upsert); err != nil {
			return err
		}
		return tx.Commit()
	}},
}

// chunked runs f on chunks of keys in one transaction.
func chunked(f func(ctx context.Context, tx *sql.Tx, keys []string, value string) error) func(context.Context, *sql.DB, *fastpgcache.Cache, []string, string) error {
	return func(ctx context.Context, db *sql.DB, _ *fastpgcache.Cache, keys []string, value string) error {
		tx, err := db.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		defer tx.Rollback()
		for part := range slices.Chunk(keys, chunk) {
			if err := f(ctx, tx, part, value); err != nil {
				return err
			}
		}
		return tx.Commit()
	}
}

func run(ctx context.Context, rounds, items int) error {
	server, err := pgtest.Start(ctx, pgtest.Config{})
	if err != nil {
		return err
	}
	defer server.Stop()
	fmt.Printf("%d rounds, medians, %d new items of 100 bytes by one caller.\n\n| driver | way | items/s | × SetMany |\n|---|---|---|---|\n", rounds, items)
	value := strings.Repeat("x", 100)
	input = make(map[string]any, items)
	for i := range items {
		input["key:"+strconv.Itoa(i)] = value
	}
	for _, driver := range []string{"postgres", "pgx"} {
		dsn := server.DSN("postgres")
		if driver == "postgres" {
			dsn += " binary_parameters=yes"
		}
		db, err := sql.Open(driver, dsn)
		if err != nil {
			return err
		}
		defer db.Close()
		cache, err := fastpgcache.New(db, fastpgcache.Config{})
		if err != nil {
			return err
		}
		defer cache.Close()
		rates := map[string][]float64{}
		for range rounds {
			for _, w := range ways {
				if driver == "pgx" && strings.HasPrefix(w.name, "COPY") || driver == "postgres" && strings.HasSuffix(w.name, "slices") {
					continue // not with this driver
				}
				if err := fastpgcache.Setup(ctx, db, fastpgcache.SetupConfig{Force: true}); err != nil {
					return err
				}
				keys := make([]string, items/w.share)
				for i := range keys {
					keys[i] = "key:" + strconv.Itoa(i)
				}
				slices.Sort(keys)
				begin := time.Now()
				if err := w.store(ctx, db, cache, keys, value); err != nil {
					return fmt.Errorf("%s, %s: %w", driver, w.name, err)
				}
				rates[w.name] = append(rates[w.name], float64(len(keys))/time.Since(begin).Seconds())
			}
		}
		for _, w := range ways {
			if rates[w.name] == nil {
				continue
			}
			ratios := make([]float64, rounds)
			for i := range ratios {
				ratios[i] = rates[w.name][i] / rates["SetMany"][i]
			}
			slices.Sort(ratios)
			slices.Sort(rates[w.name])
			fmt.Printf("| %s | %s | %.0f | %.2f |\n", driver, w.name, rates[w.name][rounds/2], ratios[rounds/2])
		}
	}
	return nil
}
