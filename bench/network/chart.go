package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/fastpgcache/fastpgcache/bench/internal/chart"
	"github.com/fastpgcache/fastpgcache/bench/internal/peers"
)

// writeChart draws the operations per second of the first operation: a panel for each round
// trip, a group of columns for each number of callers. The scale is logarithmic, since they
// differ a hundredfold.
func writeChart(file string, p plan, all results) error {
	op := p.ops[0]
	var panels []chart.Panel
	for _, roundTrip := range p.roundTrips {
		away := "no network"
		if roundTrip > 0 {
			away = fmt.Sprint(roundTrip, " away")
		}
		panel := chart.Panel{Title: fmt.Sprintf("%s a second, %s", strings.ToUpper(op), away)}
		for _, callers := range p.callers {
			g := chart.Group{Label: fmt.Sprint(callers, "\ncallers")}
			for _, name := range systems {
				g.Values = append(g.Values, peers.Median(all[setting{roundTrip, op, callers}][name], peers.Rate))
			}
			panel.Groups = append(panel.Groups, g)
		}
		panels = append(panels, panel)
	}
	return os.WriteFile(file, []byte(chart.Columns(systems, 100, panels)), 0o644)
}
