package main

import (
	"context"
	"database/sql"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/history"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

var serverScenarios = []scenario{
	{name: "crash of the server", run: crashes,
		what: "SIGKILL to every process of PostgreSQL under load, and a start half a second later. The table is empty then; no answer is from before."},
	{name: "restart of the server", run: restarts,
		what: "Clean restarts under load. Every entry is still there, and every count."},
	{name: "sessions killed", run: terminations,
		what: "pg_terminate_backend of every session of the role, several times a second."},
	{name: "failover", run: failovers,
		what: "Connections are cut and lead to another server: an empty one, then one where nothing is set up until later, and back."},
	{name: "full disk", run: fullDisk,
		what: "The file system of the tables is full for some seconds, now and then. Writes may fail, answers stay right, and all goes on when there is room."},
}

func crashes(t *trial) error {
	if err := t.start(pgtest.Config{}); err != nil {
		return err
	}
	if err := t.usual(t.dsn()); err != nil {
		return err
	}
	l := t.log(nil)
	return t.each(40, func(int) error {
		start := history.Now()
		if err := t.server.Kill(); err != nil {
			return err
		}
		time.Sleep(500 * time.Millisecond)
		err := t.server.StartAgain(context.Background())
		t.wiped(l, start)
		return err
	})
}

func restarts(t *trial) error {
	if err := t.start(pgtest.Config{}); err != nil {
		return err
	}
	if err := t.usual(t.dsn()); err != nil {
		return err
	}
	return t.each(40, func(int) error { return t.server.Restart(context.Background()) })
}

func terminations(t *trial) error {
	if err := t.start(pgtest.Config{}); err != nil {
		return err
	}
	if err := t.usual(t.dsn()); err != nil {
		return err
	}
	return t.each(60, func(int) error {
		for range 5 {
			if err := t.exec(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'`); err != nil {
				return err
			}
			time.Sleep(100 * time.Millisecond)
		}
		return nil
	})
}

func failovers(t *trial) error {
	if err := t.start(pgtest.Config{}); err != nil {
		return err
	}
	// The other server: a trial's part of its own, whose admin and server we swap.
	first, firstAdmin := t.server, t.admin
	if err := t.start(pgtest.Config{}); err != nil {
		return err
	}
	servers := []*pgtest.Server{first, t.server}
	admins := []*sql.DB{firstAdmin, t.admin}
	t.server, t.admin = first, firstAdmin
	p, err := newProxy(t, addr(first))
	if err != nil {
		return err
	}
	if err := t.usual(t.dsn(p.options()...)); err != nil {
		return err
	}
	l := t.log(nil)
	here := 0
	err = t.each(30, func(round int) error {
		there := 1 - here
		t.server, t.admin = servers[there], admins[there]
		begin := []string{`TRUNCATE cache, cache_change, cache_lease, cache_epoch`}
		if round%2 == 1 {
			begin = []string{`DROP TABLE cache, cache_change, cache_lease, cache_epoch, cache_limit CASCADE`,
				`DO $$ DECLARE f regprocedure; BEGIN FOR f IN SELECT oid FROM pg_proc WHERE proname LIKE 'cache\_%' LOOP EXECUTE 'DROP FUNCTION ' || f; END LOOP; END $$`}
		}
		if err := t.exec(begin...); err != nil {
			return err
		}
		start := history.Now()
		if err := p.leadTo(addr(servers[there])); err != nil {
			return err
		}
		// What the old one still runs no client can see.
		t.wiped(l, start)
		here = there
		if round%2 == 0 {
			return nil
		}
		time.Sleep(time.Second)
		return t.setup(fastpgcache.SetupConfig{})
	})
	if n := t.result.Errors["not set up"]; err == nil && t.result.Disturbances > 1 && n == 0 {
		t.failf("the server that was not set up gave no ErrNotSetUp")
	}
	return err
}

func addr(s *pgtest.Server) string {
	host, port := s.Addr()
	return fmt.Sprintf("%s:%d", host, port)
}

// fullDisk needs root, for a small file system.
func fullDisk(t *trial) error {
	if os.Getuid() != 0 {
		return skipped("it needs root, to mount a small file system")
	}
	if err := t.start(pgtest.Config{}); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("/tmp", "fastpgcache-disk")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", dir).CombinedOutput(); err != nil {
		return skipped(fmt.Sprintf("no small file system can be mounted: %s", out))
	}
	t.cleanup(func() {
		if out, err := exec.Command("umount", "-l", dir).CombinedOutput(); err != nil {
			t.failf("umount: %s", out)
		}
		os.RemoveAll(dir)
	})
	data := filepath.Join(dir, "data")
	// PostgreSQL runs as another user than root.
	if out, err := exec.Command("sh", "-c", `mkdir "$1" && chown --reference="$2" "$1" && chmod 755 "$3"`, "sh", data, t.server.DataDir(), dir).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %s", err, out)
	}
	if err := t.exec(`CREATE TABLESPACE small LOCATION '`+data+`'`,
		`ALTER TABLE cache SET TABLESPACE small`, `ALTER TABLE cache_change SET TABLESPACE small`, `ALTER INDEX cache_pkey SET TABLESPACE small`); err != nil {
		return err
	}
	if err := t.usual(t.dsn()); err != nil {
		return err
	}
	p, err := t.open("pq", t.dsn(), fastpgcache.Config{})
	if err != nil {
		return err
	}
	large := strings.Repeat("0123456789abcdef", 4000)
	t.wg.Go(func() { // so that room is needed
		c := &caller{trial: t, process: p, Log: t.log(p)}
		for i := 0; t.ctx.Err() == nil; i++ {
			time.Sleep(20 * time.Millisecond)
			c.call(func(ctx context.Context) error {
				return p.cache.Set(ctx, fmt.Sprint("large ", i%100), fmt.Sprint(i, large), 0)
			})
		}
	})
	return t.each(20, func(int) error {
		ballast := filepath.Join(dir, "ballast")
		f, err := os.Create(ballast)
		if err != nil {
			return err
		}
		block := make([]byte, 1<<16)
		for err == nil {
			_, err = f.Write(block)
		}
		for begin := time.Now(); time.Since(begin) < 2*time.Second; time.Sleep(10 * time.Millisecond) {
			f.Write(block[:4096]) // what has been freed
		}
		f.Close()
		return os.Remove(ballast)
	})
}
