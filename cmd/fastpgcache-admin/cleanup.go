package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"
)

// cleanupBlocks is how many pages of the table one statement covers, as in
// Cache.Cleanup.
const cleanupBlocks = 256

const cleanupSQL = `SELECT removed, next_block FROM %s.cache_cleanup_blocks($1, $2)`

const blocksSQL = `SELECT pg_relation_size($1::regclass) / current_setting('block_size')::bigint`

// runCleanup does what Cache.Cleanup does, and shows on a terminal how far it is.
func runCleanup(ctx context.Context, o *options, out, progress io.Writer) error {
	s, err := connect(ctx, o)
	if err != nil {
		return err
	}
	defer s.Close()
	var blocks int64
	if err := s.QueryRowContext(ctx, blocksSQL, s.schema+".cache").Scan(&blocks); err != nil {
		return err
	}
	bite := fmt.Sprintf(cleanupSQL, s.schema)
	terminal := isTerminal(progress)
	var removed int64
	var drawn time.Time
	for block := new(int64); block != nil; {
		if terminal && time.Since(drawn) > 100*time.Millisecond {
			drawn = time.Now()
			fmt.Fprintf(progress, "\r\x1b[K%d %% of %d pages, %s removed", min(100, 100**block/max(1, blocks)), blocks, count(removed, "entry", "entries"))
		}
		var n int64
		if err = s.QueryRowContext(ctx, bite, *block, cleanupBlocks).Scan(&n, &block); err != nil {
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
