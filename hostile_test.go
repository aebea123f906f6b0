package fastpgcache_test

import (
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// trap makes a schema where mallory may do everything, and in it spring(), which tells
// for good whether it ran, in the form of each kind of object that could run it.
func (l *lab) trap(mallory string) (schema string) {
	l.Helper()
	schema = mallory + "_s"
	l.exec(l.admin, fmt.Sprintf(`CREATE SCHEMA %[1]s AUTHORIZATION %[2]s;
		CREATE SEQUENCE %[1]s.sprung; GRANT ALL ON SEQUENCE %[1]s.sprung TO PUBLIC;
		CREATE FUNCTION %[1]s.spring() RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN PERFORM nextval('%[1]s.sprung'); RETURN true; END $$;
		CREATE FUNCTION %[1]s.spring(text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN PERFORM nextval('%[1]s.sprung'); RETURN $1; END $$;
		CREATE FUNCTION %[1]s.springs() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM nextval('%[1]s.sprung'); RETURN NULL; END $$`, schema, mallory))
	l.Cleanup(func() { l.exec(l.admin, `DROP SCHEMA `+schema+` CASCADE`) })
	return schema
}

func (l *lab) wantUnsprung(schema, what string) {
	l.Helper()
	if l.text(l.admin, `SELECT is_called FROM `+schema+`.sprung`) == "true" {
		l.Errorf("%s: it ran", what)
		l.exec(l.admin, `ALTER SEQUENCE `+schema+`.sprung RESTART`)
	}
}

// EXPLAIN ANALYZE and the statistics count what a statement touches: for a login it is
// the same whatever another's keys are. SQL-NOTES 18.
func TestHostileCountsTellNothingOfOthersKeys(t *testing.T) {
	l := newLab(t)
	l.setup(l.admin, fastpgcache.SetupConfig{})
	mallory, _ := l.role()
	l.exec(l.admin, `INSERT INTO cache (user_id, key, value) SELECT u, 's' || g, 'v' FROM unnest(ARRAY['bob', $1]) u, generate_series(1, 5000) g`, mallory)
	l.exec(l.admin, `INSERT INTO cache_lease (user_id, key, holder, expires_at) SELECT u, 's' || g, 'h', now() FROM unnest(ARRAY['bob', $1]) u, generate_series(1, 5000) g`, mallory)
	l.exec(l.admin, `INSERT INTO cache_epoch (user_id) SELECT u || g FROM unnest(ARRAY['bob', $1]) u, generate_series(1, 5000) g`, mallory)
	for _, analyzed := range []bool{false, true} {
		if analyzed {
			l.exec(l.admin, `VACUUM ANALYZE`)
		}
		for _, table := range []string{"cache", "cache_lease", "cache_change", "cache_epoch"} {
			seen := map[string]string{}
			for _, where := range []string{`user_id = 'bob' AND key >= 's' AND key < 't'`, `user_id = 'bob' AND key >= 'a' AND key < 'b'`, `user_id = 'nobody' AND key >= 'a' AND key < 'b'`} {
				switch table {
				case "cache_change":
					where = strings.ReplaceAll(where, "key >= 's' AND key < 't'", "xid > 0")
					where = strings.ReplaceAll(where, "key >= 'a' AND key < 'b'", "xid < 0")
				case "cache_epoch":
					where = strings.NewReplacer("AND key >= 's' AND key < 't'", "", "AND key >= 'a' AND key < 'b'", "", "user_id = 'bob'", "user_id >= 'bob' AND user_id < 'bob9'",
						"user_id = 'nobody'", "user_id >= 'nobody' AND user_id < 'nobody9'").Replace(where)
				}
				tx, err := l.open(pgtest.WithUser(l.dsn, mallory)).Begin()
				if err != nil {
					t.Fatal(err)
				}
				if _, err := tx.Exec(`SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; SET LOCAL enable_indexonlyscan = off`); err != nil {
					t.Fatal(err)
				}
				var plan strings.Builder
				explain := `EXPLAIN (ANALYZE, BUFFERS, COSTS OFF, TIMING OFF, SUMMARY OFF) SELECT * FROM ` + table + ` WHERE ` + where
				if _, err := tx.Exec(explain); err != nil { // the first reads the catalogs, too
					t.Fatal(err)
				}
				rows, err := tx.Query(explain)
				if err != nil {
					t.Fatal(err)
				}
				for rows.Next() {
					var line string
					if err := rows.Scan(&line); err != nil {
						t.Fatal(err)
					}
					if !strings.Contains(line, "Cond:") && !strings.Contains(line, "Filter: ") {
						plan.WriteString(line + "\n")
					}
				}
				var counts string
				if err := tx.QueryRow(`SELECT concat_ws(' ', seq_tup_read, idx_tup_fetch, (SELECT sum(objid) FROM (SELECT 1 AS objid FROM pg_locks WHERE mode = 'SIReadLock') l))
					FROM pg_stat_xact_user_tables WHERE relname = $1`, table).Scan(&counts); err != nil {
					t.Fatal(err)
				}
				tx.Rollback()
				seen[plan.String()+counts] = where
			}
			if len(seen) != 1 {
				t.Errorf("%s, analyzed %t: %q", table, analyzed, seen)
			}
		}
	}
}

// Who owns a schema, a table or a function could put something else in its place that
// a stronger role would run. SQL-NOTES 19.
func TestHostileOwnersAreRefused(t *testing.T) {
	l := newLab(t)
	mallory, db := l.role()
	schema := l.trap(mallory)
	_, admin := l.administrator()
	refused := func(what string, db *sql.DB, cfg fastpgcache.SetupConfig) {
		t.Helper()
		for _, force := range []bool{false, true} {
			cfg.Force = force
			err := fastpgcache.Setup(t.Context(), db, cfg)
			if !errors.Is(err, fastpgcache.ErrNotPermitted) || !strings.Contains(err.Error(), mallory) {
				t.Errorf("%s, Force %t: got %v", what, force, err)
			}
		}
		l.wantUnsprung(schema, what)
	}
	l.exec(db, `GRANT ALL ON SCHEMA `+schema+` TO PUBLIC`)
	refused("a superuser in mallory's schema", l.admin, fastpgcache.SetupConfig{Schema: schema})
	refused("an administrator in mallory's schema", admin, fastpgcache.SetupConfig{Schema: schema})
	l.setup(db, fastpgcache.SetupConfig{Schema: schema})
	refused("a superuser on mallory's cache", l.admin, fastpgcache.SetupConfig{Schema: schema})

	if pgtest.Shared(t).Version() >= 150000 { // before, the superuser owns public
		other := newLab(t)
		other.exec(other.admin, `DO $$ BEGIN EXECUTE format('ALTER DATABASE %I OWNER TO `+mallory+`', current_database()); END $$`)
		t.Cleanup(func() {
			other.exec(other.admin, `DO $$ BEGIN EXECUTE format('ALTER DATABASE %I OWNER TO postgres', current_database()); END $$`)
		})
		if err := fastpgcache.Setup(t.Context(), other.admin, fastpgcache.SetupConfig{}); !errors.Is(err, fastpgcache.ErrNotPermitted) || !strings.Contains(err.Error(), mallory) {
			t.Errorf("a superuser in mallory's database: got %v", err)
		}
		other.setup(other.admin, fastpgcache.SetupConfig{Schema: "own"}) // the way out
		other.setup(other.open(pgtest.WithUser(other.dsn, mallory)), fastpgcache.SetupConfig{})
		t.Cleanup(func() { other.exec(other.admin, `DROP OWNED BY `+mallory) })
	}

	// Set up by a superuser in good order, then handed over.
	l.setup(l.admin, fastpgcache.SetupConfig{Schema: "fell"})
	l.exec(l.admin, `ALTER SCHEMA fell OWNER TO `+mallory)
	for _, statement := range []string{
		`DROP TABLE fell.cache CASCADE; CREATE UNLOGGED TABLE fell.cache (user_id text COLLATE "C" NOT NULL DEFAULT CURRENT_USER, key text COLLATE "C" NOT NULL,
			value text, value_bytes bytea, expires_at timestamptz, created_at timestamptz NOT NULL DEFAULT now(), mark bigint, PRIMARY KEY (user_id, key));
			CREATE TRIGGER t BEFORE DELETE ON fell.cache FOR EACH STATEMENT EXECUTE FUNCTION ` + schema + `.springs()`,
		`DROP FUNCTION fell.cache_cleanup; CREATE FUNCTION fell.cache_cleanup() RETURNS integer LANGUAGE sql AS $$ SELECT nextval('` + schema + `.sprung')::integer $$`,
	} {
		l.exec(db, statement)
		refused("what mallory has replaced", l.admin, fastpgcache.SetupConfig{Schema: "fell"})
	}
	l.exec(l.admin, `ALTER SCHEMA fell OWNER TO postgres`)
	refused("what mallory had replaced", l.admin, fastpgcache.SetupConfig{Schema: "fell"})
}

// Whatever was attached to the Python library's table, or to ours, is refused, also
// where everything belongs to the superuser by now. SQL-NOTES 20.
func TestHostileAttachmentsAreRefused(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	mallory, _ := l.role()
	python := pythonTable[:strings.Index(pythonTable, "CREATE INDEX")]
	for _, ours := range []bool{false, true} {
		for name, statement := range map[string]string{
			"a type":           `ALTER TABLE cache ALTER value TYPE s.text`,
			"a domain":         `ALTER TABLE cache ALTER expires_at TYPE s.timestamptz`,
			"an index":         `CREATE INDEX ON cache (key) WHERE s.spring()`,
			"an expression":    `CREATE INDEX ON cache (s.spring(key))`,
			"a plain index":    `CREATE INDEX ON cache (value)`,
			"a default":        `ALTER TABLE cache ALTER value SET DEFAULT s.spring('')`,
			"a generated":      `ALTER TABLE cache ADD g text GENERATED ALWAYS AS (s.spring(key)) STORED`,
			"an identity":      `ALTER TABLE cache ADD g bigint GENERATED ALWAYS AS IDENTITY`,
			"a check":          `ALTER TABLE cache ADD CHECK (s.spring())`,
			"a weaker domain":  `ALTER DOMAIN cache_keys DROP CONSTRAINT cache_keys_bounded; ALTER DOMAIN cache_keys ADD CONSTRAINT cache_keys_bounded CHECK (s.spring() IS NULL)`,
			"another domain":   `CREATE DOMAIN cache_keys AS text[] DEFAULT ARRAY[s.spring('')]`,
			"a trigger":        `CREATE TRIGGER t BEFORE UPDATE ON cache FOR EACH ROW EXECUTE FUNCTION s.springs()`,
			"a rule":           `CREATE RULE r AS ON INSERT TO cache DO ALSO SELECT s.spring()`,
			"a policy":         `CREATE POLICY p ON cache USING (s.spring())`,
			"row security":     `ALTER TABLE cache ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY`,
			"a child":          `CREATE TABLE s.child () INHERITS (cache)`,
			"statistics":       `CREATE STATISTICS s.stat ON s.spring(key), value FROM cache`,
			"a foreign key":    `CREATE UNLOGGED TABLE s.ref (u text, k text, FOREIGN KEY (u, k) REFERENCES cache)`,
			"an opclass":       `CREATE INDEX ON cache (key text_pattern_ops)`,
			"a lacking column": `ALTER TABLE cache DROP expires_at`,
			"no primary key":   `ALTER TABLE cache DROP CONSTRAINT cache_pkey`,
			"a lease's":        `CREATE TABLE cache_lease (x int)`,
			"a limit's":        `CREATE TABLE cache_limit (x int)`,
			"a limit's rule":   `CREATE RULE r AS ON INSERT TO cache_limit DO ALSO SELECT s.spring()`,
			"a feed's":         `CREATE TRIGGER t BEFORE INSERT ON cache_change FOR EACH ROW EXECUTE FUNCTION s.springs()`,
		} {
			if ours && (name == "a type" || name == "a domain" || name == "a lacking column") { // a trigger keeps it from that
				continue
			}
			if before := name == "a lease's" || name == "a limit's" || name == "another domain"; ours && before || !ours && (name == "a limit's rule" || name == "a feed's" || name == "a weaker domain") {
				continue
			}
			t.Run(fmt.Sprintf("%s, ours %t", name, ours), func(t *testing.T) {
				l := l.in(t)
				s := l.trap(mallory)
				l.exec(l.admin, fmt.Sprintf(`CREATE DOMAIN %[1]s.text AS text; CREATE DOMAIN %[1]s.timestamptz AS timestamptz; ALTER SCHEMA %[1]s OWNER TO postgres`, s))
				if ours {
					l.setup(l.admin, fastpgcache.SetupConfig{Schema: s})
				}
				// As the superuser: whoever attached it, by whatever rights.
				statement := strings.NewReplacer("s.", s+".").Replace(statement)
				if !ours {
					statement = python + statement
				}
				conn := l.open(l.dsn + ` search_path=` + s)
				l.exec(conn, statement)
				conn.Close()
				l.exec(l.admin, `ALTER SEQUENCE `+s+`.sprung RESTART`)
				if err := fastpgcache.Setup(t.Context(), l.admin, fastpgcache.SetupConfig{Schema: s}); !errors.Is(err, fastpgcache.ErrForeignTable) {
					t.Errorf("got %v", err)
				}
				l.wantUnsprung(s, name)
			})
		}
	}
}

// What an earlier version, or somebody with too many rights, has left of ours is mended.
func TestSetupMendsWhatWasAltered(t *testing.T) {
	l := newLab(t)
	l.setup(l.admin, fastpgcache.SetupConfig{})
	before := l.catalog("public")
	for _, statement := range []string{
		`ALTER POLICY cache_own_rows ON cache USING (true)`,
		`ALTER POLICY cache_own_rows ON cache_change WITH CHECK (true)`,
		`DROP POLICY cache_own_rows ON cache_lease`,
		`DROP POLICY cache_own_rows ON cache_epoch; CREATE POLICY cache_own_rows ON cache_epoch AS RESTRICTIVE FOR SELECT USING (user_id = current_user)`,
		`ALTER TABLE cache DISABLE ROW LEVEL SECURITY`,
		`ALTER TABLE cache DISABLE TRIGGER ALL; ALTER TABLE cache ENABLE TRIGGER ALL`,
		`DROP TRIGGER cache_changed_update ON cache; CREATE TRIGGER cache_changed_update AFTER UPDATE OF expires_at ON cache FOR EACH ROW EXECUTE FUNCTION cache_changed()`,
		`DROP TRIGGER cache_deleted ON cache`,
		`GRANT ALL ON cache, cache_limit TO PUBLIC`,
		`ALTER FUNCTION cache_set SECURITY DEFINER SET search_path = public`,
		`CREATE OR REPLACE FUNCTION cache_changed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$`,
		`ALTER TABLE cache ALTER key SET STATISTICS 100`,
	} {
		l.exec(l.admin, statement)
		l.setup(l.admin, fastpgcache.SetupConfig{})
		if after := l.catalog("public"); after != before {
			t.Errorf("%s\nbefore:\n%s\nafter:\n%s", statement, before, after)
		}
	}
}

// No name that others can choose is looked up before pg_catalog's, from the first
// statement on. SQL-NOTES 21.
func TestHostileSearchPathsAreNotLookedInto(t *testing.T) {
	l := newLab(t)
	mallory, db := l.role()
	s := l.trap(mallory)
	for _, name := range []string{"text", "oid", "regclass", "bigint", "boolean", "record", "int4", "name"} {
		if name == "record" {
			l.exec(db, `CREATE TYPE `+s+`.record AS (x int)`)
			continue
		}
		base := map[string]string{"bigint": "int8", "boolean": "bool"}[name]
		if base == "" {
			base = name
		}
		l.exec(db, fmt.Sprintf(`CREATE DOMAIN %s.%q AS pg_catalog.%s CHECK (%[1]s.spring())`, s, base, base))
	}
	for _, signature := range []string{"current_setting(text)", "set_config(text, text, boolean)", "current_schema()", "format(text, text)", "txid_current()", "now()",
		"gen_random_uuid()", "octet_length(text)", "current_query()", "starts_with(text, text)"} {
		l.exec(db, fmt.Sprintf(`CREATE FUNCTION %s.%s RETURNS text LANGUAGE sql AS $$ SELECT '%[1]s.sprung'::text FROM (SELECT %[1]s.spring()) x $$`, s,
			strings.NewReplacer("text", "pg_catalog.text").Replace(signature)))
	}
	l.exec(db, fmt.Sprintf(`CREATE FUNCTION %[1]s.eq(pg_catalog.text, pg_catalog.text) RETURNS boolean LANGUAGE sql AS $$ SELECT %[1]s.spring() $$;
		CREATE OPERATOR %[1]s.= (FUNCTION = %[1]s.eq, LEFTARG = pg_catalog.text, RIGHTARG = pg_catalog.text)`, s))
	l.exec(l.admin, `DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET search_path = `+s+`, pg_catalog', current_database()); END $$`)
	victim := l.open(l.dsn)
	for _, cfg := range []fastpgcache.SetupConfig{{}, {MaxBytes: 1000}, {Force: true}, {Schema: "other"}} {
		l.setup(victim, cfg)
	}
	l.wantUnsprung(s, "Setup")

	psql, err := exec.LookPath("psql")
	if err != nil {
		t.Skip(err)
	}
	text, err := fastpgcache.MigrationSQL(fastpgcache.SetupConfig{Schema: "third", Service: "none"})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "setup.sql")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{file, "migrations.sql"} {
		cmd := exec.CommandContext(t.Context(), psql, "-v", "ON_ERROR_STOP=1", "-X", "-q", "-f", file, "-d", l.dsn)
		cmd.Env = append(os.Environ(), "PGOPTIONS=-c fastpgcache.schema=third")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", file, err, out)
		}
		l.wantUnsprung(s, file)
	}
}

