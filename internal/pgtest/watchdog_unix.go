//go:build unix

package pgtest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
)

const dirPrefix = "fastpgcache-pgtest-"

// reap waits until the other end of its standard input is closed, by the
// kernel if need be, then ends the server that still runs in the directory $1
// and removes the directory. The immediate shutdown leaves no shared memory
// behind, as SIGKILL would. The process is asked for its command line lest its
// number have passed to another.
//
// The directory may refill for a moment when initdb was at work, and a server
// that has yet to write postmaster.pid ends by itself when its directory is gone.
const reap = `
trap '' HUP INT TERM
read -r _
pidfile=${1:?}/data/postmaster.pid
pid=
[ -e "$pidfile" ] && read -r pid <"$pidfile"
case $([ -n "$pid" ] && { tr '\0' ' ' <"/proc/$pid/cmdline" || ps -ww -o command= -p "$pid"; }) in
*"$1/data"*)
	kill -QUIT "$pid"
	n=0
	while [ -e "$pidfile" ] && kill -0 "$pid" && [ $n -lt 100 ]; do sleep 0.1; n=$((n+1)); done
	[ -e "$pidfile" ] && kill -KILL "$pid"
	;;
esac
n=0
while rm -rf "$1"; [ -e "$1" ] && [ $n -lt 50 ]; do sleep 0.1; n=$((n+1)); done
[ ! -e "$1" ]
`

// watchdog is a shell that runs reap over dir as soon as this process ends or
// closes the pipe.
//
// As long as either lives, one of them holds the lock on dir/lock; a directory
// whose lock is free belongs to a dead run.
type watchdog struct {
	dir  string
	pipe *os.File
	done chan struct{} // closed when the shell has ended
	err  error         // of its end; read after done
}

// newWatchdog makes a directory and guards it.
func newWatchdog(a *account) (*watchdog, error) {
	w, err := startWatchdog(a)
	if err != nil {
		return nil, fmt.Errorf("pgtest: %w", err)
	}
	return w, nil
}

func startWatchdog(a *account) (_ *watchdog, err error) {
	dir, err := os.MkdirTemp("", dirPrefix)
	if err != nil {
		return nil, err
	}
	// reap finds the server by this path.
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	if a != nil {
		if err := os.Chmod(dir, 0o711); err != nil {
			return nil, err
		}
	}
	data := filepath.Join(dir, "data")
	if err := errors.Join(os.Mkdir(data, 0o700), a.own(data)); err != nil {
		return nil, err
	}

	// Named lock only once it is locked: sweep takes a free lock for a dead run.
	lock, err := os.Create(filepath.Join(dir, "lock.new"))
	if err != nil {
		return nil, err
	}
	defer lock.Close() // the shell has it, too
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, err
	}
	if err := os.Rename(lock.Name(), filepath.Join(dir, "lock")); err != nil {
		return nil, err
	}

	r, pipe, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd := reaper(dir, lock)
	cmd.Stdin = r
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, pipe.Close())
	}
	w := &watchdog{dir: dir, pipe: pipe, done: make(chan struct{})}
	go func() {
		w.err = cmd.Wait()
		runtime.KeepAlive(pipe) // collected, it would be closed, and the server end
		close(w.done)
	}()
	return w, nil
}

// reaper prepares a run of reap, in a process group that no terminal signals.
func reaper(dir string, lock *os.File) *exec.Cmd {
	cmd := exec.Command("/bin/sh", "-c", reap, "sh", dir)
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{lock}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// close has the directory removed, and what still runs in it ended.
func (w *watchdog) close() error {
	err := w.pipe.Close()
	<-w.done
	if err := errors.Join(err, w.err); err != nil {
		return fmt.Errorf("pgtest: removing %s: %w", w.dir, err)
	}
	return nil
}

// sweep reaps what dead runs left: those whose watchdog was killed as well, as
// when a container is. Best effort: it is not this run's business to fail on it.
func sweep() {
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), dirPrefix+"*"))
	if err != nil {
		return
	}
	for _, dir := range dirs {
		sweepDir(dir)
	}
}

func sweepDir(dir string) {
	info, err := os.Lstat(dir)
	if err != nil || !info.IsDir() {
		return
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); !ok || int(stat.Uid) != os.Geteuid() {
		return
	}
	lock, err := os.Open(filepath.Join(dir, "lock"))
	if err != nil {
		return
	}
	defer lock.Close()
	if syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		return
	}
	_ = reaper(dir, lock).Run()
}
