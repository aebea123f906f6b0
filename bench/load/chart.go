package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/fastpgcache/fastpgcache/bench/internal/chart"
	"github.com/fastpgcache/fastpgcache/bench/internal/peers"
)

// writeChart draws the operations per second for the first value size: a panel for
// each operation, a group of columns for each number of callers.
func writeChart(file string, p plan, results samples) error {
	var panels []chart.Panel
	for _, op := range p.ops {
		panel := chart.Panel{Title: fmt.Sprintf("%s, operations a second, %d bytes", strings.ToUpper(op), p.sizes[0])}
		for _, callers := range p.callers {
			label := fmt.Sprint(callers, " callers")
			if callers == 1 {
				label = "1 caller"
			}
			g := chart.Group{Label: label}
			for _, name := range p.systems {
				g.Values = append(g.Values, peers.Median(results[setting{op, callers, p.sizes[0]}][name], peers.Rate))
			}
			panel.Groups = append(panel.Groups, g)
		}
		panels = append(panels, panel)
	}
	return os.WriteFile(file, []byte(chart.Columns(p.systems, 0, panels)), 0o644)
}
