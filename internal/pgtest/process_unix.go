//go:build unix

package pgtest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// account is whom the server runs as when the caller is root, as whom it refuses
// to run. A nil account is the caller's own.
type account struct {
	name     string
	uid, gid int
}

// serverAccount returns postgres, else nobody, for root and nil for others.
func serverAccount() (*account, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, uidErr := strconv.Atoi(u.Uid)
		gid, gidErr := strconv.Atoi(u.Gid)
		if err := errors.Join(uidErr, gidErr); err != nil {
			return nil, fmt.Errorf("pgtest: user %s: %w", name, err)
		}
		// Some systems write nobody as -2.
		return &account{name, int(uint32(uid)), int(uint32(gid))}, nil
	}
	return nil, errors.New("pgtest: PostgreSQL refuses to run as root, and there is no user postgres or nobody to run it as")
}

func (a *account) own(path string) error {
	if a == nil {
		return nil
	}
	return os.Chown(path, a.uid, a.gid)
}

// attributes run a command under the account, in a process group of its own.
func (a *account) attributes() *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{Setpgid: true}
	if a != nil {
		attr.Credential = &syscall.Credential{Uid: uint32(a.uid), Gid: uint32(a.gid)}
	}
	return attr
}

// closedDir returns the first directory on the way to dir that the account may
// not enter, or "". It reads mode bits alone.
func (a *account) closedDir(dir string) string {
	if a == nil {
		return ""
	}
	if parent := filepath.Dir(dir); parent != dir {
		if closed := a.closedDir(parent); closed != "" {
			return closed
		}
	}
	info, err := os.Stat(dir)
	if err != nil {
		return ""
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return ""
	}
	enter := fs.FileMode(0o001)
	switch {
	case int(stat.Uid) == a.uid:
		enter = 0o100
	case int(stat.Gid) == a.gid:
		enter = 0o010
	}
	if info.Mode()&enter == 0 {
		return dir
	}
	return ""
}

func signal(pid int, sig syscall.Signal) error { return syscall.Kill(pid, sig) }

// killTree ends a postmaster and its children with SIGKILL and waits for the
// children; the postmaster is the caller's to wait for. A signal to the process
// group would not do: each child of the postmaster leads a group of its own.
func killTree(postmaster int) error {
	// Stopped, it starts no child that the list would lack, and reaps none, so
	// that no process on it can be another by now.
	if err := signal(postmaster, syscall.SIGSTOP); err != nil {
		return fmt.Errorf("pgtest: kill: %w", err)
	}
	children, err := childrenOf(postmaster)
	for _, pid := range append(children, postmaster) {
		err = errors.Join(err, signal(pid, syscall.SIGKILL))
	}
	if err != nil {
		return fmt.Errorf("pgtest: kill: %w", err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for _, pid := range children {
		for runs(pid) {
			if time.Now().After(deadline) {
				return fmt.Errorf("pgtest: kill: process %d is still there", pid)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	return nil
}

// childrenOf reads /proc where there is one, for small containers have no ps,
// and asks ps elsewhere.
func childrenOf(parent int) ([]int, error) {
	var children []int
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	for _, stat := range stats {
		if _, ppid := readStat(stat); ppid == parent {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(stat)))
			if err != nil {
				return nil, err
			}
			children = append(children, pid)
		}
	}
	if len(stats) > 0 {
		return children, nil
	}
	out, err := exec.Command("ps", "-A", "-o", "pid=", "-o", "ppid=").Output()
	if err != nil {
		return nil, fmt.Errorf("ps: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		var pid, ppid int
		if n, _ := fmt.Sscan(line, &pid, &ppid); n == 2 && ppid == parent {
			children = append(children, pid)
		}
	}
	return children, nil
}

// runs tells whether a process is there and no zombie: the init of a small
// container may never collect those.
func runs(pid int) bool {
	if errors.Is(signal(pid, 0), syscall.ESRCH) {
		return false
	}
	state, _ := readStat(fmt.Sprintf("/proc/%d/stat", pid))
	return state != "Z" && state != "X"
}

// readStat reads "pid (command) state ppid …"; a command may hold anything.
func readStat(path string) (state string, ppid int) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", 0
	}
	_, err = fmt.Sscan(string(b[strings.LastIndexByte(string(b), ')')+1:]), &state, &ppid)
	if err != nil {
		return "", 0
	}
	return state, ppid
}
