// Command bites shows that the tests of the negative filter would notice its faults:
// it makes them one by one, each in a copy of the module, and runs the model checker,
// and the test of own writes during a rebuild, which the checker meets too seldom to
// fail for each time.
//
//	go run ./internal/bites [-ops n] [fault…]
package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// fault is a change of the package: of every old to new.
type fault struct{ name, old, new string }

var faults = []fault{
	{"none", "", ""},
	{"running-transactions-forgotten",
		`n.cache.args(s.xmax, s.running, n.table)`,
		`n.cache.args(s.xmax, "", n.table)`},
	{"epoch-ignored",
		`got.token.String != g.token,`,
		`false,`},
	{"false-positives-deleted",
		"n.falsePositives.Add(1)\n",
		"n.falsePositives.Add(1)\ng.filter.deleteHash(hashOf(key))\n"},
	{"own-writes-not-loaded",
		"if c.negative == nil {\n\t\treturn\n\t}",
		"if c.negative == nil || c.negative.loading { return }"},
	{"own-writes-not-entered-again",
		"defer c.enter(",
		"defer func(...string) {}("},
	{"expired-rows-not-loaded",
		`AND key > $1 ORDER`,
		`AND key > $1 AND (expires_at IS NULL OR expires_at > statement_timestamp()) ORDER`},
	{"valid-from-after-the-statement",
		"n.catchUps.Add(1)\n",
		// As over a slow network: what is wrong is as large as the round trip.
		"n.catchUps.Add(1)\ntime.Sleep(2 * time.Millisecond)\nnext.at = time.Now()\n"},
	{"never-too-old",
		`g.age() > n.maxStaleness`,
		`g.age() > 2*n.maxStaleness`},
}

func main() {
	ops := flag.Int("ops", 30000, "operations of the model checker for each fault")
	flag.Parse()
	failed := false
	for _, f := range faults {
		if flag.NArg() > 0 && !slices.Contains(flag.Args(), f.name) {
			continue
		}
		caught, how, err := try(f, *ops)
		if err != nil {
			fmt.Fprintln(os.Stderr, f.name, err)
			os.Exit(1)
		}
		verdict := "caught"
		if !caught {
			verdict = "not caught"
		}
		failed = failed || caught == (f.name == "none")
		fmt.Printf("%-32s %-10s %s\n", f.name, verdict, how)
	}
	if failed {
		os.Exit(1)
	}
}

var found = regexp.MustCompile(`\d+ stores, .* wrong`)

// try reports whether the model checker fails with f, and what it says.
func try(f fault, ops int) (caught bool, how string, err error) {
	dir, err := os.MkdirTemp("", "bites")
	if err != nil {
		return false, "", err
	}
	defer os.RemoveAll(dir)
	if err := os.CopyFS(dir, os.DirFS(".")); err != nil {
		return false, "", err
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return false, "", err
	}
	changed := f.old == ""
	for _, file := range files {
		source, err := os.ReadFile(file)
		if err != nil {
			return false, "", err
		}
		if f.old == "" || strings.HasSuffix(file, "_test.go") || !strings.Contains(string(source), f.old) {
			continue
		}
		changed = true
		if err := os.WriteFile(file, []byte(strings.ReplaceAll(string(source), f.old, f.new)), 0o644); err != nil {
			return false, "", err
		}
	}
	if !changed {
		return false, "", fmt.Errorf("%q stands nowhere", f.old)
	}
	cmd := exec.Command("go", "test", "-count=1", "-v", "-run", "^(TestNoMissIsWrong|TestOwnWritesDuringARebuildAreNeverMissed)$", ".")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), fmt.Sprint("FASTPGCACHE_MODEL_OPS=", ops))
	out, err := cmd.CombinedOutput()
	how = found.FindString(string(out))
	if how == "" {
		return false, "", fmt.Errorf("the tests did not run: %s", out)
	}
	if strings.Contains(string(out), "--- FAIL: TestOwnWrites") {
		how += "; the test of own writes fails, too"
	}
	return err != nil, how, nil
}