// What one login leaves open holds up nobody else, and no set-up. SQL-NOTES 23, 26.
func TestHostileTransactionsHoldUpNobody(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	_, admin := l.administrator()
	_, malloryDB := l.role()
	alice, aliceDB := l.role()
	l.setup(admin, fastpgcache.SetupConfig{})
	l.exec(aliceDB, `INSERT INTO cache (key, value, expires_at) SELECT g::text, 'v', now() - interval '1 s' FROM generate_series(1, 100) g`)
	tx, err := malloryDB.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	for _, statement := range []string{
		`SELECT pg_advisory_lock(g) FROM (VALUES (7306010338411931507)) v(g)`,
		`SELECT cache_cleanup()`,
		`SELECT cache_walk(NULL, '0')`,
		`SELECT cache_trim(current_user, 100)`,
		`INSERT INTO cache (key, value) VALUES ('k', 'v')`,
		`SELECT FROM cache_limit`, `SELECT FROM cache`, `SELECT FROM cache_change FOR UPDATE`, `SELECT FROM cache_epoch FOR UPDATE`,
	} {
		if _, err := tx.Exec(statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
	patient := pgtest.WithUser(l.dsn, alice) + ` options='-c statement_timeout=3s'`
	c := l.cache(l.open(patient), fastpgcache.Config{})
	ctx := t.Context()
	if err := c.Set(ctx, "1", "fresh", time.Hour); err != nil {
		t.Error(err)
	}
	if n, err := c.Cleanup(ctx); err != nil || n != 99 {
		t.Errorf("cleaned up %d, %v", n, err)
	}
	l.exec(l.open(patient), `SELECT cache_trim(current_user, 100), cache_walk(NULL, '1 h')`)
	l.want(aliceDB, int64(1), `SELECT count(*) FROM cache_epoch`)
	l.setup(admin, fastpgcache.SetupConfig{}) // nothing to do

	// An ALTER that waits behind mallory's reader gives way again to alice's, and the
	// set-up to its caller, in a while.
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	l.exec(l.admin, `ALTER POLICY cache_own_rows ON cache WITH CHECK (true)`)
	if tx, err = malloryDB.Begin(); err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec(`SELECT FROM cache`); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	start := time.Now()
	go func() { done <- fastpgcache.Setup(ctx, admin, fastpgcache.SetupConfig{}) }()
	var slowest time.Duration
	for len(done) == 0 {
		begin := time.Now()
		if err := c.Set(ctx, "1", "fresh", time.Hour); err != nil {
			t.Error(err)
		}
		slowest = max(slowest, time.Since(begin))
	}
	if err := <-done; sqlState(err) != "55P03" {
		t.Errorf("got %v", err)
	}
	t.Logf("the set-up gave up after %v; the slowest Set took %v", time.Since(start), slowest)
	if slowest > 2*time.Second {
		t.Errorf("a Set took %v", slowest)
	}
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	l.setup(admin, fastpgcache.SetupConfig{})
}

// A row that a login writes itself is of no use against the others: it is neither
// theirs nor read by them. SQL-NOTES 24, 37.
func TestHostileRowsHaveTheirBounds(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.setup(l.admin, fastpgcache.SetupConfig{})
	_, db := l.role()
	for statement, want := range map[string]string{
		`INSERT INTO cache (key, value) VALUES (repeat('k', 200000), 'v')`:                                  "23514",
		`INSERT INTO cache (key) VALUES ('k')`:                                                              "23514",
		`INSERT INTO cache (key, value, value_bytes) VALUES ('k', 'v', 'v')`:                                "23514",
		`INSERT INTO cache_change (keys) VALUES (ARRAY[repeat('k', 200000000)])`:                            "23514",
		`INSERT INTO cache_change (keys) SELECT array_agg('k' || g) FROM generate_series(1, 2001) g`:        "23514",
		`INSERT INTO cache_change (keys) VALUES ('{NULL}'), ('{}'), ('[5:6]={a,b}'), ('{{a,b},{c,d}}')`:     "",
		`INSERT INTO cache_change (keys) SELECT array_agg(repeat('k', 1024)) FROM generate_series(1, 2000)`: "",
	} {
		_, err := db.Exec(statement)
		if want == "" && err == nil {
			continue
		}
		if got := sqlState(err); got != want {
			t.Errorf("%s: got %v, want %q", statement, err, want)
		}
	}
}
