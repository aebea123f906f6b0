package main

import (
	"bytes"
	"fmt"
	"math"
	"strings"
	"time"
)

var colours = []string{"#2f6fa7", "#6aa84f", "#e69f00", "#d5582b"}

const (
	columns                  = 3
	width, height            = 400, 230 // of a panel
	left, right, top, bottom = 58, 12, 34, 50
	plotWidth, plotHeight    = width - left - right, height - top - bottom
)

// picture draws the panels as an SVG.
func picture(panels []*panel, start, end time.Time) []byte {
	var b bytes.Buffer
	rows := (len(panels) + columns - 1) / columns
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="11" fill="#333">`+"\n", columns*width, rows*height)
	fmt.Fprintln(&b, `<rect width="100%" height="100%" fill="#f4f5f5"/>`)
	for i, p := range panels {
		fmt.Fprintf(&b, `<g transform="translate(%d %d)">`+"\n", i%columns*width, i/columns*height)
		p.draw(&b, start, end)
		fmt.Fprintln(&b, "</g>")
	}
	fmt.Fprintln(&b, "</svg>")
	return b.Bytes()
}

func (p *panel) draw(b *bytes.Buffer, start, end time.Time) {
	defaults := p.FieldConfig.Defaults
	stacked := defaults.Custom.Stacking.Mode == "normal"
	below := map[float64]float64{} // what is stacked so far
	most := 0.0
	for _, t := range p.Targets {
		for i := range t.points {
			if math.IsNaN(t.points[i].value) {
				t.points[i].value = 0
			}
			if stacked {
				t.points[i].value += below[t.points[i].at]
				below[t.points[i].at] = t.points[i].value
			}
			most = max(most, t.points[i].value)
		}
	}
	step := roundStep(most/4, defaults.Unit == "bytes")
	scale := step * max(math.Ceil(most/step), 1)
	x := func(at float64) float64 {
		return left + plotWidth*(at-float64(start.Unix()))/end.Sub(start).Seconds()
	}
	y := func(v float64) float64 { return top + plotHeight*(1-v/scale) }

	fmt.Fprintf(b, `<rect x="4" y="4" width="%d" height="%d" rx="3" fill="white" stroke="#ddd"/><text x="14" y="22" font-weight="bold">%s</text>`+"\n", width-8, height-8, p.Title)
	for v := 0.0; v < scale*1.001; v += step {
		fmt.Fprintf(b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#e3e3e3"/><text x="%d" y="%.1f" text-anchor="end">%s</text>`+"\n",
			left, width-right, y(v), y(v), left-6, y(v)+4, withUnit(v, defaults.Unit))
	}
	for at := time.Duration(0); at <= end.Sub(start); at += 30 * time.Second {
		fmt.Fprintf(b, `<text x="%.0f" y="%d" text-anchor="middle">%d:%02d</text>`+"\n", x(float64(start.Add(at).Unix())), height-bottom+16, int(at.Minutes()), int(at.Seconds())%60)
	}
	for i := len(p.Targets) - 1; i >= 0; i-- { // the lowest of a stack in front
		t, colour := p.Targets[i], colours[i%len(colours)]
		var line strings.Builder
		for _, point := range t.points {
			fmt.Fprintf(&line, "%.1f,%.1f ", x(point.at), y(point.value))
		}
		if stacked && len(t.points) > 0 {
			fmt.Fprintf(b, `<polygon points="%.1f,%.1f %s%.1f,%.1f" fill="%s" fill-opacity="0.85"/>`+"\n",
				x(t.points[0].at), y(0), line.String(), x(t.points[len(t.points)-1].at), y(0), colour)
		} else {
			fmt.Fprintf(b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="1.5"/>`+"\n", line.String(), colour)
		}
	}
	for i, at := 0, 14; i < len(p.Targets); i++ {
		name := p.Targets[i].LegendFormat
		fmt.Fprintf(b, `<rect x="%d" y="%d" width="9" height="9" fill="%s"/><text x="%d" y="%d" font-size="10">%s</text>`+"\n",
			at, height-23, colours[i%len(colours)], at+13, height-15, name)
		at += 24 + 11*len(name)/2
	}
}

// roundStep is a round number, not under step.
func roundStep(step float64, bytes bool) float64 {
	if step <= 0 {
		return 1
	}
	if bytes {
		return math.Pow(2, math.Ceil(math.Log2(step)))
	}
	power := math.Pow(10, math.Floor(math.Log10(step)))
	for _, n := range []float64{1, 2, 5} {
		if n*power >= step {
			return n * power
		}
	}
	return 10 * power
}

// withUnit is a value as Grafana would write it, about.
func withUnit(v float64, unit string) string {
	suffixes, base := []string{"", "k", "M"}, 1000.0
	switch unit {
	case "percentunit":
		return fmt.Sprintf("%.4g %%", 100*v)
	case "s":
		suffixes, v = []string{"µs", "ms", "s"}, v*1e6
	case "bytes":
		suffixes, base = []string{"B", "KiB", "MiB"}, 1024
	}
	if v == 0 {
		return "0"
	}
	i := 0
	for ; v >= base && i < len(suffixes)-1; i++ {
		v /= base
	}
	return strings.TrimSpace(fmt.Sprintf("%.4g %s", v, suffixes[i]))
}
