package main

import (
	"fmt"
	"os"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/history"
)

// result is what came of a scenario.
type result struct {
	Name, What, Skipped string
	Took                time.Duration

	mu           sync.Mutex // guards all below
	Operations   int64
	Errors       map[string]int64 // by kind
	Hits, Misses int64            // answers that were held against what was true
	LocalAnswers int64
	Wrong        int64
	Longest      time.Duration // call
	Disturbances int
	Recovery     time.Duration // the longest from the end of a disturbance until all answer
	Goroutines   int           // left
	Connections  int           // left
	Sessions     int           // left
	Figures      []string      // of this scenario alone
	Failures     []string

	begin  time.Time
	rate   []int64         // operations that succeeded, by second
	marks  []float64       // when it was disturbed, in seconds
	events []history.Event // of processes that are not ours
	charts []chart
}

// called counts a call.
func (r *result) called(took time.Duration, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Operations++
	r.Longest = max(r.Longest, took)
	if err != nil {
		return
	}
	second := int(time.Since(r.begin) / time.Second)
	for len(r.rate) <= second {
		r.rate = append(r.rate, 0)
	}
	r.rate[second]++
}

// failed1 counts an error.
func (r *result) failed1(kind string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Errors[kind]++
}

// mark notes that a disturbance begins.
func (r *result) mark() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Disturbances++
	r.marks = append(r.marks, time.Since(r.begin).Seconds())
}

func (r *result) recovered(took time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Recovery = max(r.Recovery, took)
}

func (r *result) figure(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Figures = append(r.Figures, fmt.Sprintf(format, args...))
}

func (r *result) addStats(s fastpgcache.Stats) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.LocalAnswers += s.LocalHits + s.FilterAnswers
}

func (r *result) failed() bool { return len(r.Failures) > 0 || r.Wrong > 0 }

// errors lists the errors, the most frequent first.
func (r *result) errors() string {
	kinds := make([]string, 0, len(r.Errors))
	for kind := range r.Errors {
		kinds = append(kinds, kind)
	}
	slices.SortFunc(kinds, func(a, b string) int { return int(r.Errors[b] - r.Errors[a]) })
	for i, kind := range kinds {
		kinds[i] = fmt.Sprintf("%s %s", thousands(r.Errors[kind]), kind)
	}
	if len(kinds) > 6 {
		kinds = append(kinds[:6], "…")
	}
	return strings.Join(kinds, ", ")
}

func (r *result) verdict() string {
	switch {
	case r.Skipped != "":
		return "skipped"
	case r.failed():
		return "FAILED"
	}
	return "holds"
}

// line tells the result in a line.
func (r *result) line() string {
	if r.Skipped != "" {
		return fmt.Sprintf("%-7s %s: %s", r.verdict(), r.Name, r.Skipped)
	}
	return fmt.Sprintf("%-7s %s: %d operations, %d answers judged, %d from memory, %d wrong, errors: %s; longest call %v, %d disturbances, recovered in %v; %v; %s",
		r.verdict(), r.Name, r.Operations, r.Hits+r.Misses, r.LocalAnswers, r.Wrong, r.errors(), r.Longest.Round(time.Millisecond),
		r.Disturbances, r.Recovery.Round(time.Millisecond), r.Took.Round(time.Second), strings.Join(r.Figures, "; "))
}

func thousands(n int64) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// held is what the process has of the system.
type held struct{ goroutines, files, children int }

func resources() held {
	files, _ := os.ReadDir("/proc/self/fd")
	children := 0
	tasks, _ := os.ReadDir("/proc/self/task")
	for _, task := range tasks {
		b, _ := os.ReadFile("/proc/self/task/" + task.Name() + "/children")
		children += len(strings.Fields(string(b)))
	}
	var all strings.Builder
	pprof.Lookup("goroutine").WriteTo(&all, 1)
	_, records, _ := strings.Cut(all.String(), "\n") // the first line counts all
	goroutines, _ := ours(0, records)
	return held{goroutines, len(files), children}
}

func (h held) String() string {
	return fmt.Sprintf("%d goroutines, %d files, %d child processes", h.goroutines, h.files, h.children)
}

// beyond tells what h has that before had not.
func (h held) beyond(before held) string {
	// The runtime's poller, opened once, has two files.
	if h.goroutines <= before.goroutines && h.files <= before.files+3 && h.children <= before.children {
		return ""
	}
	return fmt.Sprintf("at first %v, at the end %v", before, h)
}
