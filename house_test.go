package fastpgcache_test

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// houseMap returns what CONTRIBUTING.md says where: each file or place with its floor,
// which is empty for what stands beside the house.
func houseMap(t *testing.T) map[string]string {
	t.Helper()
	text, err := os.ReadFile("CONTRIBUTING.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ = bytes.Cut(text, []byte("| floor | file |"))
	house, beside, ok := bytes.Cut(text, []byte("| beside it |"))
	beside, _, _ = bytes.Cut(beside, []byte("\n\n"))
	if !ok {
		t.Fatal("CONTRIBUTING.md has no map")
	}
	places, floor := map[string]string{}, ""
	for _, row := range regexp.MustCompile(`(?m)^\| (\w*) ?\|([^|]*)\|`).FindAllSubmatch(house, -1) {
		if len(row[1]) > 0 {
			floor = string(row[1])
		}
		for _, name := range quoted(row[2]) {
			places[name] = floor
		}
	}
	for _, row := range regexp.MustCompile(`(?m)^\|([^|]*)\|`).FindAllSubmatch(beside, -1) {
		for _, name := range quoted(row[1]) {
			places[name] = ""
		}
	}
	return places
}

func quoted(text []byte) (names []string) {
	for _, m := range regexp.MustCompile("`([^`]+)`").FindAllSubmatch(text, -1) {
		names = append(names, string(m[1]))
	}
	return names
}

func TestTheMapHasEveryFile(t *testing.T) {
	places := houseMap(t)
	for place := range places {
		if _, err := os.Stat(place); err != nil {
			t.Errorf("CONTRIBUTING.md: %v", err)
		}
	}
	files, err := filepath.Glob("*")
	if err != nil {
		t.Fatal(err)
	}
	inner, err := filepath.Glob("internal/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range append(files, inner...) {
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := places[file]; ok || strings.HasSuffix(file, "_test.go") || file == "doc.go" || !info.IsDir() && filepath.Ext(file) != ".go" {
			continue
		}
		if file[0] != '.' && file != "internal" && file != "docs" && file != "cmd" && file != "testdata" {
			t.Errorf("%s is not on the map of CONTRIBUTING.md", file)
		}
	}
}

func TestMechanismsKnowNeitherSQLNorACache(t *testing.T) {
	t.Parallel()
	args := []string{"build", "-o", os.DevNull}
	for place, floor := range houseMap(t) {
		if floor == "mechanisms" {
			args = append(args, place)
		}
	}
	if len(args) < 8 {
		t.Fatalf("the map has hardly any: %v", args)
	}
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		t.Errorf("the mechanisms alone: %v\n%s", err, out)
	}
}

func TestNoFileIsTooLong(t *testing.T) {
	const most = 500 // lines
	err := filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || filepath.Ext(path) != ".go" {
			return err
		}
		text, err := os.ReadFile(path)
		if n := bytes.Count(text, []byte("\n")); n > most {
			t.Errorf("%s has %d lines: its concept is two", path, n)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
