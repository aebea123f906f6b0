package main

import (
	"fmt"
	"go/scanner"
	"go/token"
	"io"
	"os"
	"strings"
)

// screen is what the tour is shown on: with colours, and figures that change, where it is
// a terminal.
type screen struct {
	io.Writer
	terminal bool
}

func newScreen(f *os.File) *screen {
	info, err := f.Stat()
	terminal := err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb" && os.Getenv("NO_COLOR") == ""
	return &screen{f, terminal}
}

// Colours of a terminal.
const (
	bold   = "1"
	dim    = "2"
	green  = "32"
	yellow = "33"
	blue   = "34"
	cyan   = "36"
)

func (s *screen) in(colour, text string) string {
	if !s.terminal || text == "" {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

// title begins a step.
func (s *screen) title(text string) { fmt.Fprintf(s, "\n%s\n", s.in(bold, text)) }

// note says something beside the code.
func (s *screen) note(format string, args ...any) {
	fmt.Fprintln(s, s.in(dim, fmt.Sprintf(format, args...)))
}

// say tells a result of the code.
func (s *screen) say(format string, args ...any) {
	fmt.Fprintf(s, "%s %s\n", s.in(cyan, "→"), fmt.Sprintf(format, args...))
}

// status is a line that the next one replaces; without a terminal only what is said counts.
func (s *screen) status(text string) {
	if s.terminal {
		fmt.Fprintf(s, "\r\x1b[K%s", s.in(dim, text))
	}
}

// code shows Go code.
func (s *screen) code(text string) {
	fmt.Fprintln(s)
	for _, line := range strings.Split(strings.TrimRight(s.highlight(text), "\n"), "\n") {
		fmt.Fprintln(s, strings.TrimRight("    "+strings.ReplaceAll(line, "\t", "    "), " "))
	}
	fmt.Fprintln(s)
}

// highlight colours comments, strings and keywords.
func (s *screen) highlight(text string) string {
	src := []byte(text)
	file := token.NewFileSet().AddFile("", -1, len(src))
	var words scanner.Scanner
	words.Init(file, src, func(token.Position, string) {}, scanner.ScanComments)
	var b strings.Builder
	done := 0
	for {
		pos, kind, literal := words.Scan()
		if kind == token.EOF {
			return b.String() + text[done:]
		}
		colour := ""
		switch {
		case kind == token.COMMENT:
			colour = green
		case kind == token.STRING:
			colour = yellow
		case kind.IsKeyword():
			colour = blue
		default:
			continue
		}
		start := file.Offset(pos)
		b.WriteString(text[done:start])
		b.WriteString(s.in(colour, literal))
		done = start + len(literal)
	}
}
