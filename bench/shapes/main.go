// Command shapes measures what PostgreSQL itself pays, in CPU time per key, for ways
// to write the statements that merged calls become: what no client can go below.
//
// Each runs prepared, on one session of a throwaway server, with 1, 20 and 128 random
// keys among 100,000, in turn within each round. Linux only: it reads schedstat.
package main

import (
	"context"
	"database/sql"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/lib/pq"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/bench/internal/program"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

const entries = 100_000

// shape is a statement over the arrays of keys, values, value_bytes and TTLs, or
// of keys alone.
type shape struct {
	name   string
	writes bool
	text   string
}

const (
	live   = `user_id = current_user AND key = k.key AND (expires_at IS NULL OR expires_at > statement_timestamp())`
	arrays = `unnest($1::text[], $2::text[], $3::bytea[], $4::bigint[]) e(key, value, value_bytes, ttl)`
	expiry = `statement_timestamp() + e.ttl::float8 * interval '1 microsecond'`
	insert = `INSERT INTO cache (user_id, key, value, value_bytes, expires_at, mark) SELECT current_user, e.key, e.value, e.value_bytes, e.expires_at, txid_current() FROM e`
	set    = `INSERT INTO cache (user_id, key, value, value_bytes, expires_at, mark) SELECT current_user, e.key, e.value, e.value_bytes, ` + expiry + `, txid_current() FROM ` + arrays
	feed   = `change AS (INSERT INTO cache_change (user_id, keys) VALUES (current_user, $1::text[]))`
	given  = `WITH e AS MATERIALIZED (SELECT key, value, value_bytes, ` + expiry + ` AS expires_at FROM ` + arrays + `)`
	upsert = ` ON CONFLICT (user_id, key) DO UPDATE SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at, mark = excluded.mark`
)

var shapes = []shape{
	{"GET: LATERAL … LIMIT 1, with its key (the library's)", false, `SELECT c.key, c.value, c.value_bytes FROM unnest($1::text[]) k(key), LATERAL (
		SELECT key, CASE WHEN octet_length(value) <= 32768 THEN value END AS value,
			CASE WHEN octet_length(value_bytes) <= 32768 THEN value_bytes END AS value_bytes
		FROM cache WHERE ` + live + ` LIMIT 1) c`},
	{"GET: the same, with the end of its life (of local answers)", false, `SELECT c.key, c.value, c.value_bytes, date_part('epoch'::text, statement_timestamp()), c.expires
		FROM unnest($1::text[]) k(key), LATERAL (
		SELECT key, CASE WHEN octet_length(value) <= 32768 THEN value END AS value,
			CASE WHEN octet_length(value_bytes) <= 32768 THEN value_bytes END AS value_bytes,
			coalesce(date_part('epoch'::text, expires_at), 'Infinity'::float8) AS expires
		FROM cache WHERE ` + live + ` LIMIT 1) c`},
	{"GET: the library's, the array a query", false, `SELECT c.key, c.value, c.value_bytes FROM unnest((SELECT $1::text[])) k(key), LATERAL (
		SELECT key, CASE WHEN octet_length(value) <= 32768 THEN value END AS value,
			CASE WHEN octet_length(value_bytes) <= 32768 THEN value_bytes END AS value_bytes
		FROM cache WHERE ` + live + ` LIMIT 1) c`},
	{"GET: by ordinal", false, `SELECT k.n, c.value, c.value_bytes FROM unnest($1::text[]) WITH ORDINALITY k(key, n), LATERAL (
		SELECT value, value_bytes FROM cache WHERE ` + live + ` LIMIT 1) c`},
	{"GET: in order, misses too", false, `SELECT c.value, c.value_bytes FROM unnest($1::text[]) k(key) LEFT JOIN LATERAL (
		SELECT value, value_bytes FROM cache WHERE ` + live + ` LIMIT 1) c ON true`},
	{"GET: a subselect", false, `SELECT (SELECT value FROM cache WHERE ` + live + `) FROM unnest($1::text[]) k(key)`},
	{"GET: = ANY", false, `SELECT key, value, value_bytes FROM cache
		WHERE user_id = current_user AND key = ANY ($1::text[]) AND (expires_at IS NULL OR expires_at > statement_timestamp())`},
	{"GET: one row of arrays", false, `SELECT array_agg(c.key), array_agg(c.value), array_agg(c.value_bytes) FROM unnest($1::text[]) k(key), LATERAL (
		SELECT key, value, value_bytes FROM cache WHERE ` + live + ` LIMIT 1) c`},
	{"GET: the rows found, but nothing returned", false, `SELECT FROM unnest($1::text[]) k(key), LATERAL (
		SELECT value FROM cache WHERE ` + live + ` LIMIT 1) c`},
	{"the keys, given back", false, `SELECT k.key FROM unnest($1::text[]) k(key)`},
	{"SET: INSERT … ON CONFLICT DO UPDATE, fed (the library's)", true, `WITH ` + feed + `, stored AS (` + set + upsert +
		`) SELECT txid_current(), date_part('epoch'::text, statement_timestamp())`},
	{"SET: the same, nothing returned", true, `WITH ` + feed + ` ` + set + upsert},
	{"SET: the same, not fed", true, set + upsert},
	{"SET: the same, fed by the triggers", true, `INSERT INTO cache (user_id, key, value, value_bytes, expires_at)
		SELECT current_user, e.key, e.value, e.value_bytes, ` + expiry + ` FROM ` + arrays +
		` ON CONFLICT (user_id, key) DO UPDATE SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at`},
	{"SET: UPDATE, then INSERT what is new", true, given + `, u AS (
		UPDATE cache c SET value = e.value, value_bytes = e.value_bytes, expires_at = e.expires_at, mark = txid_current() FROM e
		WHERE c.user_id = current_user AND c.key = e.key RETURNING c.key) ` + insert + ` WHERE key NOT IN (SELECT key FROM u)` + upsert},
	{"SET: UPDATE alone", true, given + ` UPDATE cache c SET value = e.value, value_bytes = e.value_bytes, expires_at = e.expires_at, mark = txid_current() FROM e
		WHERE c.user_id = current_user AND c.key = e.key`},
	{"the arrays, counted", true, `SELECT count(*) FROM ` + arrays},
}

func main() {
	rounds := flag.Int("rounds", 7, "rounds")
	only := flag.String("only", "", "measure shapes whose names have this")
	flag.Parse()
	shapes = slices.DeleteFunc(shapes, func(s shape) bool { return !strings.Contains(s.name, *only) })
	program.Main(func(ctx context.Context) error { return run(ctx, *rounds) })
}

func run(ctx context.Context, rounds int) error {
	server, err := pgtest.Start(ctx, pgtest.Config{Settings: map[string]string{"shared_buffers": "1GB"}})
	if err != nil {
		return err
	}
	defer server.Stop()
	owner, err := sql.Open("postgres", server.DSN("postgres"))
	if err != nil {
		return err
	}
	defer owner.Close()
	if err := fastpgcache.Setup(ctx, owner, fastpgcache.SetupConfig{}); err != nil {
		return err
	}
	if _, err := owner.ExecContext(ctx, `CREATE ROLE app LOGIN`); err != nil {
		return err
	}
	db, err := sql.Open("postgres", server.DSN("postgres", "user=app", "binary_parameters=yes")) // confined, as most are
	if err != nil {
		return err
	}
	defer db.Close()
	db.SetMaxOpenConns(1)
	if _, err := db.ExecContext(ctx, `INSERT INTO cache (key, value, expires_at)
		SELECT 'key:' || i, repeat('x', 100), now() + interval '1 h' FROM generate_series(1, $1) i`, entries); err != nil {
		return err
	}
	if _, err := owner.ExecContext(ctx, `VACUUM ANALYZE cache`); err != nil {
		return err
	}
	var pid int
	if err := db.QueryRowContext(ctx, `SELECT pg_backend_pid()`).Scan(&pid); err != nil {
		return err
	}
	sizes := []int{1, 20, 128}
	stmts := make([]*sql.Stmt, len(shapes))
	took := make([][][]float64, len(shapes)) // µs of the server's CPU per key, by shape and size
	for i, s := range shapes {
		if stmts[i], err = db.PrepareContext(ctx, s.text); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		took[i] = make([][]float64, len(sizes))
	}
	for round := range rounds + 1 {
		for i, s := range shapes {
			for j, n := range sizes {
				per, err := measure(ctx, stmts[i], s, n, pid)
				if err != nil {
					return fmt.Errorf("%s: %w", s.name, err)
				}
				if round > 0 { // the first warms up
					took[i][j] = append(took[i][j], per)
				}
			}
		}
	}
	fmt.Printf("%d rounds, medians; µs of the server's CPU per key.\n\n| statement | 1 key | 20 keys | 128 keys |\n|---|---|---|---|\n", rounds)
	for i, s := range shapes {
		fmt.Printf("| %s |", s.name)
		for _, all := range took[i] {
			slices.Sort(all)
			fmt.Printf(" %.2f |", all[len(all)/2])
		}
		fmt.Println()
	}
	return nil
}

// measure runs a statement about n keys again and again.
func measure(ctx context.Context, stmt *sql.Stmt, s shape, n, pid int) (perKey float64, err error) {
	value := strings.Repeat("x", 100)
	before, err := cpu(pid)
	if err != nil {
		return 0, err
	}
	keys := 0
	for start := time.Now(); time.Since(start) < 200*time.Millisecond; {
		batch := make([]string, n)
		for i := range batch {
			batch[i] = "key:" + strconv.Itoa(1+rand.IntN(entries))
		}
		slices.Sort(batch)
		batch = slices.Compact(batch) // an upsert takes each key once
		args := []any{pq.Array(batch)}
		if s.writes {
			values, ttls := make([]string, len(batch)), make([]int64, len(batch))
			for i := range batch {
				values[i], ttls[i] = value, time.Hour.Microseconds()
			}
			args = append(args, pq.Array(values), pq.Array([][]byte{}), pq.Array(ttls))
		}
		rows, err := stmt.QueryContext(ctx, args...)
		if err != nil {
			return 0, err
		}
		for rows.Next() {
		}
		if err := rows.Err(); err != nil {
			return 0, err
		}
		keys += len(batch)
	}
	after, err := cpu(pid)
	return float64(after-before) / float64(keys) / 1e3, err
}

// cpu is the nanoseconds that a process has run.
func cpu(pid int) (ns int64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/schedstat", pid))
	if err != nil {
		return 0, err
	}
	_, err = fmt.Sscan(string(b), &ns)
	return ns, err
}
