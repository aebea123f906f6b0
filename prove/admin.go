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

var adminScenarios = []scenario{
	{name: "TRUNCATE, DROP, Setup, Force", run: recreations,
		what: "TRUNCATE, DROP with a set-up after it, set-ups that change nothing, and Force, under load."},
	{name: "VACUUM FULL, REINDEX, CLUSTER", run: rewrites,
		what: "Commands that rewrite the table or its index, and move it, under load. Nothing is lost, and every count is there."},
	{name: "restored dumps", run: restores,
		what: "Dumps of another cache, with triggers and with --disable-triggers, are restored into the live table, and set up again. Their entries are found, by filters too."},
	{name: "revoked grants", run: revocations,
		what: "Rights are revoked and given back by a set-up. In between every error is ErrNotPermitted."},
	{name: "connection limits", run: connectionLimits,
		what: "The role may have two connections at times, the server has none left at others."},
	{name: "clocks set back", run: clocksBack,
		what: "All times that the cache keeps for itself lie an hour ahead, as after the server's clock was set back: leases, trimming, cleanup. Nobody waits for that hour."},
}

func recreations(t *trial) error {
	if err := t.start(pgtest.Config{}); err != nil {
		return err
	}
	if err := t.usual(t.dsn()); err != nil {
		return err
	}
	l := t.log(nil)
	return t.each(60, func(round int) error {
		start := history.Now()
		var err error
		switch round % 4 {
		case 0:
			err = t.exec(`TRUNCATE cache`)
			t.wiped(l, start)
		case 1:
			err = t.exec(`DROP TABLE cache`)
			time.Sleep(300 * time.Millisecond)
			if err == nil {
				err = t.patiently(fastpgcache.SetupConfig{})
			}
			t.wiped(l, start)
		case 2:
			err = t.patiently(fastpgcache.SetupConfig{})
		case 3:
			err = t.patiently(fastpgcache.SetupConfig{Force: true})
			t.wiped(l, start)
		}
		return err
	})
}

// patiently sets up, again where that gives way to the load.
func (t *trial) patiently(cfg fastpgcache.SetupConfig) (err error) {
	for range 10 {
		if err = t.setup(cfg); err == nil {
			return nil
		}
	}
	return err
}

func rewrites(t *trial) error {
	if err := t.start(pgtest.Config{}); err != nil {
		return err
	}
	if err := t.usual(t.dsn()); err != nil {
		return err
	}
	commands := []string{`VACUUM FULL cache`, `REINDEX TABLE cache`, `REINDEX INDEX CONCURRENTLY cache_pkey`, `CLUSTER cache USING cache_pkey`,
		`VACUUM FREEZE cache`, `ANALYZE cache`, `VACUUM FULL cache_change`, `ALTER TABLE cache SET LOGGED`, `ALTER TABLE cache SET UNLOGGED`, `CHECKPOINT`}
	return t.each(60, func(round int) error { return t.exec(commands[round%len(commands)]) })
}

func restores(t *trial) error {
	if err := t.start(pgtest.Config{}); err != nil {
		return err
	}
	dump, err1 := program("pg_dump")
	psql, err2 := program("psql")
	if err1 != nil || err2 != nil {
		return skipped("there is no pg_dump and psql")
	}
	if err := t.exec(`CREATE DATABASE other`); err != nil {
		return err
	}
	other, err := openAdmin(t.server.DSN("other"))
	if err != nil {
		return err
	}
	defer other.Close()
	if err := fastpgcache.Setup(context.Background(), other, fastpgcache.SetupConfig{}); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "fastpgcache-dump")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "dump.sql")
	if err := t.usual(t.dsn()); err != nil {
		return err
	}
	l := t.log(nil)
	restored := 0
	defer func() {
		t.result.figure("%d dumps of 100 entries restored", restored)
		if restored == 0 {
			t.failf("no dump was restored")
		}
	}()
	deadline, _ := t.ctx.Deadline()
	ahead := int(min(time.Until(deadline)/4, 20*time.Second)/time.Duration(windowTime)) * windowMoves
	return t.each(60, func(round int) error {
		// Keys that nobody has come to yet.
		if _, err := other.Exec(`TRUNCATE cache`); err != nil {
			return err
		}
		first := window() + ahead
		values := map[int]int64{}
		var rows []string
		for key := first; key < first+100; key++ {
			value, text := l.Value()
			values[key] = value
			rows = append(rows, fmt.Sprintf(`('app', '%s', '%s')`, name(key), text))
		}
		if _, err := other.Exec(`INSERT INTO cache (user_id, key, value) VALUES ` + strings.Join(rows, ", ")); err != nil {
			return err
		}
		args := []string{"-d", t.server.DSN("other"), "--data-only", "-t", "cache", "-f", file}
		if round%2 == 1 {
			args = append(args, "--disable-triggers")
		}
		if out, err := exec.Command(dump, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("pg_dump: %s", out)
		}
		start := history.Now()
		if out, err := exec.Command(psql, "-d", t.server.DSN(t.database), "-X", "-q", "-1", "-v", "ON_ERROR_STOP=1", "-f", file).CombinedOutput(); err != nil {
			if strings.Contains(string(out), "duplicate key") { // somebody has come to them
				ahead *= 2
				return nil
			}
			return fmt.Errorf("psql: %s", out)
		}
		restored++
		for key, value := range values {
			l.Stored(key, value, start, 0, nil)
		}
		time.Sleep(time.Second)
		return t.patiently(fastpgcache.SetupConfig{}) // which mends the triggers
	})
}

