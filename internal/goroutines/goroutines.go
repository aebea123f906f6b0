// Package goroutines counts those that a piece of code has started and left, whatever
// else runs in the process: they inherit its label.
package goroutines

import (
	"context"
	"fmt"
	"runtime/pprof"
	"strings"
)

const label = "fastpgcache.of"

// Do runs f, whose goroutines are those of name.
func Do(ctx context.Context, name string, f func(context.Context)) {
	pprof.Do(ctx, pprof.Labels(label, name), f)
}

// Of returns how many goroutines of name there are, without the caller, and their stacks.
func Of(name string) (n int, stacks string) {
	var all strings.Builder
	pprof.Lookup("goroutine").WriteTo(&all, 1)
	for _, record := range strings.Split(all.String(), "\n\n") {
		var count int
		if !strings.Contains(record, fmt.Sprintf(`"%s":%q`, label, name)) || strings.Contains(record, "pprof.writeGoroutine") {
			continue
		}
		// The first record follows a line of its own.
		if _, after, found := strings.Cut(record, "goroutine profile: "); found {
			_, record, _ = strings.Cut(after, "\n")
		}
		fmt.Sscan(record, &count)
		n += count
		stacks += record + "\n\n"
	}
	return n, stacks
}
