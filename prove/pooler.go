package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

var poolerScenarios = []scenario{
	{name: "PgBouncer as documented", run: bouncer,
		what: "PgBouncer in transaction mode, five server connections for all, with the settings that docs/operations.md tells; its server connections are killed at times."},
	{name: "PgBouncer set wrong", run: bouncerWrong,
		what: "The same with each wrong setting. Wrong answers are expected here, and counted: no library above the driver can notice. Where PostgreSQL refuses, the error should tell what to set."},
}

// startBouncer starts PgBouncer before t's server and returns the options of a connection
// string that lead there.
func (t *trial) startBouncer() ([]string, error) {
	program, err := exec.LookPath("pgbouncer")
	if err != nil {
		program = "/usr/sbin/pgbouncer"
		if _, err := os.Stat(program); err != nil {
			return nil, skipped("there is no pgbouncer")
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	dir, err := os.MkdirTemp("/tmp", "fastpgcache-bouncer")
	if err != nil {
		return nil, err
	}
	t.cleanup(func() { os.RemoveAll(dir) })
	host, serverPort := t.server.Addr()
	ini := fmt.Sprintf(`[databases]
* = host=%s port=%d
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %d
unix_socket_dir =
auth_type = trust
auth_file = %s/users
pool_mode = transaction
max_client_conn = 500
default_pool_size = 5
ignore_startup_parameters = extra_float_digits
log_connections = 0
log_disconnections = 0
`, host, serverPort, port, dir)
	for file, text := range map[string]string{"ini": ini, "users": `"app" "app"`} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	os.Chmod(dir, 0o755)
	cmd := exec.Command(program, "-q", filepath.Join(dir, "ini"))
	if os.Getuid() == 0 { // which pgbouncer refuses
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}, Pdeathsig: syscall.SIGKILL}
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	t.stopPooler = func() {
		cmd.Process.Kill()
		cmd.Wait()
	}
	address := fmt.Sprintf("127.0.0.1:%d", port)
	if !await(10*time.Second, func() bool {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
		}
		return err == nil
	}) {
		return nil, fmt.Errorf("pgbouncer does not listen")
	}
	return []string{"host=127.0.0.1", fmt.Sprintf("port=%d", port)}, nil
}

func bouncer(t *trial) error {
	if err := t.start(pgtest.Config{}); err != nil {
		return err
	}
	options, err := t.startBouncer()
	if err != nil {
		return err
	}
	dsn := t.dsn(options...)
	for i, driver := range []string{"pq", "pgx-exec", "pgx-simple_protocol"} {
		p, err := t.open(driver, dsn, fastpgcache.Config{DisablePrepare: true, MaxStaleness: time.Duration(i) * 20 * time.Millisecond})
		if err != nil {
			return err
		}
		t.load(p, 6)
	}
	return t.each(20, func(round int) error {
		if round%2 == 0 {
			time.Sleep(time.Second)
			return nil
		}
		return t.exec(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'`)
	})
}

func bouncerWrong(t *trial) error {
	if err := t.start(pgtest.Config{}); err != nil {
		return err
	}
	options, err := t.startBouncer()
	if err != nil {
		return err
	}
	all := []struct {
		driver, name   string
		disablePrepare bool
	}{
		{"pq", "lib/pq, prepared", false},
		{"pq-text", "lib/pq, `DisablePrepare` without `binary_parameters=yes`", true},
		{"pgx", "pgx as it is", false},
		{"pgx", "pgx as it is, `DisablePrepare`", true},
		{"pgx-describe_exec", "pgx `describe_exec`, `DisablePrepare`", true},
		{"pgx-cache_describe", "pgx `cache_describe`, `DisablePrepare`", true},
		{"pgx-exec", "pgx `exec`, prepared", false},
	}
	deadline, _ := t.ctx.Deadline()
	for i, setting := range all {
		p, err := t.open(setting.driver, t.dsn(options...), fastpgcache.Config{DisablePrepare: setting.disablePrepare})
		if err != nil {
			return err
		}
		var states, hinted atomic.Int64
		d := time.Until(deadline) / time.Duration(len(all)-i)
		s := t.segment(p, 12, d, func(err error) {
			var e interface{ SQLState() string }
			if ok := asState(err, &e); ok {
				states.Add(1)
				if strings.Contains(err.Error(), "DisablePrepare") {
					hinted.Add(1)
				}
			}
		})
		t.result.figure("%s: %d calls, %d wrong of %d answers, %d errors of the server, %d of them with the hint", setting.name, s.calls, len(s.Wrong), s.Hits+s.Misses, states.Load(), hinted.Load())
		t.result.Hits += int64(s.Hits)
		t.result.Misses += int64(s.Misses)
		// Its sessions are full of the wrong statements.
		if err := t.exec(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'`); err != nil {
			return err
		}
	}
	t.emptied.Store(true) // counts may be anybody's here
	<-t.ctx.Done()
	return nil
}
