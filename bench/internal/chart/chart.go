// Package chart draws bars as SVG, legible on light and on dark pages.
package chart

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// Panel is a group of rows or columns with a title of its own.
type Panel struct {
	Title  string
	Groups []Group
}

// Group is a bar for each system.
type Group struct {
	Label  string // a line below, or more
	Values []float64
}

// Columns draws operations per second: panels side by side, in each the groups of columns,
// a column for each system. A lowest above 0 makes the scale logarithmic from there on.
func Columns(systems []string, lowest float64, panels []Panel) string {
	const bar, gap, height, margin, top, bottom = 18, 22, 240, 60, 64, 50
	var most float64
	width := margin / 2
	for _, p := range panels {
		width += margin + len(p.Groups)*(len(systems)*bar+gap)
		for _, g := range p.Groups {
			for _, v := range g.Values {
				most = max(most, v)
			}
		}
	}
	width = max(width, 130*len(systems)+margin) // of the legend
	ticks, y := scale(lowest, most, height)
	var b strings.Builder
	begin(&b, width, top+height+bottom)
	for i, name := range systems {
		x := margin/2 + i*(width-margin)/len(systems)
		fmt.Fprintf(&b, `<rect x="%d" y="14" width="12" height="12" fill="%s"/><text x="%d" y="24">%s</text>`+"\n", x, Colour(name), x+18, html.EscapeString(name))
	}
	left := margin
	for _, p := range panels {
		end := left + len(p.Groups)*(len(systems)*bar+gap)
		fmt.Fprintf(&b, `<text x="%d" y="%d" font-weight="bold">%s</text>`+"\n", left, top-14, html.EscapeString(p.Title))
		for _, tick := range ticks {
			line := top + height - y(tick)
			fmt.Fprintf(&b, `<line class="line" x1="%d" x2="%d" y1="%d" y2="%d"/><text class="small" x="%d" y="%d" text-anchor="end">%s</text>`+"\n",
				left, end, line, line, left-6, line+4, Short(tick))
		}
		for g, group := range p.Groups {
			x := left + g*(len(systems)*bar+gap) + gap/2
			for i, v := range group.Values {
				h := y(max(v, lowest))
				fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%d" height="%d" fill="%s"/>`+"\n", x+i*bar, top+height-h, bar-2, h, Colour(systems[i]))
			}
			for i, line := range strings.Split(group.Label, "\n") {
				fmt.Fprintf(&b, `<text class="small" x="%d" y="%d" text-anchor="middle">%s</text>`+"\n",
					x+bar*len(systems)/2, top+height+18+16*i, html.EscapeString(line))
			}
		}
		left = end + margin
	}
	b.WriteString("</svg>\n")
	return b.String()
}

// Row is a bar of Rows.
type Row struct {
	Name  string
	Value float64
	Ours  bool
}

// RowPanel is rows with a title, a line below it, and a scale of their own.
type RowPanel struct {
	Title, Note string
	Rows        []Row
}

// Rows draws panels one above the other, each bar with its name before it and its figure
// behind it.
func Rows(panels []RowPanel) string {
	const width, left, right, bar, gap, head, foot, margin = 760, 200, 100, 22, 8, 52, 34, 12
	height := margin
	for _, p := range panels {
		height += head + len(p.Rows)*(bar+gap) + foot
	}
	var b strings.Builder
	begin(&b, width, height)
	top := margin
	for _, p := range panels {
		var most float64
		for _, r := range p.Rows {
			most = max(most, r.Value)
		}
		ticks, x := scale(0, most, width-left-right)
		bottom := top + head - gap + len(p.Rows)*(bar+gap)
		fmt.Fprintf(&b, `<text x="16" y="%d" font-size="14" font-weight="bold">%s</text><text class="small" x="16" y="%d">%s</text>`+"\n",
			top+14, html.EscapeString(p.Title), top+32, html.EscapeString(p.Note))
		for _, tick := range ticks {
			fmt.Fprintf(&b, `<line class="line" x1="%d" x2="%d" y1="%d" y2="%d"/><text class="small" x="%d" y="%d" text-anchor="middle">%s</text>`+"\n",
				left+x(tick), left+x(tick), top+head-gap, bottom, left+x(tick), bottom+14, Short(tick))
		}
		for i, r := range p.Rows {
			y, class, weight := top+head-gap/2+i*(bar+gap), "theirs", "normal"
			if r.Ours {
				class, weight = "ours", "bold"
			}
			fmt.Fprintf(&b, `<text x="%d" y="%d" font-weight="%s" text-anchor="end">%s</text><rect class="%s" x="%d" y="%d" width="%d" height="%d"/><text x="%d" y="%d" font-weight="%s">%s</text>`+"\n",
				left-10, y+16, weight, html.EscapeString(r.Name), class, left, y, x(r.Value), bar, left+x(r.Value)+8, y+16, weight, thousands(r.Value))
		}
		top = bottom + gap + foot
	}
	b.WriteString("</svg>\n")
	return b.String()
}

// begin paints the ground, so that the reader's page, light or dark, needs not be known.
func begin(b *strings.Builder, width, height int) {
	fmt.Fprintf(b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">
<style>
  .ground { fill: #ffffff } text { fill: #1f2328 } .small { fill: #59636e } .line { stroke: #d1d9e0 } .ours { fill: #336791 } .theirs { fill: #c9a9a6 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117 } text { fill: #f0f6fc } .small { fill: #9198a1 } .line { stroke: #3d444d } .ours { fill: #6ea8dc } .theirs { fill: #7d5f5c }
  }
</style>
<rect class="ground" width="100%%" height="100%%" rx="6"/>
`, width, height)
}

// scale returns where the lines stand, and how many units long a value is, of length.
func scale(lowest, most float64, length int) (ticks []float64, units func(float64) int) {
	if lowest > 0 {
		highest := math.Pow(10, math.Ceil(math.Log10(max(most, 10*lowest))))
		for tick := lowest; tick <= highest*1.01; tick *= 10 {
			ticks = append(ticks, tick)
		}
		return ticks, func(v float64) int {
			return int(math.Log10(v/lowest) / math.Log10(highest/lowest) * float64(length))
		}
	}
	step := round(max(most, 1) / 4)
	highest := math.Ceil(most/step) * step
	for tick := 0.0; tick <= highest; tick += step {
		ticks = append(ticks, tick)
	}
	return ticks, func(v float64) int { return int(v / highest * float64(length)) }
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

// Short is a number on an axis.
func Short(n float64) string {
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

// Colour is that of a system, the same in every chart: blues are this library's,
// PostgreSQL's own is between, and reds are Redis'.
func Colour(system string) string {
	if c, ok := map[string]string{
		"fastpgcache-pq": "#336791", "local": "#336791", "fastpgcache-pgx": "#6ea8dc", "unmerged-pq": "#9db8cc",
		"prepared-pq": "#8a949e", "otter": "#8a949e", "go-redis": "#d8403a", "go-redis-cached": "#a34fb0", "rueidis": "#e8908a", "rueidis-docache": "#e07b39",
	}[system]; ok {
		return c
	}
	return "#5a9e6f"
}
