package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/fastpgcache/fastpgcache/bench/internal/peers"
)

var colours = []string{"#336791", "#7aa6c2", "#b9c4cc", "#d82c20", "#f0a39c", "#888888"}

// writeChart draws the operations per second for the first value size: a panel for
// each operation, a group of bars for each number of callers.
func writeChart(file string, p plan, results samples) error {
	const (
		bar, gap, height, margin, top = 22, 26, 260, 64, 60
	)
	group := bar*len(p.systems) + gap
	panel := margin + group*len(p.callers)
	width := panel*len(p.ops) + gap
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", width, top+height+70)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="white"/>`+"\n")
	for i, name := range p.systems {
		x := margin + i*width/(len(p.systems)+1)
		fmt.Fprintf(&b, `<rect x="%d" y="14" width="12" height="12" fill="%s"/><text x="%d" y="24">%s</text>`+"\n", x, colours[i%len(colours)], x+18, name)
	}
	for o, op := range p.ops {
		left := o*panel + margin
		most := 1.0
		for _, callers := range p.callers {
			for _, all := range results[setting{op, callers, p.sizes[0]}] {
				most = max(most, peers.Median(all, peers.Rate))
			}
		}
		fmt.Fprintf(&b, `<text x="%d" y="%d" font-weight="bold">%s, %d bytes, operations per second</text>`+"\n", left, top-12, strings.ToUpper(op), p.sizes[0])
		for line := range 5 {
			y := top + height - line*height/4
			fmt.Fprintf(&b, `<line x1="%d" x2="%d" y1="%d" y2="%d" stroke="#ddd"/><text x="%d" y="%d" text-anchor="end">%.0fk</text>`+"\n",
				left, left+group*len(p.callers)-gap/2, y, y, left-6, y+4, most*float64(line)/4000)
		}
		for g, callers := range p.callers {
			x := left + g*group + gap/2
			for i, name := range p.systems {
				h := int(peers.Median(results[setting{op, callers, p.sizes[0]}][name], peers.Rate) / most * height)
				fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%d" height="%d" fill="%s"/>`+"\n", x+i*bar, top+height-h, bar-2, h, colours[i%len(colours)])
			}
			callersText := "callers"
			if callers == 1 {
				callersText = "caller"
			}
			fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="middle">%d %s</text>`+"\n", x+bar*len(p.systems)/2, top+height+20, callers, callersText)
		}
	}
	b.WriteString("</svg>\n")
	return os.WriteFile(file, []byte(b.String()), 0o644)
}
