package pgtest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha512"
	"encoding/base64"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
)

// pack makes an npm package of name, content, name, content, …
func pack(t *testing.T, files ...string) ([]byte, release) {
	t.Helper()
	var b bytes.Buffer
	zipped := gzip.NewWriter(&b)
	w := tar.NewWriter(zipped)
	for i := 0; i < len(files); i += 2 {
		if err := w.WriteHeader(&tar.Header{Name: files[i], Mode: 0o755, Size: int64(len(files[i+1])), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(files[i+1])); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := zipped.Close(); err != nil {
		t.Fatal(err)
	}
	sum := sha512.Sum512(b.Bytes())
	return b.Bytes(), release{"toy", base64.StdEncoding.EncodeToString(sum[:])}
}

// registry serves a package, and counts how often.
func registry(t *testing.T, archive []byte) (url string, served *int) {
	served = new(int)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		*served++
		if r.URL.Path != "/@embedded-postgres/toy/-/toy-"+fetchedVersion+".tgz" {
			t.Errorf("asked for %s", r.URL.Path)
		}
		w.Write(archive)
	}))
	t.Cleanup(s.Close)
	return s.URL, served
}

func TestAFetchedReleaseIsWholeAndFetchedOnce(t *testing.T) {
	archive, r := pack(t,
		"package/native/bin/postgres", "#!/bin/sh\n",
		"package/native/lib/libx.so.1.2", "x",
		"package/native/pg-symlinks.json", `[{"source":"native/lib/libx.so.1.2","target":"native/lib/libx.so"}]`)
	url, served := registry(t, archive)
	dir := filepath.Join(t.TempDir(), "cache", "17")
	for range 2 {
		if err := r.fetch(t.Context(), url, dir); err != nil {
			t.Fatal(err)
		}
	}
	if *served != 1 {
		t.Errorf("fetched %d times, want once", *served)
	}
	if info, err := os.Stat(filepath.Join(dir, "native/bin/postgres")); err != nil || info.Mode().Perm()&0o111 == 0 {
		t.Errorf("the program cannot be run: %v, %v", info, err)
	}
	if to, err := os.Readlink(filepath.Join(dir, "native/lib/libx.so")); to != "libx.so.1.2" {
		t.Errorf("the link leads to %q, %v", to, err)
	}
}

func TestWhatIsNotTheReleaseLeavesNothing(t *testing.T) {
	archive, good := pack(t, "package/native/bin/postgres", "")
	escaping, escape := pack(t, "package/../../escaped", "")
	for name, try := range map[string]struct {
		archive []byte
		release
	}{
		"another sum":           {append(archive, 0), good},
		"cut short":             {archive[:len(archive)/2], good},
		"a name that leads out": {escaping, escape},
	} {
		url, _ := registry(t, try.archive)
		cache := t.TempDir()
		if err := try.fetch(t.Context(), url, filepath.Join(cache, "pg", "17")); err == nil {
			t.Errorf("%s: no error", name)
		}
		left, err := filepath.Glob(filepath.Join(cache, "*", "*"))
		if err != nil || len(left) > 0 {
			t.Errorf("%s: left %v, %v", name, left, err)
		}
	}
}
