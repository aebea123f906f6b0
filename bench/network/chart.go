package main

import (
	"fmt"
	"math"
	"os"
	"strings"

	"github.com/fastpgcache/fastpgcache/bench/internal/peers"
)

var colours = map[string]string{merged: "#336791", unmerged: "#7aa6c2", goRedis: "#d82c20", rueidis: "#f0a39c"}

// writeChart draws the operations per second of GET: a panel for each round trip, a group
// of bars for each number of callers. The scale is logarithmic, since they differ a hundredfold.
func writeChart(file string, p plan, all results) error {
	const (
		bar, gap, height, margin, top = 14, 14, 220, 56, 60
		lowest, highest               = 2.0, 5.5 // powers of ten
	)
	op := p.ops[0]
	group := bar*len(systems) + gap
	panel := margin + group*len(p.callers)
	width := panel*len(p.roundTrips) + gap
	y := func(perSecond float64) int {
		share := (math.Log10(max(perSecond, 1)) - lowest) / (highest - lowest)
		return top + height - int(max(share, 0)*height)
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", width, top+height+50)
	fmt.Fprintln(&b, `<rect width="100%" height="100%" fill="white"/>`)
	for i, name := range systems {
		x := margin + i*width/(len(systems)+1)
		fmt.Fprintf(&b, `<rect x="%d" y="14" width="12" height="12" fill="%s"/><text x="%d" y="24">%s</text>`+"\n", x, colours[name], x+18, name)
	}
	for i, roundTrip := range p.roundTrips {
		left := margin + i*panel
		away := "no network"
		if roundTrip > 0 {
			away = fmt.Sprint(roundTrip, " away")
		}
		fmt.Fprintf(&b, `<text x="%d" y="%d" font-weight="bold">%s/s, %s</text>`+"\n", left, top-12, strings.ToUpper(op), away)
		for i, name := range []string{"100", "1k", "10k", "100k"} {
			line := y(100 * math.Pow10(i))
			fmt.Fprintf(&b, `<line x1="%d" x2="%d" y1="%d" y2="%d" stroke="#ddd"/><text x="%d" y="%d" text-anchor="end">%s</text>`+"\n",
				left, left+group*len(p.callers)-gap/2, line, line, left-6, line+4, name)
		}
		for g, callers := range p.callers {
			x := left + g*group + gap/2
			for k, name := range systems {
				from := y(peers.Median(all[setting{roundTrip, op, callers}][name], peers.Rate))
				fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%d" height="%d" fill="%s"/>`+"\n", x+k*bar, from, bar-2, top+height-from, colours[name])
			}
			fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="middle">%d</text>`+"\n", x+bar*len(systems)/2, top+height+18, callers)
		}
		fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="middle">callers</text>`+"\n", left+group*len(p.callers)/2, top+height+36)
	}
	fmt.Fprintln(&b, "</svg>")
	return os.WriteFile(file, []byte(b.String()), 0o644)
}
