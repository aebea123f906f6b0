package main

import (
	"cmp"
	"fmt"
	"html"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// chart is a line over time.
type chart struct {
	title string
	x, y  []float64
	marks []float64
	level bool    // it must not grow,
	least float64 // by more than this
}

func (c chart) mean(from, to int) float64 {
	sum := 0.0
	for _, y := range c.y[from:to] {
		sum += y
	}
	return sum / float64(max(to-from, 1))
}

// writeReport writes the page, and its charts beside it.
func writeReport(path string, results []*result, left string, minutes float64, lanes int) error {
	var b strings.Builder
	var operations, answers, local, wrong int64
	failed := 0
	for _, r := range results {
		operations += r.Operations
		answers += r.Hits + r.Misses
		local += r.LocalAnswers
		if r.Name != "PgBouncer set wrong" {
			wrong += r.Wrong
		}
		if r.failed() {
			failed++
		}
	}
	base := strings.TrimSuffix(filepath.Base(path), ".md")
	fmt.Fprintf(&b, "# Proof\n\n`scripts/prove` tries to break the cache in %d ways, holds every answer against what was true when, and writes this page.\n\n", len(results))
	fmt.Fprintf(&b, "**%s operations, %s answers judged, %d wrong.** %d of %d scenarios do not hold.\n\n", thousands(operations), thousands(answers), wrong, failed, len(results))
	commit, _ := exec.Command("git", "describe", "--always", "--dirty").Output()
	fmt.Fprintf(&b, "%s, %.0f minutes, %d scenarios at once beside the soak, on %d CPUs with other work on them; PostgreSQL %s, %s, commit %s.\n",
		time.Now().Format("2 January 2006"), minutes, lanes, runtime.NumCPU(), serverVersion, runtime.Version(), strings.TrimSpace(string(commit)))
	fmt.Fprintf(&b, "Each scenario has a server and three or more processes of its own, over lib/pq and pgx, with and without `MaxStaleness`, some 1,500 operations a second between them.\n")
	b.WriteString("An error is a call that failed, as it may while the database is away; what it wanted to write counts as perhaps written. *Longest* is the longest call, *back* how long after a disturbance until every process had an answer again, *left* goroutines, connections and sessions after `Close`.\n\n")
	b.WriteString("| scenario | | operations | judged | from memory | wrong | errors | longest | disturbed | back | left |\n|---|---|--:|--:|--:|--:|---|--:|--:|--:|--:|\n")
	for _, r := range results {
		if r.Skipped != "" {
			fmt.Fprintf(&b, "| %s | skipped: %s | | | | | | | | | |\n", r.Name, r.Skipped)
			continue
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %d | %s | %v | %d | %v | %d, %d, %d |\n", r.Name, r.verdict(), thousands(r.Operations), thousands(r.Hits+r.Misses),
			thousands(r.LocalAnswers), r.Wrong, cmp.Or(escape(r.errors()), "none"), r.Longest.Round(time.Millisecond), r.Disturbances, r.Recovery.Round(time.Millisecond), r.Goroutines, r.Connections, r.Sessions)
	}
	if left == "" {
		b.WriteString("\nAfter all of it the process had as many goroutines, files and child processes as before.\n")
	} else {
		fmt.Fprintf(&b, "\nLeft behind: %s.\n", left)
	}
	b.WriteString("\n## What was done\n\n")
	var rates []chart
	for _, r := range results {
		fmt.Fprintf(&b, "- **%s.** %s\n", r.Name, r.What)
		for _, f := range r.Figures {
			fmt.Fprintf(&b, "  - %s\n", f)
		}
		for _, f := range r.Failures {
			first, _, _ := strings.Cut(f, "\n")
			fmt.Fprintf(&b, "  - **%s**\n", escape(first))
		}
		c := chart{title: r.Name, marks: r.marks}
		for i, n := range r.rate {
			c.x, c.y = append(c.x, float64(i)), append(c.y, float64(n))
		}
		if len(c.x) > 1 && len(r.charts) == 0 {
			rates = append(rates, c)
		}
		if len(r.charts) > 0 {
			name := base + "-soak.svg"
			if err := os.WriteFile(filepath.Join(filepath.Dir(path), name), []byte(svg(r.charts, "minutes")), 0o644); err != nil {
				return err
			}
			fmt.Fprintf(&b, "\n  ![The soak by the minute](%s)\n", name)
		}
	}
	if len(rates) > 0 {
		name := base + "-rates.svg"
		if err := os.WriteFile(filepath.Join(filepath.Dir(path), name), []byte(svg(rates, "seconds")), 0o644); err != nil {
			return err
		}
		fmt.Fprintf(&b, "\n## Operations that succeeded, by the second\n\nA mark below is a disturbance.\n\n![Operations that succeeded, by the second](%s)\n", name)
	}
	return os.WriteFile(path, []byte(b.String()), 0o644)
}

func escape(s string) string { return strings.ReplaceAll(s, "|", `\|`) }

// svg draws charts in a grid.
func svg(charts []chart, unit string) string {
	const columns, width, height, left, top = 3, 290, 130, 42, 22
	rows := (len(charts) + columns - 1) / columns
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="10">`+"\n", columns*width, rows*height)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="white"/>`+"\n")
	for i, c := range charts {
		x0, y0 := float64(i%columns*width+left), float64(i/columns*height+top)
		w, h := float64(width-left-12), float64(height-top-24)
		most, last := slices.Max(append(c.y, 1e-9)), slices.Max(append(c.x, 1e-9))
		fmt.Fprintf(&b, `<text x="%.0f" y="%.0f" font-weight="bold">%s</text>`, x0-left+6, y0-8, html.EscapeString(c.title))
		fmt.Fprintf(&b, `<rect x="%.0f" y="%.0f" width="%.0f" height="%.0f" fill="none" stroke="#bbb"/>`, x0, y0, w, h)
		fmt.Fprintf(&b, `<text x="%.0f" y="%.0f" text-anchor="end">%.4g</text><text x="%.0f" y="%.0f" text-anchor="end">0</text>`, x0-3, y0+8, most, x0-3, y0+h)
		fmt.Fprintf(&b, `<text x="%.0f" y="%.0f" text-anchor="end">%.4g %s</text>`, x0+w, y0+h+13, last, unit)
		b.WriteString(`<polyline fill="none" stroke="#1565c0" points="`)
		for j := range c.x {
			fmt.Fprintf(&b, "%.1f,%.1f ", x0+c.x[j]/last*w, y0+h-c.y[j]/most*h)
		}
		b.WriteString(`"/>`)
		for _, m := range c.marks {
			fmt.Fprintf(&b, `<path d="M%.1f %.1fv4" stroke="#c62828"/>`, x0+min(m/last, 1)*w, y0+h)
		}
		b.WriteString("\n")
	}
	b.WriteString("</svg>\n")
	return b.String()
}
