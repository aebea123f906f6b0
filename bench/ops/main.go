// Ops measures what each operation costs 64 callers over the statement that it
// stands for, prepared by hand and with the same rule for expiry. The two run in
// turn, in blocks on the same server and over the same pool, so that what else the
// machine does falls on both; the medians of the blocks are compared. Calls are not
// merged, but for those of the last column.
package main

import (
	"context"
	"database/sql"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"sync"
	"text/tabwriter"
	"time"

	_ "github.com/lib/pq"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/bench/internal/program"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

const (
	callers = 64
	entries = 8192 // of the block: each call has a key of its own
)

// operation is measured against its statement. before makes the entries that a
// block's calls find.
type operation struct {
	name   string
	hand   string
	args   func(key string) []any
	call   func(ctx context.Context, c *fastpgcache.Cache, key string) error
	before string
	once   bool // one call is the whole block
	repeat bool // the statement, by hand too, runs until it finds no row
}

const (
	live  = `(expires_at IS NULL OR expires_at > statement_timestamp())`
	empty = `TRUNCATE cache`
	fill  = empty + `; INSERT INTO cache (user_id, key, value) SELECT current_user, 'key:' || i, '1' FROM generate_series(1, 8192) i`
)

func keyOnly(key string) []any { return []any{key} }

var operations = []operation{
	{
		name: "Get", before: fill, args: keyOnly,
		hand: `SELECT value, value_bytes FROM cache WHERE user_id = current_user AND key = $1 AND ` + live + ` LIMIT 1`,
		call: func(ctx context.Context, c *fastpgcache.Cache, key string) error {
			_, err := c.Get(ctx, key, nil)
			return err
		},
	}, {
		name: "GetOrSet, a hit", before: fill, args: keyOnly,
		hand: `SELECT value, value_bytes FROM cache WHERE user_id = current_user AND key = $1 AND ` + live + ` LIMIT 1`,
		call: func(ctx context.Context, c *fastpgcache.Cache, key string) error {
			return c.GetOrSet(ctx, key, nil, 0, func(context.Context) (any, error) { return nil, errors.New("a miss") })
		},
	}, {
		name: "Set", before: fill, args: func(key string) []any { return []any{key, "value", int64(60)} },
		hand: `INSERT INTO cache (user_id, key, value, expires_at)
			VALUES (current_user, $1, $2, statement_timestamp() + $3 * interval '1 second')
			ON CONFLICT (user_id, key) DO UPDATE SET value = excluded.value, value_bytes = NULL, expires_at = excluded.expires_at`,
		call: func(ctx context.Context, c *fastpgcache.Cache, key string) error {
			return c.Set(ctx, key, "value", time.Minute)
		},
	}, {
		name: "Add", before: empty, args: func(key string) []any { return []any{key, "value", int64(60)} },
		hand: `INSERT INTO cache AS c (user_id, key, value, expires_at)
			VALUES (current_user, $1, $2, statement_timestamp() + $3 * interval '1 second')
			ON CONFLICT (user_id, key) DO UPDATE SET value = excluded.value, value_bytes = NULL, expires_at = excluded.expires_at
			WHERE c.expires_at <= statement_timestamp()`,
		call: func(ctx context.Context, c *fastpgcache.Cache, key string) error {
			_, err := c.Add(ctx, key, "value", time.Minute)
			return err
		},
	}, {
		name: "Increment", before: fill, args: func(key string) []any { return []any{key, int64(1), int64(60)} },
		hand: `INSERT INTO cache AS c (user_id, key, value, expires_at)
			VALUES (current_user, $1, $2::bigint::text, statement_timestamp() + $3 * interval '1 second')
			ON CONFLICT (user_id, key) DO UPDATE SET
			value = CASE WHEN c.expires_at <= statement_timestamp() THEN excluded.value ELSE (c.value::bigint + excluded.value::bigint)::text END,
			expires_at = CASE WHEN c.expires_at <= statement_timestamp() THEN excluded.expires_at ELSE c.expires_at END
			RETURNING value`,
		call: func(ctx context.Context, c *fastpgcache.Cache, key string) error {
			_, err := c.Increment(ctx, key, 1, time.Minute)
			return err
		},
	}, {
		name: "Take", before: fill, args: keyOnly,
		hand: `DELETE FROM cache WHERE user_id = current_user AND key = $1 AND ` + live + ` RETURNING value, value_bytes`,
		call: func(ctx context.Context, c *fastpgcache.Cache, key string) error {
			_, _, err := c.Take(ctx, key)
			return err
		},
	}, {
		name: "Delete", before: fill, args: keyOnly,
		hand: `DELETE FROM cache WHERE user_id = current_user AND key = $1 AND ` + live,
		call: func(ctx context.Context, c *fastpgcache.Cache, key string) error {
			_, err := c.Delete(ctx, key)
			return err
		},
	}, {
		name: "Keys, 8,192 of them", before: fill, args: func(string) []any { return nil }, once: true,
		hand: `SELECT key FROM cache WHERE user_id = current_user AND key LIKE 'key:%' AND ` + live + ` ORDER BY user_id, key`,
		call: func(ctx context.Context, c *fastpgcache.Cache, _ string) error {
			for _, err := range c.Keys(ctx, "key:") {
				if err != nil {
					return err
				}
			}
			return nil
		},
	}, {
		// In the order of the keys, as concurrent batches must not deadlock.
		name: "Clear, 8,192 entries", before: fill, args: func(string) []any { return nil }, once: true, repeat: true,
		hand: `DELETE FROM cache WHERE ctid = ANY (ARRAY(
			SELECT ctid FROM cache WHERE user_id = current_user ORDER BY user_id, key LIMIT 1000 FOR UPDATE)) RETURNING ` + live,
		call: clearAll,
	}, {
		name: "  by hand in any order", before: fill, args: func(string) []any { return nil }, once: true, repeat: true,
		hand: `DELETE FROM cache WHERE ctid = ANY (ARRAY(SELECT ctid FROM cache WHERE user_id = current_user LIMIT 1000)) RETURNING ` + live,
		call: clearAll,
	},
}

func clearAll(ctx context.Context, c *fastpgcache.Cache, _ string) error {
	_, err := c.Clear(ctx)
	return err
}

func main() {
	blocks := flag.Int("blocks", 15, "how many blocks of each")
	flag.Parse()
	program.Main(func(ctx context.Context) error { return run(ctx, *blocks) })
}

func run(ctx context.Context, blocks int) error {
	server, err := pgtest.Start(ctx, pgtest.Config{})
	if err != nil {
		return err
	}
	defer server.Stop()
	db, err := sql.Open("postgres", server.DSN("postgres", "binary_parameters=yes")) // as fastpgcache.Open sets it
	if err != nil {
		return err
	}
	defer db.Close()
	db.SetMaxOpenConns(10)
	db.SetMaxIdleConns(10)
	if err := fastpgcache.Setup(ctx, db, fastpgcache.SetupConfig{}); err != nil {
		return err
	}
	plain, err := fastpgcache.New(db, fastpgcache.Config{DisableCoalescing: true})
	if err != nil {
		return err
	}
	defer plain.Close()
	merging, err := fastpgcache.New(db, fastpgcache.Config{})
	if err != nil {
		return err
	}
	defer merging.Close()

	out := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(out, "µs/call at 64 callers\tby hand\tcache\tratio\tmerging\tratio\t")
	for _, op := range operations {
		stmt, err := db.PrepareContext(ctx, op.hand)
		if err != nil {
			return fmt.Errorf("%s: %w", op.name, err)
		}
		calls := []func(key string) error{
			func(key string) error {
				for {
					n, err := drain(stmt.QueryContext(ctx, op.args(key)...))
					if n == 0 || err != nil || !op.repeat {
						return err
					}
				}
			},
			func(key string) error { return op.call(ctx, plain, key) },
			func(key string) error { return op.call(ctx, merging, key) },
		}
		times := make([][]time.Duration, len(calls))
		for i := range blocks + 1 {
			for j := range calls {
				j := (i + j) % len(calls)
				if _, err := db.ExecContext(ctx, op.before); err != nil {
					return err
				}
				if _, err := db.ExecContext(ctx, `VACUUM ANALYZE cache`); err != nil {
					return err
				}
				took, err := block(op, calls[j])
				if err != nil {
					return fmt.Errorf("%s: %w", op.name, err)
				}
				if i > 0 { // the first warms up
					times[j] = append(times[j], took)
				}
			}
		}
		stmt.Close()
		hand, one, many := median(times[0]), median(times[1]), median(times[2])
		fmt.Fprintf(out, "%s\t%.1f\t%.1f\t%.2f\t%.1f\t%.2f\t\n", op.name, hand, one, one/hand, many, many/hand)
	}
	return out.Flush()
}

// drain reads the rows as the cache does, and counts them.
func drain(rows *sql.Rows, err error) (n int, _ error) {
	if err != nil {
		return 0, err
	}
	defer rows.Close()
	columns, err := rows.Columns()
	if err != nil {
		return 0, err
	}
	values := make([]any, len(columns))
	for i := range values {
		values[i] = new(any)
	}
	for ; rows.Next(); n++ {
		if err := rows.Scan(values...); err != nil {
			return n, err
		}
	}
	return n, rows.Err()
}

// block returns the time per call.
func block(op operation, call func(key string) error) (time.Duration, error) {
	if op.once {
		start := time.Now()
		err := call("")
		return time.Since(start), err
	}
	errs := make(chan error, callers)
	var wg sync.WaitGroup
	start := time.Now()
	for caller := range callers {
		wg.Go(func() {
			for i := caller; i < entries; i += callers {
				if err := call(fmt.Sprint("key:", i+1)); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(start) / entries
	select {
	case err := <-errs:
		return 0, err
	default:
		return took, nil
	}
}

// median is in microseconds.
func median(v []time.Duration) float64 {
	slices.Sort(v)
	return float64(v[len(v)/2].Nanoseconds()) / 1e3
}