// program finds one of PostgreSQL's.
func program(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/" + name)
	if len(found) == 0 {
		return "", os.ErrNotExist
	}
	return found[len(found)-1], nil
}

func revocations(t *trial) error {
	if err := t.start(pgtest.Config{}); err != nil {
		return err
	}
	if err := t.usual(t.dsn()); err != nil {
		return err
	}
	l := t.log(nil)
	revoke := []string{`REVOKE ALL ON cache FROM PUBLIC`, `REVOKE ALL ON cache_change FROM PUBLIC`, `REVOKE USAGE ON SCHEMA public FROM PUBLIC`,
		`REVOKE INSERT ON cache FROM PUBLIC`, `REVOKE SELECT ON cache_epoch FROM PUBLIC`, `DROP POLICY cache_own_rows ON cache`}
	err := t.each(40, func(round int) error {
		start := history.Now()
		if err := t.exec(revoke[round%len(revoke)]); err != nil {
			return err
		}
		time.Sleep(time.Second)
		err := t.patiently(fastpgcache.SetupConfig{Grantee: "public"})
		if round%len(revoke) == 2 && err == nil {
			err = t.exec(`GRANT USAGE ON SCHEMA public TO PUBLIC`)
		}
		if round%len(revoke) == 5 { // without a policy nobody sees anything
			t.hidden(l, start)
		}
		return err
	})
	for kind := range t.result.Errors {
		switch strings.TrimPrefix(kind, "WithTx ") {
		case "not permitted", "not set up", "deadline", "40P01", "55P03":
		default:
			t.failf("an error of %s", kind)
		}
	}
	return err
}

// hidden notes that from start until now nobody saw the entries, which are there still:
// a deletion found nothing to delete.
func (t *trial) hidden(l *history.Log, start int64) {
	end := history.Now()
	l.Note(history.Event{Kind: history.Removed, Key: history.AllKeys, Start: start, End: end})
	t.vain = append(t.vain, [2]int64{start, end})
}

func connectionLimits(t *trial) error {
	if err := t.start(pgtest.Config{Settings: map[string]string{"max_connections": "30"}}); err != nil {
		return err
	}
	if err := t.usual(t.dsn()); err != nil {
		return err
	}
	return t.each(40, func(round int) error {
		if round%2 == 0 {
			if err := t.exec(`ALTER ROLE app CONNECTION LIMIT 2`, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'`); err != nil {
				return err
			}
			time.Sleep(2 * time.Second)
			return t.exec(`ALTER ROLE app CONNECTION LIMIT -1`)
		}
		if err := t.exec(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'`); err != nil {
			return err
		}
		hog, err := sql.Open("postgres", t.server.DSN(t.database))
		if err != nil {
			return err
		}
		defer hog.Close()
		for range 40 {
			conn, err := hog.Conn(context.Background())
			if err != nil {
				break
			}
			defer conn.Close()
		}
		time.Sleep(2 * time.Second)
		return nil
	})
}

func clocksBack(t *trial) error {
	if err := t.start(pgtest.Config{}); err != nil {
		return err
	}
	if err := t.usual(t.dsn()); err != nil {
		return err
	}
	before := func() (rows int64, err error) {
		err = t.admin.QueryRow(`SELECT count(*) FROM cache_change`).Scan(&rows)
		return rows, err
	}
	err := t.each(40, func(int) error {
		return t.exec(
			`INSERT INTO cache_lease (user_id, key, holder, expires_at) SELECT 'app', 'key ' || g, 'dead', now() FROM generate_series(1, 100) g ON CONFLICT DO NOTHING`,
			fmt.Sprintf(`INSERT INTO cache_lease (user_id, key, holder, expires_at) SELECT 'app', 'key ' || g, 'dead', now() + interval '1 hour' FROM generate_series(%d, %[1]d + 60) g
				ON CONFLICT (user_id, key) DO UPDATE SET expires_at = excluded.expires_at`, window()),
			`UPDATE cache_epoch SET taken = ARRAY(SELECT t + interval '1 hour' FROM unnest(taken) t)`,
		)
	})
	if rows, err := before(); err == nil {
		t.result.figure("%d rows of the feed at the end", rows)
	}
	return err
}
