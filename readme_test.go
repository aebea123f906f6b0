package fastpgcache_test

import (
	"database/sql"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// blocks returns the code blocks of a language in the README.
func blocks(t *testing.T, language string) []string {
	t.Helper()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, m := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllStringSubmatch(string(readme), -1) {
		found = append(found, m[1])
	}
	if len(found) == 0 {
		t.Fatalf("the README has no %s blocks", language)
	}
	return found
}

func TestTheReadmesGoIsThatOfTheExamples(t *testing.T) {
	var examples string
	for _, file := range []string{"example_test.go", "example_loading_test.go", "lakebase/example_test.go", "drivertest/example_test.go"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		examples += string(text)
	}
	for _, block := range blocks(t, "go") {
		if !strings.Contains(examples, block) {
			t.Errorf("in none of the examples:\n%s", block)
		}
	}
}

func TestTheReadmesSQLRuns(t *testing.T) {
	db, err := sql.Open("postgres", pgtest.Database(t))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := fastpgcache.Setup(t.Context(), db, fastpgcache.SetupConfig{}); err != nil {
		t.Fatal(err)
	}
	for _, block := range blocks(t, "sql") {
		var got string
		if err := db.QueryRow(block).Scan(&got); err != nil || got != "u" {
			t.Errorf("%s: got %q, %v, want u", block, got, err)
		}
	}
}

// What the commands do is tested where they are; here, that they are there.
func TestTheReadmesCommandsAreThere(t *testing.T) {
	commands := regexp.MustCompile(`(?m)^(?:go run )?(?:\./|github\.com/fastpgcache/fastpgcache/)?((?:scripts|cmd)/[^\s@]+)`)
	for _, block := range blocks(t, "sh") {
		for _, m := range commands.FindAllStringSubmatch(block, -1) {
			info, err := os.Stat(m[1])
			if err != nil || !info.IsDir() && info.Mode()&0o111 == 0 {
				t.Errorf("%s cannot be run: %v", m[1], err)
			}
		}
	}
}

func TestTheReadmesLinksLeadSomewhere(t *testing.T) {
	files, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range append(files, "README.md", "CONTRIBUTING.md") {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`\]\(([^)#:]+)(?:#[^)]*)?\)`).FindAllStringSubmatch(string(text), -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(file), m[1])); err != nil {
				t.Errorf("%s: %v", file, err)
			}
		}
	}
}
