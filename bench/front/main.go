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
	"os"

	"github.com/fastpgcache/fastpgcache/bench/internal/chart"
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

func run(figures, svg string) error {
	text, err := os.ReadFile(figures)
	if err != nil {
		return err
	}
	var panels []chart.RowPanel
	if err := json.Unmarshal(text, &panels); err != nil {
		return err
	}
	return os.WriteFile(svg, []byte(chart.Rows(panels)), 0o644)
}
