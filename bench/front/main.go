// Command front draws the chart of the README from a file of figures, which load and local
// have measured.
//
//	go run ./front
//	go run ./front -figures ../docs/front.json -svg ../docs/front.svg
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"html"
	"math"
	"os"
	"strings"
)

func main() {
	figures := flag.String("figures", "../docs/front.json", "file of figures")
	svg := flag.String("svg", "../docs/front.svg", "file to write the chart to")
	flag.Parse()
	if err := run(*figures, *svg); err != nil {
		fmt.Fprintln(os.Stderr, "front:", err)
		os.Exit(1)
	}
}

// panel is a group of bars with a scale of its own.
type panel struct {
	Title string `json:"title"`
	Note  string `json:"note"`
	Bars  []struct {
		Name      string  `json:"name"`
		PerSecond float64 `json:"per_second"`
		Ours      bool    `json:"ours"`
	} `json:"bars"`
}

func run(figures, svg string) error {
	text, err := os.ReadFile(figures)
	if err != nil {
		return err
	}
	var panels []panel
	if err := json.Unmarshal(text, &panels); err != nil {
		return err
	}
	return os.WriteFile(svg, []byte(draw(panels)), 0o644)
}

// Sizes, in the units of the picture.
const (
	width  = 760
	left   = 200 // of the bars; names stand before them
	right  = 100 // of figures behind them
	bar    = 22
	gap    = 8
	head   = 52 // of a panel
	foot   = 34
	margin = 12
)

// style has its colours from what the reader's page is, light or dark: the ground is
// painted in either.
const style = `<style>
  .ground { fill: #ffffff } text { fill: #1f2328 } .small { fill: #59636e } .line { stroke: #d1d9e0 } .ours { fill: #336791 } .theirs { fill: #c9a9a6 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117 } text { fill: #f0f6fc } .small { fill: #9198a1 } .line { stroke: #3d444d } .ours { fill: #6ea8dc } .theirs { fill: #7d5f5c }
  }
</style>
`

func draw(panels []panel) string {
	height := margin
	for _, p := range panels {
		height += head + len(p.Bars)*(bar+gap) + foot
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="14">`+"\n", width, height)
	b.WriteString(style)
	b.WriteString(`<rect class="ground" width="100%" height="100%" rx="6"/>` + "\n")
	top := margin
	for _, p := range panels {
		p.draw(&b, top)
		top += head + len(p.Bars)*(bar+gap) + foot
	}
	b.WriteString("</svg>\n")
	return b.String()
}

func (p panel) draw(b *strings.Builder, top int) {
	var most float64
	for _, bar := range p.Bars {
		most = max(most, bar.PerSecond)
	}
	step := round(most / 4)
	scale := float64(width-left-right) / (math.Ceil(most/step) * step)
	fmt.Fprintf(b, `<text x="16" y="%d" font-weight="bold">%s</text><text class="small" x="16" y="%d" font-size="12">%s</text>`+"\n",
		top+14, html.EscapeString(p.Title), top+32, html.EscapeString(p.Note))
	top += head - gap
	bottom := top + len(p.Bars)*(bar+gap)
	for at := 0.0; at <= math.Ceil(most/step)*step; at += step {
		x := left + int(at*scale)
		fmt.Fprintf(b, `<line class="line" x1="%d" x2="%d" y1="%d" y2="%d"/><text class="small" x="%d" y="%d" font-size="11" text-anchor="middle">%s</text>`+"\n",
			x, x, top, bottom, x, bottom+14, short(at))
	}
	for i, each := range p.Bars {
		y, class, weight := top+gap/2+i*(bar+gap), "theirs", "normal"
		if each.Ours {
			class, weight = "ours", "bold"
		}
		length := int(each.PerSecond * scale)
		fmt.Fprintf(b, `<text x="%d" y="%d" font-size="13" font-weight="%s" text-anchor="end">%s</text><rect class="%s" x="%d" y="%d" width="%d" height="%d"/><text x="%d" y="%d" font-size="13" font-weight="%s">%s</text>`+"\n",
			left-10, y+16, weight, html.EscapeString(each.Name), class, left, y, length, bar, left+length+8, y+16, weight, thousands(each.PerSecond))
	}
}

// round is the next of 1, 2, 5, 10, 20, …
func round(n float64) float64 {
	power := math.Pow10(int(math.Floor(math.Log10(n))))
	for _, factor := range []float64{1, 2, 5} {
		if n <= factor*power {
			return factor * power
		}
	}
	return 10 * power
}

// short is a number on the axis.
func short(n float64) string {
	switch {
	case n >= 1e6:
		return fmt.Sprint(n/1e6, " M")
	case n >= 1e3:
		return fmt.Sprint(n/1e3, " k")
	}
	return fmt.Sprint(n)
}

// thousands is a number with its thousands apart.
func thousands(n float64) string {
	text := fmt.Sprint(int(n))
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
