package pgtest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func install(t *testing.T, dir string, names ...string) string {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestSearchPrefersPATHThenTheNewest(t *testing.T) {
	root := t.TempDir()
	client := install(t, filepath.Join(root, "client"), "psql", "postgres")
	onPath := install(t, filepath.Join(root, "path"), "initdb", "postgres")
	install(t, filepath.Join(root, "lib/9.6/bin"), "initdb", "postgres")
	newest := install(t, filepath.Join(root, "lib/15/bin"), "initdb", "postgres")
	install(t, filepath.Join(root, "lib/18/bin"), "psql")
	install(t, filepath.Join(root, "opt/postgresql@14/bin"), "initdb", "postgres")
	places := []string{filepath.Join(root, "lib/*/bin"), filepath.Join(root, "opt/postgresql@*/bin")}

	if got, err := search([]string{client, onPath}, places); got != onPath || err != nil {
		t.Errorf("on PATH: got %s, %v, want %s", got, err, onPath)
	}
	if got, err := search([]string{client}, places); got != newest || err != nil {
		t.Errorf("off PATH: got %s, %v, want %s", got, err, newest)
	}
}

func TestMissingPostgreSQLSaysWhatToInstall(t *testing.T) {
	_, err := search([]string{t.TempDir()}, nil)
	if err == nil {
		t.Fatal("got no error")
	}
	for _, want := range []string{"apt-get install postgresql", "dnf install postgresql-server", "brew install postgresql@",
		"FASTPGCACHE_TEST_BINDIR", "FASTPGCACHE_TEST_DSN"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is missing in: %v", want, err)
		}
	}
}

func TestBinDirOfTheConfigThenOfTheEnvironment(t *testing.T) {
	root := t.TempDir()
	a := install(t, filepath.Join(root, "a"), "initdb", "postgres")
	b := install(t, filepath.Join(root, "b"), "initdb", "postgres")
	t.Setenv("FASTPGCACHE_TEST_BINDIR", b)
	if got, err := findBinDir(a); got != a || err != nil {
		t.Errorf("got %s, %v, want %s", got, err, a)
	}
	if got, err := findBinDir(""); got != b || err != nil {
		t.Errorf("got %s, %v, want %s", got, err, b)
	}
	if _, err := findBinDir(root); err == nil || !strings.Contains(err.Error(), root) {
		t.Errorf("got %v, want an error naming %s", err, root)
	}
}
