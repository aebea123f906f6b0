package main

import (
	"context"
	"fmt"
	"io"
	"time"
)

const cleanupSQL = `SELECT removed, next_position FROM %s.cache_walk($1::text, NULL::interval)`

// runCleanup does what Cache.Cleanup does, and shows on a terminal how far it is.
func runCleanup(ctx context.Context, o *options, out, progress io.Writer) error {
	s, _, err := open(ctx, o)
	if err != nil {
		return err
	}
	defer s.Close()
	bite := fmt.Sprintf(cleanupSQL, s.schema)
	terminal := isTerminal(progress)
	var removed int64
	var drawn time.Time
	for position := new(string); position != nil; {
		if terminal && time.Since(drawn) > 100*time.Millisecond {
			drawn = time.Now()
			fmt.Fprintf(progress, "\r\x1b[K%s removed", count(removed, "entry", "entries"))
		}
		var n int64
		if err = s.QueryRowContext(ctx, bite, *position).Scan(&n, &position); err != nil {
			break
		}
		removed += n
	}
	if terminal {
		fmt.Fprint(progress, "\r\x1b[K")
	}
	if err != nil {
		if removed > 0 {
			fmt.Fprintf(progress, "Removed %s before it failed.\n", count(removed, "expired entry", "expired entries"))
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return err
	}
	return o.tell(out, cleanup{removed, s.where})
}

type cleanup struct {
	Removed int64 `json:"removed"`
	where   string
}

func (c cleanup) print(w io.Writer) {
	fmt.Fprintf(w, "Removed %s from %s.\n", count(c.Removed, "expired entry", "expired entries"), c.where)
}
