package pgtest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
)

// usualPlaces are where packages put the server's binaries off PATH.
var usualPlaces = []string{
	"/usr/lib/postgresql/*/bin",                          // Debian, Ubuntu
	"/usr/pgsql-*/bin",                                   // RPM of postgresql.org
	"/usr/bin",                                           // Fedora
	"/usr/libexec/postgresql*",                           // Alpine
	"/opt/homebrew/opt/postgresql@*/bin",                 // Homebrew on Apple silicon
	"/usr/local/opt/postgresql@*/bin",                    // Homebrew on Intel
	"/Applications/Postgres.app/Contents/Versions/*/bin", // Postgres.app
}

var errNoBinaries = errors.New(`pgtest: found no PostgreSQL server (initdb and postgres). Install one:
	Debian, Ubuntu:  apt-get install postgresql
	Fedora:          dnf install postgresql-server
	Homebrew:        brew install postgresql@17
or set FASTPGCACHE_TEST_BINDIR to the directory that holds initdb and postgres,
or set FASTPGCACHE_TEST_DSN to a superuser's connection string for a running server`)

// findBinDir returns the directory of initdb and postgres.
func findBinDir(dir string) (string, error) {
	if dir == "" {
		dir = os.Getenv("FASTPGCACHE_TEST_BINDIR")
	}
	if dir != "" {
		dir, err := filepath.Abs(dir)
		if err != nil {
			return "", fmt.Errorf("pgtest: %w", err)
		}
		if !hasBinaries(dir) {
			return "", fmt.Errorf("pgtest: initdb and postgres are not both in %s", dir)
		}
		return dir, nil
	}
	return search(filepath.SplitList(os.Getenv("PATH")), usualPlaces)
}

// search prefers the order of path, then the newest version in places.
func search(path, places []string) (string, error) {
	for _, dir := range path {
		if filepath.IsAbs(dir) && hasBinaries(dir) {
			return dir, nil
		}
	}
	var found []string
	for _, place := range places {
		dirs, err := filepath.Glob(place)
		if err != nil {
			return "", fmt.Errorf("pgtest: %w", err)
		}
		found = append(found, dirs...)
	}
	found = slices.DeleteFunc(found, func(dir string) bool { return !hasBinaries(dir) })
	if len(found) == 0 {
		return "", errNoBinaries
	}
	return slices.MaxFunc(found, func(a, b string) int {
		return int(100 * (pathVersion(a) - pathVersion(b)))
	}), nil
}

var lastNumber = regexp.MustCompile(`[0-9]+(\.[0-9]+)?`)

// pathVersion reads the version a directory is named for: 17 in
// /usr/lib/postgresql/17/bin, 0 where there is none.
func pathVersion(dir string) float64 {
	numbers := lastNumber.FindAllString(dir, -1)
	if len(numbers) == 0 {
		return 0
	}
	version, err := strconv.ParseFloat(numbers[len(numbers)-1], 64)
	if err != nil {
		return 0
	}
	return version
}

func hasBinaries(dir string) bool {
	for _, name := range []string{"initdb", "postgres"} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || !info.Mode().IsRegular() {
			return false
		}
		if runtime.GOOS != "windows" && info.Mode()&0o111 == 0 {
			return false
		}
	}
	return true
}
