//go:build unix

package pgtest

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

const dirPrefix = "fastpgcache-pgtest-"

// reap reads the name of a directory and waits until the other end of its
// standard input is closed, by the kernel if need be. Then it ends the server
// that still runs in the directory and removes the directory. The immediate
// shutdown leaves no shared memory behind, as SIGKILL would. The process is
// asked for its command line lest its number have passed to another.
//
// The directory may refill for a moment when initdb was at work, and a server
// that has yet to write postmaster.pid ends by itself when its directory is gone.
const reap = `
trap '' HUP INT TERM
IFS= read -r dir || exit 0
read -r _
pidfile=$dir/data/postmaster.pid
pid=
[ -e "$pidfile" ] && read -r pid <"$pidfile"
case $([ -n "$pid" ] && { tr '\0' ' ' <"/proc/$pid/cmdline" || ps -ww -o command= -p "$pid"; }) in
*"$dir/data"*)
	kill -QUIT "$pid"
	n=0
	while [ -e "$pidfile" ] && kill -0 "$pid" && [ $n -lt 100 ]; do sleep 0.1; n=$((n+1)); done
	[ -e "$pidfile" ] && kill -KILL "$pid"
	;;
esac
n=0
while rm -rf "$dir"; [ -e "$dir" ] && [ $n -lt 50 ]; do sleep 0.1; n=$((n+1)); done
[ ! -e "$dir" ]
`

// watchdog is a shell that runs reap over dir as soon as this process ends or
// closes the pipe.
type watchdog struct {
	dir  string
	lock *os.File // dir/lock, locked; a free one belongs to a dead run
	pid  int      // the shell's
	pipe *os.File
	done chan struct{} // closed when the shell has ended
	err  error         // of its end; read after done
}

// parentDir is where servers have their directories.
func parentDir() string { return cmp.Or(os.Getenv("FASTPGCACHE_TEST_DIR"), os.TempDir()) }

// newWatchdog makes a directory for a server of the account and guards it.
func newWatchdog(a *account) (_ *watchdog, err error) {
	parent, err := filepath.Abs(parentDir())
	if err != nil {
		return nil, fmt.Errorf("pgtest: %w", err)
	}
	r, pipe, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("pgtest: %w", err)
	}
	defer r.Close()
	cmd := reaper(r)
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("pgtest: %w", errors.Join(err, pipe.Close()))
	}
	w := &watchdog{
		dir:  filepath.Join(parent, fmt.Sprintf("%s%016x", dirPrefix, rand.Uint64())),
		pid:  cmd.Process.Pid,
		pipe: pipe,
		done: make(chan struct{}),
	}
	// It also keeps w from being collected, which would close the pipe and so end
	// a server to which nobody refers any more but by its DSN.
	go func() {
		w.err = cmd.Wait()
		close(w.done)
	}()
	if err := w.makeDir(a); err != nil {
		return nil, errors.Join(fmt.Errorf("pgtest: %w", err), w.close())
	}
	return w, nil
}

// makeDir makes the directory, of which the shell knows by then.
func (w *watchdog) makeDir(a *account) error {
	if _, err := fmt.Fprintln(w.pipe, w.dir); err != nil {
		return err
	}
	if err := os.Mkdir(w.dir, 0o700); err != nil {
		return err
	}
	if a != nil {
		if err := os.Chmod(w.dir, 0o755); err != nil {
			return err
		}
	}
	data := filepath.Join(w.dir, "data")
	if err := errors.Join(os.Mkdir(data, 0o700), a.own(data)); err != nil {
		return err
	}
	// Named lock only once it is locked: sweep takes a free lock for a dead run.
	lock, err := os.Create(filepath.Join(w.dir, "lock.new"))
	if err != nil {
		return err
	}
	w.lock = lock
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return err
	}
	return os.Rename(lock.Name(), filepath.Join(w.dir, "lock"))
}

// reaper prepares a run of reap, in a process group that no terminal signals.
func reaper(stdin io.Reader) *exec.Cmd {
	cmd := exec.Command("/bin/sh", "-c", reap)
	cmd.Dir = "/"
	cmd.Stdin = stdin
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// close has the directory removed, and what still runs in it ended.
func (w *watchdog) close() error {
	err := w.pipe.Close()
	<-w.done
	if w.lock != nil {
		err = errors.Join(err, w.lock.Close())
	}
	if err := errors.Join(err, w.err); err != nil {
		return fmt.Errorf("pgtest: removing %s: %w", w.dir, err)
	}
	return nil
}

// sweep reaps what dead runs left: those whose watchdog was killed as well, as
// when a container is. Best effort: it is not this run's business to fail on it.
func sweep() {
	dirs, err := filepath.Glob(filepath.Join(parentDir(), dirPrefix+"*"))
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
	_ = reaper(strings.NewReader(dir + "\n")).Run()
}
