package main

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

var soakScenarios = []scenario{
	{name: "soak with TTL churn", run: soak, whole: true,
		what: "A process of its own writes entries of 100 to 4,000 bytes that live for 1 to 30 seconds, for the whole time, beside all the other scenarios. Memory, goroutines, tables and the feed stay flat."},
}

func soak(t *trial) error {
	if err := t.start(pgtest.Config{}); err != nil {
		return err
	}
	deadline, _ := t.ctx.Deadline()
	cmd, lines, err := startChild(job{"soak", "pgx", t.dsn(), 1, 50 * time.Millisecond, (time.Until(deadline) - 2*time.Second).Seconds()})
	if err != nil {
		return err
	}
	var all []sample
	for lines.Scan() {
		var n note
		if err := json.Unmarshal(lines.Bytes(), &n); err != nil || n.Sample == nil {
			return fmt.Errorf("the child said %.200q", lines.Text())
		}
		s := *n.Sample
		if err := t.admin.QueryRow(`SELECT pg_table_size('cache'), pg_indexes_size('cache'), pg_table_size('cache_change'), pg_indexes_size('cache_change'), (SELECT count(*) FROM cache)`).
			Scan(&s.Table, &s.Index, &s.Feed, &s.FeedIndex, &s.Rows); err != nil {
			return err
		}
		all = append(all, s)
		t.result.Wrong += int64(s.Wrong)
		t.result.Hits += int64(s.Answers)
		t.result.Operations = s.Operations
		if n.Error != "" {
			t.failf("minute %.1f: errors: %s", s.Minute, n.Error)
		}
	}
	if err := cmd.Wait(); err != nil {
		return err
	}
	if len(all) < 4 {
		return fmt.Errorf("only %d samples", len(all))
	}
	last := all[len(all)-1]
	t.result.figure("at the end %.1f MB of heap, %d goroutines, table %.1f MB, index %.1f MB, feed %.1f MB, %s rows; p50 %v, p99 %v",
		mega(int64(last.Heap)), last.Goroutines, mega(last.Table), mega(last.Index), mega(last.Feed+last.FeedIndex), thousands(last.Rows), last.P50.Round(10*time.Microsecond), last.P99.Round(10*time.Microsecond))
	t.result.charts = soakCharts(all)
	// Flat: the last third is not above the middle one.
	if last.Minute >= 9 {
		third := len(all) / 3
		for _, c := range t.result.charts {
			if c.level {
				middle, end := c.mean(third, 2*third), c.mean(2*third, len(all))
				if end > 1.25*middle+c.least {
					t.failf("%s grows: %.1f in the middle third, %.1f in the last", c.title, middle, end)
				}
			}
		}
	}
	return nil
}

func mega(bytes int64) float64 { return float64(bytes) / 1e6 }

func soakCharts(all []sample) []chart {
	series := func(title string, level bool, least float64, f func(sample) float64) chart {
		c := chart{title: title, level: level, least: least}
		for _, s := range all {
			c.x = append(c.x, s.Minute)
			c.y = append(c.y, f(s))
		}
		return c
	}
	return []chart{
		series("heap, MB", true, 2, func(s sample) float64 { return mega(int64(s.Heap)) }),
		series("goroutines", true, 10, func(s sample) float64 { return float64(s.Goroutines) }),
		series("table, MB", true, 4, func(s sample) float64 { return mega(s.Table) }),
		series("index, MB", true, 2, func(s sample) float64 { return mega(s.Index) }),
		series("feed with index, MB", true, 4, func(s sample) float64 { return mega(s.Feed + s.FeedIndex) }),
		series("p99, ms", false, 0, func(s sample) float64 { return float64(s.P99) / 1e6 }),
	}
}
