package main

import (
	"fmt"
	"math"
	"os"
	"strings"
)

var colours = []string{"#336791", "#d82c20", "#9c3d8f", "#f0a39c", "#e07b39", "#888888"}

// group is one group of bars, a bar for each system.
type group struct {
	label string
	bars  []float64
}

// writeChart draws operations per second, on a logarithmic scale.
func writeChart(file string, systems []string, groups []group) error {
	const bar, gap, height, left, top = 20, 30, 260, 64, 60
	const lowest, decades = 4, 4 // 10,000 to 100,000,000
	width := left + (bar*len(systems)+gap)*len(groups) + gap
	y := func(rate float64) int {
		return top + height - int(math.Max(0, math.Log10(rate)-lowest)/decades*height)
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", width, top+height+60)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="white"/>`+"\n")
	for i, name := range systems {
		x := left + i*(width-left)/len(systems)
		fmt.Fprintf(&b, `<rect x="%d" y="14" width="12" height="12" fill="%s"/><text x="%d" y="24">%s</text>`+"\n", x, colours[i%len(colours)], x+18, name)
	}
	fmt.Fprintf(&b, `<text x="%d" y="%d" font-weight="bold">operations per second, 100,000 keys of 100 bytes, MaxStaleness %v</text>`+"\n", left, top-12, *staleness)
	for d := range decades + 1 {
		rate := math.Pow10(lowest + d)
		fmt.Fprintf(&b, `<line x1="%d" x2="%d" y1="%d" y2="%d" stroke="#ddd"/><text x="%d" y="%d" text-anchor="end">%s</text>`+"\n",
			left, width-gap/2, y(rate), y(rate), left-6, y(rate)+4, []string{"10k", "100k", "1M", "10M", "100M"}[d])
	}
	for g, group := range groups {
		x := left + gap/2 + g*(bar*len(systems)+gap)
		for i, rate := range group.bars {
			fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%d" height="%d" fill="%s"/>`+"\n", x+i*bar, y(rate), bar-2, top+height-y(rate), colours[i%len(colours)])
		}
		callers, sets, _ := strings.Cut(group.label, ", ")
		fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="middle">%s</text><text x="%d" y="%d" text-anchor="middle">%s</text>`+"\n",
			x+bar*len(systems)/2, top+height+20, callers, x+bar*len(systems)/2, top+height+38, sets)
	}
	b.WriteString("</svg>\n")
	return os.WriteFile(file, []byte(b.String()), 0o644)
}
