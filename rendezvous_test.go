package fastpgcache

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

func TestRendezvousIsTheDocumentedOne(t *testing.T) {
	// The published vectors of FNV-1a and SplitMix64's first outputs from the seed 0.
	for text, want := range map[string]uint64{"": 0xcbf29ce484222325, "a": 0xaf63dc4c8601ec8c, "foobar": 0x85944171f73967e8} {
		if got := fnv1a(text); got != want {
			t.Errorf("fnv1a(%q): got %#x, want %#x", text, got, want)
		}
	}
	if got, want := mix(0x9e3779b97f4a7c15), uint64(0xe220a8397b1dcdaf); got != want {
		t.Errorf("mix: got %#x, want %#x", got, want)
	}
	names := []string{"a", "b", "c", "d"}
	r := newRendezvous(names)
	rows := 0
	for _, row := range tableOf(t, "docs/scaling.md", "| key | shard of a, b, c, d |") {
		key, err := strconv.Unquote(row[0])
		check(t, err)
		if got := names[r.of(key)]; got != row[1] {
			t.Errorf("%q: got shard %s, docs/scaling.md has %s", key, got, row[1])
		}
		rows++
	}
	if rows < 5 {
		t.Errorf("docs/scaling.md has %d test vectors", rows)
	}
}

// tableOf returns the cells of the table under head, without their backquotes.
func tableOf(t *testing.T, page, head string) (rows [][]string) {
	t.Helper()
	text, err := os.ReadFile(page)
	check(t, err)
	_, text2, found := strings.Cut(string(text), head+"\n")
	if !found {
		t.Fatalf("%s has no table %s", page, head)
	}
	for i, line := range strings.Split(text2, "\n") {
		if !strings.HasPrefix(line, "|") {
			break
		}
		if i > 0 {
			var row []string
			for _, cell := range strings.Split(strings.Trim(line, "|"), "|") {
				row = append(row, strings.Trim(cell, " `"))
			}
			rows = append(rows, row)
		}
	}
	return rows
}

// The page's program is what its readers run.
func TestRendezvousInPython(t *testing.T) {
	python, err := exec.LookPath("python3")
	if err != nil {
		t.Skip("there is no python3")
	}
	page, err := os.ReadFile("docs/scaling.md")
	check(t, err)
	_, program, _ := strings.Cut(string(page), "```python\n")
	program, _, _ = strings.Cut(program, "```")
	names := []string{"sessions", "b", "ключ", "shard_3"}
	r := newRendezvous(names)
	var keys, want []string
	for i := range 200 {
		key := fmt.Sprintf("user:%d ключ", i)
		keys, want = append(keys, strconv.Quote(key)), append(want, names[r.of(key)])
	}
	program += fmt.Sprintf("\nfor key in [%s]: print(shard(key, [%q, %q, %q, %q]))\n",
		strings.Join(keys, ", "), names[3], names[2], names[1], names[0])
	command := exec.Command(python, "-")
	command.Stdin = strings.NewReader(program)
	out, err := command.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if got := strings.Join(strings.Fields(string(out)), " "); got != strings.Join(want, " ") {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestRendezvousSpreadsEvenly(t *testing.T) {
	for _, format := range []string{"key-%d", "%d", "user:%08d:profile", "https://example.com/item?id=%d"} {
		for _, names := range [][]string{{"a", "b", "c", "d"}, {"cache_0", "cache_1", "cache_2", "cache_3"}} {
			r, five := newRendezvous(names), newRendezvous(append(names[:4:4], "e"))
			var counts [4]int
			moved := 0
			for i := range 4000 {
				key := fmt.Sprintf(format, i)
				was, is := r.of(key), five.of(key)
				counts[was]++
				if is == 4 {
					moved++
				} else if is != was {
					t.Fatalf("%s moved from %d to %d, and neither is new", key, was, is)
				}
			}
			for i, n := range counts {
				if n < 880 || n > 1120 {
					t.Errorf("%s: shard %s has %d of 4000 keys", format, names[i], n)
				}
			}
			if moved < 680 || moved > 920 {
				t.Errorf("%s: %d of 4000 keys move to a fifth shard", format, moved)
			}
		}
	}
}

func BenchmarkRendezvous(b *testing.B) {
	for _, n := range []int{4, 16, 100} {
		names := make([]string, n)
		for i := range names {
			names[i] = fmt.Sprint("cache_", i)
		}
		r := newRendezvous(names)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			for b.Loop() {
				r.of("user:12345678:profile")
			}
		})
	}
}
