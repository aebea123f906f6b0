package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"
)

const cleanupSQL = `SELECT removed, next_position FROM %s.cache_walk($1::text, NULL::interval)`

// runCleanup does what Cache.Cleanup does, and shows on a terminal how far it is.
func runCleanup(ctx context.Context, o *options, out, progress io.Writer) error {
	s, err := connect(ctx, o)
	if err != nil {
		return err
	}
	defer s.Close()
	if err := s.trust(ctx); err != nil {
		return err
	}
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
			fmt.Fprintf(out, "Removed %s before it failed.\n", count(removed, "expired entry", "expired entries"))
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return err
	}
	fmt.Fprintf(out, "Removed %s from %s.\n", count(removed, "expired entry", "expired entries"), s.where)
	return nil
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
