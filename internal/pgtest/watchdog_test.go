//go:build unix

package pgtest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// child is the process of a run that is to end badly, or runs as another user.
// It prints the server's directory, postmaster and watchdog, then waits to be
// killed or for its standard input to end.
func child(how string) {
	if how == "starting" {
		go func() { Start(context.Background(), Config{}) }()
		fmt.Println("- 0 0")
		select {}
	}
	s, err := Start(context.Background(), Config{})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(s.dir, s.proc.Pid, s.watch.pid)
	io.Copy(io.Discard, os.Stdin)
	switch how {
	case "panic":
		panic("as a test may")
	case "exit":
		os.Exit(0)
	}
	if err := s.Stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

type childRun struct {
	cmd                  *exec.Cmd
	stdin                io.Closer
	dir                  string
	postmaster, watchdog int
}

func startChild(t *testing.T, how string, change func(*exec.Cmd)) childRun {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), "PGTEST_CHILD="+how)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if change != nil {
		change(cmd)
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := childRun{cmd: cmd, stdin: stdin}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatalf("child: %v: %v\n%s", err, cmd.Wait(), stderr.String())
	}
	if _, err := fmt.Sscan(line, &c.dir, &c.postmaster, &c.watchdog); err != nil {
		t.Fatalf("child said %q: %v", line, err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return c
}

// wantGone polls until neither server nor directory is there.
func (c childRun) wantGone(t *testing.T) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		_, err := os.Stat(c.dir)
		if errors.Is(err, os.ErrNotExist) && !runs(c.postmaster) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still there: directory %v, server %v", err == nil, runs(c.postmaster))
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func TestServerEndsWithItsProcess(t *testing.T) {
	for _, how := range []string{"exit", "panic"} {
		t.Run(how, func(t *testing.T) {
			c := startChild(t, how, nil)
			c.stdin.Close()
			c.wantGone(t)
		})
	}
	t.Run("SIGKILL", func(t *testing.T) {
		c := startChild(t, "wait", nil)
		c.cmd.Process.Kill()
		c.wantGone(t)
	})
	// As go test does when a test takes too long.
	t.Run("SIGQUIT", func(t *testing.T) {
		c := startChild(t, "wait", nil)
		c.cmd.Process.Signal(syscall.SIGQUIT)
		c.wantGone(t)
	})
}

func TestKilledWhileStartingLeavesNothing(t *testing.T) {
	for _, after := range []time.Duration{10, 50, 300, 900} {
		dir := tempDir(t)
		c := startChild(t, "starting", func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "FASTPGCACHE_TEST_DIR="+dir) })
		time.Sleep(after * time.Millisecond) // the moment is the test's input
		c.cmd.Process.Kill()
		c.cmd.Wait()
		deadline := time.Now().Add(10 * time.Second)
		for {
			entries, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			if len(entries) == 0 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("killed after %d ms: left %v", after, entries)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
}

func TestStartSweepsWhatDeadRunsLeft(t *testing.T) {
	dir := tempDir(t)
	t.Setenv("FASTPGCACHE_TEST_DIR", dir)
	live := startChild(t, "wait", nil)
	dead := startChild(t, "wait", nil)
	// Its watchdog dies first, so nobody is left to clean up.
	if err := syscall.Kill(dead.watchdog, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	dead.cmd.Process.Kill()
	dead.cmd.Wait()
	if _, err := os.Stat(dead.dir); err != nil || !runs(dead.postmaster) {
		t.Fatalf("the dead run left nothing to sweep: %v", err)
	}
	if err := os.Mkdir(filepath.Join(dir, dirPrefix+"unlocked"), 0o700); err != nil {
		t.Fatal(err) // a run that has just made its directory
	}

	sweep()
	dead.wantGone(t)
	if _, err := os.Stat(live.dir); err != nil || !runs(live.postmaster) {
		t.Errorf("the live run's server was swept: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, dirPrefix+"unlocked")); err != nil {
		t.Error(err)
	}
	live.stdin.Close()
	live.wantGone(t)
}

func TestReapSparesAProcessThatTookTheNumber(t *testing.T) {
	other := exec.Command("sleep", "60")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { other.Process.Kill(); other.Wait() }()
	w, err := newWatchdog(nil)
	if err != nil {
		t.Fatal(err)
	}
	pidfile := filepath.Join(w.dir, "data", "postmaster.pid")
	if err := os.WriteFile(pidfile, fmt.Appendln(nil, other.Process.Pid), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := w.close(); err != nil {
		t.Fatal(err)
	}
	if !runs(other.Process.Pid) {
		t.Error("it was killed")
	}
}
