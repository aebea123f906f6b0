// Command prove tries to break the cache, in many ways side by side, holds every answer
// against what was true when, and writes a page that tells what came of it.
//
//	go run . [-minutes 5] [-only part of a name] [-lanes 4] [-o ../docs/proof.md]
//
// It fails if an answer was wrong, or anything else was not as promised.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// scenario is one way to try.
type scenario struct {
	name string
	what string // what is done, and what must hold
	run  func(*trial) error

	whole bool // runs beside all the others, for the whole time
}

func scenarios() (all []scenario) {
	for _, list := range [][]scenario{serverScenarios, networkScenarios, adminScenarios, settingsScenarios, poolerScenarios, callerScenarios, soakScenarios} {
		all = append(all, list...)
	}
	return all
}

func main() {
	if os.Getenv(childEnv) != "" {
		child()
		return
	}
	minutes := flag.Float64("minutes", 5, "how long all of it may take, about")
	only := flag.String("only", "", "scenarios whose names contain one of these, with commas between")
	lanes := flag.Int("lanes", 4, "scenarios at once")
	out := flag.String("o", "", "the page to write, Markdown; its charts go beside it")
	flag.Parse()
	results, left := run(time.Duration(*minutes*float64(time.Minute)), *only, *lanes)
	if *out != "" {
		if err := writeReport(*out, results, left, *minutes, *lanes); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	failed := left != ""
	for _, r := range results {
		failed = failed || r.failed()
	}
	if failed {
		os.Exit(1)
	}
}

// run runs the scenarios and returns what came of each, in order, and what the whole
// process left behind.
func run(total time.Duration, only string, lanes int) (results []*result, left string) {
	var chosen []scenario
	inLanes := 0
	for _, s := range scenarios() {
		if slices.ContainsFunc(strings.Split(only, ","), func(part string) bool { return strings.Contains(s.name, part) }) {
			chosen = append(chosen, s)
			if !s.whole {
				inLanes++
			}
		}
	}
	if inLanes < lanes {
		lanes = max(inLanes, 1)
	}
	each := total
	if inLanes > 0 {
		each = total * time.Duration(lanes) / time.Duration((inLanes+lanes-1)/lanes*lanes)
	}
	before := resources()
	begin := time.Now()
	results = make([]*result, len(chosen))
	work := make(chan int)
	var wg sync.WaitGroup
	one := func(i int, d time.Duration) {
		results[i] = try(context.Background(), chosen[i], d)
		fmt.Println(results[i].line())
		for _, f := range results[i].Failures {
			fmt.Println("    " + f)
		}
	}
	for range lanes {
		wg.Go(func() {
			for i := range work {
				one(i, each)
			}
		})
	}
	for i, s := range chosen {
		if s.whole {
			wg.Go(func() { one(i, total) })
		}
	}
	for i, s := range chosen {
		if !s.whole {
			work <- i
		}
	}
	close(work)
	wg.Wait()
	time.Sleep(time.Second)
	after := resources()
	fmt.Printf("%v; before %v, after %v\n", time.Since(begin).Round(time.Second), before, after)
	return results, after.beyond(before)
}
