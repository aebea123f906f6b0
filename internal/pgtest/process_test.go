//go:build unix

package pgtest

import (
	"context"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

func TestPlainUserNeedsNoRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("every other test here runs as a plain user")
	}
	nobody, err := user.Lookup("nobody") // PostgreSQL insists on a user with a name
	if err != nil {
		t.Skip(err)
	}
	uid, err := strconv.Atoi(nobody.Uid)
	if err != nil {
		t.Fatal(err)
	}
	dir := tempDir(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// go test's own directory is closed to others.
	copied := filepath.Join(dir, "pgtest.test")
	src, err := os.Open(exe)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	dst, err := os.OpenFile(copied, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(dst, src); err != nil {
		t.Fatal(err)
	}
	if err := dst.Close(); err != nil {
		t.Fatal(err)
	}
	c := startChild(t, "wait", func(cmd *exec.Cmd) {
		cmd.Path, cmd.Args, cmd.Dir = copied, []string{copied}, dir
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	})
	c.cmd.Process.Kill()
	c.wantGone(t)
}

func TestRootIsToldWhichDirectoryIsClosed(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("runs as root only")
	}
	dir := tempDir(t)
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("FASTPGCACHE_TEST_DIR", dir)
	_, err := Start(context.Background(), Config{})
	if err == nil || !strings.Contains(err.Error(), "cannot enter "+dir+":") {
		t.Errorf("got %v, want it to name %s", err, dir)
	}
	wantEmpty(t, dir)
}

func TestRootDropsItsPrivileges(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("runs as root only")
	}
	info, err := os.Stat(Shared(t).DataDir())
	if err != nil {
		t.Fatal(err)
	}
	if info.Sys().(*syscall.Stat_t).Uid == 0 || info.Mode().Perm() != 0o700 {
		t.Errorf("the data directory: got %v of uid 0", info.Mode())
	}
}
