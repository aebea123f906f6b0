package fastpgcache_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
	"github.com/lib/pq"
)

func TestSetupByManyAtOnce(t *testing.T) {
	t.Parallel()
	for _, start := range []string{"an empty database", "the Python library's table"} {
		t.Run(start, func(t *testing.T) {
			l := newLab(t)
			schema := "many"
			if start != "an empty database" {
				schema = "public"
				l.exec(l.admin, pythonTable)
			}
			var wg sync.WaitGroup
			for range 12 {
				db := l.open(l.dsn + ` default_transaction_isolation=serializable`)
				wg.Go(func() {
					for range 2 {
						if err := fastpgcache.Setup(t.Context(), db, fastpgcache.SetupConfig{Schema: schema}); err != nil {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
			c := l.cache(l.admin, fastpgcache.Config{Schema: schema})
			if err := c.Set(t.Context(), "k", "v", 0); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestSetupAgainChangesNothingAndWaitsForNobody(t *testing.T) {
	l := newLab(t)
	_, admin := l.administrator()
	service, _ := l.role()
	cfg := fastpgcache.SetupConfig{Schema: "again", Service: service}
	l.setup(admin, cfg)
	before := l.catalog("again")
	l.exec(l.admin, `INSERT INTO again.cache (user_id, key, value) VALUES ('u', 'k', 'v')`)

	// What a writer at work holds, and more.
	tx, err := l.admin.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	for _, statement := range []string{
		`UPDATE again.cache SET value = 'w'`,
		`INSERT INTO again.cache (user_id, key, value) VALUES ('u', 'l', 'v')`,
		`DELETE FROM again.cache WHERE key = 'k'`,
		`INSERT INTO again.cache_lease VALUES ('u', 'k', 'h', now())`,
		`INSERT INTO again.cache_epoch (user_id) VALUES ('u') ON CONFLICT DO NOTHING`, // trimming may have made it
		`INSERT INTO again.cache_change (user_id) VALUES ('u')`,
		`LOCK TABLE again.cache_limit IN ACCESS SHARE MODE`,
		`SELECT again.cache_set('u', 'm', 'v')`,
	} {
		if _, err := tx.Exec(statement); err != nil {
			t.Fatal(err)
		}
	}
	var owner string
	if err := admin.QueryRow(`SELECT current_user`).Scan(&owner); err != nil {
		t.Fatal(err)
	}
	impatient := pgtest.WithUser(l.dsn, owner) + ` options='-c lock_timeout=1s'`
	for range 2 {
		l.setup(l.open(impatient), cfg)
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	if after := l.catalog("again"); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestSetupGivesUpOnALongTransaction(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.exec(l.admin, pythonTable)
	tx, err := l.admin.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec(`INSERT INTO cache VALUES ('u', 'k', 'v')`); err != nil {
		t.Fatal(err)
	}
	err = fastpgcache.Setup(t.Context(), l.open(l.dsn+` options='-c lock_timeout=100ms'`), fastpgcache.SetupConfig{})
	if got := sqlState(err); got != "55P03" || !strings.Contains(err.Error(), "another transaction") {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := fastpgcache.Setup(ctx, l.admin, fastpgcache.SetupConfig{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want %v", err, context.DeadlineExceeded)
	}
}

func TestSetupUpgradesThePythonLibrarysTable(t *testing.T) {
	l := newLab(t)
	owner, admin := l.administrator()
	user, db := l.role()
	l.exec(admin, pythonTable)
	l.exec(admin, `GRANT ALL ON cache TO PUBLIC`)
	l.exec(admin, `INSERT INTO cache SELECT CASE g % 3 WHEN 0 THEN $1 ELSE 'u' || g % 10 END, 'k' || g, repeat('ä', g % 300),
		CASE g % 4 WHEN 0 THEN now() - interval '1 day' WHEN 1 THEN now() + interval '1 day' WHEN 2 THEN 'infinity' END,
		CASE WHEN g % 5 > 0 THEN now() - interval '1 hour' END FROM generate_series(1, 5000) g`, user)
	l.exec(admin, `ANALYZE cache`)
	// Not the cache's, in spite of their names.
	l.exec(admin, `CREATE TABLE stranger (x int); CREATE INDEX cache_change_user_id_xid_idx ON stranger (x)`)
	const entries = `SELECT md5(string_agg(concat_ws(',', user_id, key, value, expires_at, coalesce(created_at, now()) > now() - interval '1 minute'), ';'
		ORDER BY user_id COLLATE "C", key COLLATE "C")) FROM cache`
	before := l.text(admin, entries)
	l.setup(admin, fastpgcache.SetupConfig{})
	if got := l.text(admin, entries); got != before {
		t.Error("the entries are not what they were")
	}
	l.want(l.admin, int64(5000), `SELECT count(*) FROM cache WHERE mark IS NULL AND value_bytes IS NULL`)
	l.want(l.admin, "x", `SELECT attname::text FROM pg_attribute WHERE attrelid = 'stranger'::regclass AND attnum = 1`)
	l.want(l.admin, int64(0), `SELECT count(*) FROM pg_statistic WHERE starelid = 'cache'::regclass AND staattnum IN (
		SELECT attnum FROM pg_attribute WHERE attrelid = 'cache'::regclass AND attname IN ('key', 'value', 'value_bytes'))`)

	// Except for the order of its columns it is what a fresh set-up makes.
	upgraded := strings.ReplaceAll(l.catalog("public"), "cache_change_user_id_xid_idx1", "cache_change_user_id_xid_idx")
	fresh := newLab(t)
	fresh.exec(fresh.admin, `GRANT CREATE ON SCHEMA public TO `+owner)
	freshAdmin := fresh.open(pgtest.WithUser(fresh.dsn, owner))
	fresh.setup(freshAdmin, fastpgcache.SetupConfig{})
	t.Cleanup(func() { fresh.exec(fresh.admin, `DROP OWNED BY `+owner) })
	for line := range strings.Lines(fresh.catalog("public")) {
		if !strings.Contains(upgraded, line) {
			t.Errorf("upgraded, it lacks: %s", line)
		}
	}
	for _, gone := range []string{"idx_cache", "accessed_at", "PUBLIC TRUNCATE"} {
		if strings.Contains(upgraded, gone) {
			t.Errorf("upgraded, it has %s", gone)
		}
	}

	c := l.cache(db, fastpgcache.Config{})
	var got string
	if found, err := c.Get(t.Context(), "k3", &got); err != nil || !found || got != strings.Repeat("ä", 3) {
		t.Errorf("Get: %q, %v, %v", got, found, err)
	}
	if err := c.Set(t.Context(), "k12", []byte{0, 255}, time.Hour); err != nil { // over an expired one
		t.Error(err)
	}
	if removed, err := c.Cleanup(t.Context()); err != nil || removed != 415 {
		t.Errorf("Cleanup of a user's own: %d, %v; want 415", removed, err)
	}
	if removed, err := l.cache(admin, fastpgcache.Config{}).Cleanup(t.Context()); err != nil || removed != 834 {
		t.Errorf("Cleanup of the rest: %d, %v; want 834", removed, err)
	}
}

func TestSetupForce(t *testing.T) {
	l := newLab(t)
	l.setup(l.admin, fastpgcache.SetupConfig{MaxBytes: 1 << 30})
	before := l.catalog("public")
	fill := func() {
		l.exec(l.admin, `SELECT cache_set('u', 'k', 'v'); INSERT INTO cache_epoch (user_id) VALUES ('u') ON CONFLICT DO NOTHING;
			INSERT INTO cache_lease VALUES ('u', 'l', 'h', now() + interval '10 s')`)
	}
	fill()
	l.setup(l.admin, fastpgcache.SetupConfig{})
	l.want(l.admin, "v", `SELECT cache_get('u', 'k')`)
	l.want(l.admin, int64(1), `SELECT count(*) FROM cache_epoch`)
	// What would keep a table from being dropped.
	_, db := l.role()
	db.SetMaxOpenConns(1)
	l.exec(db, `CREATE TEMP TABLE x (c public.cache)`)
	l.exec(l.admin, `CREATE VIEW report AS SELECT count(*) FROM cache`)
	l.setup(l.admin, fastpgcache.SetupConfig{Force: true})
	l.want(l.admin, int64(0), `SELECT (SELECT count(*) FROM cache) + (SELECT count(*) FROM cache_epoch) + (SELECT count(*) FROM cache_lease) + (SELECT count(*) FROM cache_change)`)
	l.want(l.admin, int64(1<<30), `SELECT max_bytes FROM cache_limit WHERE user_id = ''`)
	fill()
	l.exec(l.admin, `DROP VIEW report`)
	if after := l.catalog("public"); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// What a set-up is not told stays as it was; what it changes, it says.
func TestSetupChangesWhatItIsToldAndSaysSo(t *testing.T) {
	l := newLab(t)
	owner, admin := l.administrator()
	group, servants := l.group(), l.group()
	var notices []string
	connector, err := pq.NewConnector(pgtest.WithUser(l.dsn, owner))
	if err != nil {
		t.Fatal(err)
	}
	db := sql.OpenDB(pq.ConnectorWithNoticeHandler(connector, func(e *pq.Error) { notices = append(notices, e.Message) }))
	defer db.Close()
	state := func() string {
		t.Helper()
		return l.text(l.admin, `SELECT concat_ws(' ',
			(SELECT string_agg(DISTINCT concat(polname, '=', array_to_string(ARRAY(SELECT CASE r WHEN 0 THEN 'PUBLIC' ELSE r::regrole::text END FROM unnest(polroles) r), ',')), ' ') FROM pg_policy),
			(SELECT 'limit=' || max_bytes FROM cache_limit WHERE user_id = ''))`)
	}
	for _, step := range []struct {
		cfg     fastpgcache.SetupConfig
		want    string
		notices int
	}{
		{fastpgcache.SetupConfig{}, "cache_own_rows=PUBLIC", 1},
		{fastpgcache.SetupConfig{Grantee: group, MaxBytes: 1000}, "cache_own_rows=" + group + " limit=1000", 2},
		{fastpgcache.SetupConfig{}, "cache_own_rows=" + group + " limit=1000", 0},
		{fastpgcache.SetupConfig{Force: true}, "cache_own_rows=" + group + " limit=1000", 0},
		{fastpgcache.SetupConfig{Service: servants}, "cache_any_rows=" + servants + " cache_own_rows=" + group + " limit=1000", 1},
		{fastpgcache.SetupConfig{MaxBytes: 1000}, "cache_any_rows=" + servants + " cache_own_rows=" + group + " limit=1000", 0},
		{fastpgcache.SetupConfig{MaxBytes: 2000}, "cache_any_rows=" + servants + " cache_own_rows=" + group + " limit=2000", 1},
		{fastpgcache.SetupConfig{MaxBytes: -1, Service: "none"}, "cache_own_rows=" + group, 2},
		{fastpgcache.SetupConfig{Grantee: "none"}, "", 1},
		{fastpgcache.SetupConfig{}, "", 0},
		{fastpgcache.SetupConfig{Grantee: "public"}, "cache_own_rows=PUBLIC", 1},
	} {
		notices = nil
		l.setup(db, step.cfg)
		if got := state(); got != step.want || len(notices) != step.notices {
			t.Errorf("%+v: got %q, %q; want %q, %d notices", step.cfg, got, notices, step.want, step.notices)
		}
	}

	// Where the grantee was dropped, nobody may use the cache until somebody is named.
	l.setup(admin, fastpgcache.SetupConfig{Grantee: group})
	l.exec(l.admin, `DROP OWNED BY `+group)
	l.setup(admin, fastpgcache.SetupConfig{})
	if got := state(); got != "" {
		t.Errorf("after DROP OWNED BY: got %q", got)
	}

	for name, cfg := range map[string]fastpgcache.SetupConfig{
		"the owner as grantee":   {Grantee: owner},
		"everybody as a service": {Service: "public"},
		"the grantee as service": {Grantee: group, Service: group},
	} {
		if err := fastpgcache.Setup(t.Context(), admin, cfg); !errors.Is(err, fastpgcache.ErrInvalidConfig) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestMigrationSQLAndPsqlMakeWhatSetupMakes(t *testing.T) {
	t.Parallel()
	psql, err := exec.LookPath("psql")
	if err != nil {
		t.Skip(err)
	}
	migrations, err := filepath.Abs("migrations.sql")
	if err != nil {
		t.Fatal(err)
	}
	roles := labOn(t, pgtest.Shared(t).DSN("postgres"))
	group, service := roles.group(), roles.group()
	for _, cfg := range []fastpgcache.SetupConfig{{}, {Schema: "public", Grantee: group, Service: service}, {Schema: `Wei"rd \ $setup$; x`}} {
		schema := cfg.Schema
		if schema == "" {
			schema = "public"
		}
		bySetup := newLab(t)
		bySetup.setup(bySetup.admin, cfg)
		want := bySetup.catalog(schema)

		run := func(how string, l *lab, args ...string) {
			t.Helper()
			for range 2 {
				cmd := exec.CommandContext(t.Context(), psql, append(args, "-v", "ON_ERROR_STOP=1", "-X", "-q", "-d", l.dsn)...)
				cmd.Env = append(os.Environ(), "PGOPTIONS=-c default_transaction_isolation=serializable"+
					" -c fastpgcache.grantee="+cfg.Grantee+" -c fastpgcache.service="+cfg.Service)
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Fatalf("%s: %v\n%s", how, err, out)
				}
			}
			if got := l.catalog(schema); got != want {
				t.Errorf("%s, %+v: got\n%s\nwant\n%s", how, cfg, got, want)
			}
		}
		text, err := fastpgcache.MigrationSQL(cfg)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "setup.sql")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		run("MigrationSQL", newLab(t), "-f", file)
		if schema == "public" {
			run("psql -1 -f migrations.sql", newLab(t), "-1", "-f", migrations)
			run("psql -f migrations.sql", newLab(t), "-f", migrations)
		}
	}
}

// goose, golang-migrate and Flyway are tried in migratetest, and read. Each knows dollar quotes
// or takes the file whole, but they differ in what they see in comments.
func TestMigrationSQLIsPlainForEveryTool(t *testing.T) {
	text, err := fastpgcache.MigrationSQL(fastpgcache.SetupConfig{Schema: "${a}$setup$; b"})
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"${", "\\.", "\r"} {
		if strings.Contains(text, bad) {
			t.Errorf("it has %q", bad)
		}
	}
	before, rest, _ := strings.Cut(text, "DO $setup$\n")
	_, after, found := strings.Cut(rest, "END $setup$;\n")
	if !found || strings.Contains(after, "$setup$") {
		t.Fatalf("not one DO statement: %s … %s", before, after)
	}
	for _, line := range strings.Split(strings.TrimSuffix(before+after, "\n"), "\n") {
		if !strings.HasPrefix(line, "--") || strings.ContainsAny(line, ";$") {
			t.Errorf("outside of the statement: %s", line)
		}
	}
}

// What a session had set is as it was, for the statements that follow in a DBA's
// transaction; and what it has set does no harm.
func TestMigrationLeavesTheSessionAlone(t *testing.T) {
	l := newLab(t)
	text, err := os.ReadFile("migrations.sql")
	if err != nil {
		t.Fatal(err)
	}
	l.exec(l.admin, `CREATE SCHEMA "A b"`)
	tx, err := l.open(l.dsn + ` search_path='nowhere, "A b", pg_catalog' default_transaction_isolation=serializable`).Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec(`CREATE TEMP TABLE cache (x int); CREATE TEMP TABLE pg_roles (rolname text); CREATE TEMP TABLE cache_epoch (x int)`); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := tx.Exec(string(text)); err != nil {
			t.Fatal(err)
		}
		var path, timeout, where string
		if err := tx.QueryRow(`SELECT current_setting('search_path'), current_setting('lock_timeout'), to_regclass('"A b".cache_lease')::text`).Scan(&path, &timeout, &where); err != nil {
			t.Fatal(err)
		}
		if path != `nowhere, "A b", pg_catalog` || timeout != "0" || !strings.Contains(where, "cache_lease") {
			t.Errorf("got %s, %s, %s", path, timeout, where)
		}
	}
}

func TestSetupInDatabasesOfOtherLocales(t *testing.T) {
	l := newLab(t)
	created := 0
	for _, options := range []string{
		`LOCALE_PROVIDER icu ICU_LOCALE 'tr-TR' LOCALE 'C' ENCODING 'UTF8'`, `LOCALE 'C.UTF-8' ENCODING 'UTF8'`,
		`LOCALE 'en_US.UTF-8' ENCODING 'UTF8'`, `LOCALE 'C' ENCODING 'SQL_ASCII'`,
	} {
		name := fmt.Sprintf("%s_%d", l.text(l.admin, `SELECT current_database()`), created)
		if _, err := l.admin.Exec(`CREATE DATABASE ` + name + ` TEMPLATE template0 ` + options); err != nil {
			t.Logf("%s: %v", options, err)
			continue
		}
		created++
		other := labOn(t, l.dsn+` dbname=`+name)
		other.setup(other.admin, fastpgcache.SetupConfig{})
		other.setup(other.admin, fastpgcache.SetupConfig{})
		c := other.cache(other.admin, fastpgcache.Config{})
		for _, key := range []string{"I", "ı", "i", "İ", "a b", "ab", "a-b", "\u00e9", "e\u0301"} {
			if err := c.Set(t.Context(), key, key, 0); err != nil {
				t.Fatal(err)
			}
		}
		keys := []string{}
		rows, err := other.admin.Query(`SELECT key FROM cache WHERE user_id = current_user ORDER BY user_id, key`)
		if err != nil {
			t.Fatal(err)
		}
		for rows.Next() {
			var key string
			if err := rows.Scan(&key); err != nil {
				t.Fatal(err)
			}
			keys = append(keys, key)
		}
		if err := rows.Err(); err != nil || len(keys) != 9 || !slices.IsSorted(keys) {
			t.Errorf("%s: %q, %v", options, keys, err)
		}
		other.admin.Close()
		l.exec(l.admin, `DROP DATABASE `+name+` WITH (FORCE)`)
	}
	if created == 0 {
		t.Error("no database could be created")
	}
	name := l.text(l.admin, `SELECT current_database()`) + "_latin1"
	l.exec(l.admin, `CREATE DATABASE `+name+` TEMPLATE template0 LOCALE 'C' ENCODING 'LATIN1'`)
	defer l.exec(l.admin, `DROP DATABASE `+name+` WITH (FORCE)`)
	err := fastpgcache.Setup(t.Context(), l.open(l.dsn+` dbname=`+name), fastpgcache.SetupConfig{})
	if err == nil || !strings.Contains(err.Error(), "UTF8") {
		t.Errorf("LATIN1: got %v", err)
	}
}

// restore runs a dump.
func (l *lab) restore(dump string) {
	l.Helper()
	var statements strings.Builder
	for line := range strings.Lines(dump) {
		if !strings.HasPrefix(line, `\`) { // what is psql's
			statements.WriteString(line)
		}
	}
	conn := l.open(l.dsn)
	defer conn.Close()
	conn.SetMaxOpenConns(1)
	l.exec(conn, statements.String())
}

func TestSetupOverARestoredDump(t *testing.T) {
	dump, err := exec.LookPath("pg_dump")
	if err != nil {
		t.Skip(err)
	}
	l, restored := newLab(t), newLab(t)
	owner, admin := l.administrator()
	t.Cleanup(func() { restored.exec(restored.admin, `DROP OWNED BY `+owner+` CASCADE`) })
	l.setup(admin, fastpgcache.SetupConfig{Schema: "dumped", Service: owner})
	text, err := exec.CommandContext(t.Context(), dump, "-d", l.dsn, "--no-comments", "--schema-only").Output()
	if err != nil {
		t.Skipf("%v: %s", err, err.(*exec.ExitError).Stderr)
	}
	restored.restore(string(text))
	restored.setup(restored.open(pgtest.WithUser(restored.dsn, owner)), fastpgcache.SetupConfig{Schema: "dumped"})
	comments := strings.NewReplacer(" fastpgcache schema 1", "", " fastpgcache epoch", "", " fastpgcache lease", "", " fastpgcache change", "", " fastpgcache limit", "")
	if got, want := comments.Replace(restored.catalog("dumped")), comments.Replace(l.catalog("dumped")); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
