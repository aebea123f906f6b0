package pgtest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/lib/pq"
)

// After these the server is killed.
const (
	fastTimeout      = 30 * time.Second // of a fast shutdown
	immediateTimeout = 10 * time.Second // of an immediate one
)

var errPortTaken = errors.New("the port is taken")

// process is a running postmaster.
type process struct {
	*os.Process
	done chan struct{} // closed when it has ended
	err  error         // of Wait; read after done
}

// running returns the server's process, or nil; one may have ended by itself.
func (s *Server) running() *process {
	if s.proc != nil {
		select {
		case <-s.proc.done:
			s.proc = nil
		default:
		}
	}
	return s.proc
}

// launch runs postgres and waits until it takes connections.
func (s *Server) launch(ctx context.Context) error {
	if s.stopped {
		return errors.New("pgtest: the server has been stopped")
	}
	if s.running() != nil {
		return errors.New("pgtest: the server runs already")
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	log, err := s.openLog()
	if err != nil {
		return err
	}
	defer log.Close()
	before, err := log.Seek(0, 2)
	if err != nil {
		return fmt.Errorf("pgtest: %w", err)
	}

	// Not bound to ctx, which ends long before the server does.
	cmd := s.command(context.Background(), "postgres", "-D", s.DataDir(), "-p", fmt.Sprint(s.port))
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return s.explain("postgres", err)
	}
	p := &process{Process: cmd.Process, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	s.proc = p

	err = s.awaitReady(ctx, p)
	if err == nil {
		s.killed = false
		return nil
	}
	err = errors.Join(err, s.abort())
	if logged, _ := s.Log(); strings.Contains(logged[min(int(before), len(logged)):], "could not create any TCP/IP sockets") {
		err = errors.Join(errPortTaken, err)
	}
	return s.explain("postgres", err)
}

// awaitReady polls until the server answers a connection attempt. The lock file
// is asked first: it tells this server from another that took the same port.
func (s *Server) awaitReady(ctx context.Context, p *process) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-p.done:
			return fmt.Errorf("exited at once: %v", p.err)
		case <-ctx.Done():
			return fmt.Errorf("not ready: %w", ctx.Err())
		case <-tick.C:
		}
		if s.saysReady(p.Pid) && answers(ctx, s.DSN("postgres", "connect_timeout=5")) {
			return nil
		}
	}
}

// saysReady reads postmaster.pid: the first line is the postmaster's process,
// the eighth its status.
func (s *Server) saysReady(pid int) bool {
	b, err := os.ReadFile(filepath.Join(s.DataDir(), "postmaster.pid"))
	lines := strings.Split(string(b), "\n")
	return err == nil && len(lines) >= 8 && lines[0] == fmt.Sprint(pid) && strings.TrimSpace(lines[7]) == "ready"
}

// answers tells whether a server is there for clients. One that turns this
// client away is: pg_hba.conf may admit nobody.
func answers(ctx context.Context, dsn string) bool {
	connector, err := pq.NewConnector(dsn)
	if err != nil {
		return false
	}
	conn, err := connector.Connect(ctx)
	if err == nil {
		return conn.Close() == nil
	}
	const cannotConnectNow = "57P03"
	refused := (*pq.Error)(nil)
	return errors.As(err, &refused) && refused.Code != cannotConnectNow
}

// shutdown ends the server in order: its sessions, then a checkpoint.
func (s *Server) shutdown() error { return s.end(syscall.SIGINT, fastTimeout) }

// abort ends the server without a checkpoint. Other than kill, it leaves no
// shared memory behind.
func (s *Server) abort() error { return s.end(syscall.SIGQUIT, immediateTimeout) }

// end asks the server to end; it does nothing where none runs.
func (s *Server) end(sig syscall.Signal, timeout time.Duration) error {
	p := s.running()
	if p == nil {
		return nil
	}
	if err := p.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return errors.Join(fmt.Errorf("pgtest: shutdown: %w", err), s.kill())
	}
	select {
	case <-p.done:
		s.proc = nil
		return nil
	case <-time.After(timeout):
		return errors.Join(s.explain("shutdown", errors.New("timed out")), s.kill())
	}
}

// kill ends the server at once; it does nothing where none runs.
func (s *Server) kill() error {
	p := s.running()
	if p == nil {
		return nil
	}
	s.proc, s.killed = nil, true
	err := killTree(p.Pid)
	<-p.done
	return err
}

// command prepares a run of one of the server's binaries under the server's
// account, away from the terminal's signals and the caller's PG* variables.
func (s *Server) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(s.bin, name), args...)
	cmd.Dir = s.dir
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "PG") || strings.HasPrefix(v, "LC_") || strings.HasPrefix(v, "LANG")
	})
	cmd.Env = append(cmd.Env, "LC_ALL=C")
	cmd.SysProcAttr = s.account.attributes()
	cmd.Cancel = func() error { return signal(-cmd.Process.Pid, syscall.SIGKILL) }
	return cmd
}

// runLogged runs cmd to its end, writing into the server's log.
func (s *Server) runLogged(cmd *exec.Cmd) error {
	log, err := s.openLog()
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	return cmd.Run()
}

func (s *Server) logFile() string { return filepath.Join(s.dir, "log") }

func (s *Server) openLog() (*os.File, error) {
	f, err := os.OpenFile(s.logFile(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("pgtest: %w", err)
	}
	return f, nil
}

// explain adds to err what helps: the end of the log, or the directory the
// server's account may not enter.
func (s *Server) explain(what string, err error) error {
	err = fmt.Errorf("pgtest: %s: %w", what, err)
	if errors.Is(err, fs.ErrPermission) {
		for _, dir := range []string{s.bin, s.dir} {
			if closed := s.account.closedDir(dir); closed != "" {
				return fmt.Errorf("%w: running as root, so PostgreSQL runs as %s, who cannot enter %s: "+
					"allow it (chmod o+x), or choose another BinDir or TMPDIR", err, s.account.name, closed)
			}
		}
	}
	const tail = 2000
	logged, _ := s.Log()
	logged = strings.TrimSpace(logged[max(0, len(logged)-tail):])
	if logged != "" {
		err = fmt.Errorf("%w\nthe server's log ends:\n%s", err, logged)
	}
	return err
}
