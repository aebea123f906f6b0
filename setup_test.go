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

// lab is an empty database, dropped when its test ends.
type lab struct {
	*testing.T
	dsn   string  // the superuser's
	admin *sql.DB // the superuser's
}

func newLab(t *testing.T) *lab { return labOn(t, pgtest.Database(t)) }

func labOn(t *testing.T, dsn string) *lab {
	l := &lab{T: t, dsn: dsn}
	l.admin = l.open(dsn)
	return l
}

// in is the same lab for a subtest.
func (l *lab) in(t *testing.T) *lab { return &lab{T: t, dsn: l.dsn, admin: l.admin} }

func (l *lab) open(dsn string) *sql.DB {
	l.Helper()
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		l.Fatal(err)
	}
	l.Cleanup(func() { db.Close() })
	return db
}

// role makes a login role and a pool of its connections.
func (l *lab) role(options ...string) (name string, db *sql.DB) {
	l.Helper()
	name = pgtest.Role(l.T, l.dsn, options...)
	return name, l.open(pgtest.WithUser(l.dsn, name))
}

// group makes a role that cannot log in.
func (l *lab) group() string {
	l.Helper()
	name := pgtest.Role(l.T, l.dsn)
	l.exec(l.admin, `ALTER ROLE `+name+` NOLOGIN`)
	return name
}

// administrator is a plain role that may create in the database, and nothing else.
func (l *lab) administrator() (name string, db *sql.DB) {
	l.Helper()
	name, db = l.role()
	l.exec(l.admin, `DO $$ BEGIN EXECUTE format('GRANT CREATE ON DATABASE %I TO `+name+`', current_database()); END $$`)
	l.exec(l.admin, `GRANT CREATE ON SCHEMA public TO `+name)
	return name, db
}

func (l *lab) setup(db *sql.DB, cfg fastpgcache.SetupConfig) {
	l.Helper()
	if err := fastpgcache.Setup(l.Context(), db, cfg); err != nil {
		l.Fatal(err)
	}
}

func (l *lab) cache(db *sql.DB, cfg fastpgcache.Config) *fastpgcache.Cache {
	l.Helper()
	c, err := fastpgcache.New(db, cfg)
	if err != nil {
		l.Fatal(err)
	}
	l.Cleanup(func() { c.Close() })
	return c
}

func (l *lab) exec(db *sql.DB, statement string, args ...any) {
	l.Helper()
	if _, err := db.ExecContext(context.WithoutCancel(l.Context()), statement, args...); err != nil {
		l.Fatalf("%s: %v", statement, err)
	}
}

// want fails unless the query's one value is want.
func (l *lab) want(db *sql.DB, want any, query string, args ...any) {
	l.Helper()
	var got any
	if err := db.QueryRowContext(l.Context(), query, args...).Scan(&got); err != nil {
		l.Fatalf("%s: %v", query, err)
	}
	if b, ok := got.([]byte); ok {
		got = string(b)
	}
	if got != want {
		l.Errorf("%s %v\n got %v\nwant %v", query, args, got, want)
	}
}

func (l *lab) text(db *sql.DB, query string, args ...any) (got string) {
	l.Helper()
	if err := db.QueryRowContext(l.Context(), query, args...).Scan(&got); err != nil {
		l.Fatalf("%s: %v", query, err)
	}
	return got
}

// catalog describes all that set-up makes in a schema.
func (l *lab) catalog(schema string) string {
	l.Helper()
	return l.text(l.admin, `
		WITH rel AS (SELECT * FROM pg_class WHERE relnamespace = $1::text::regnamespace),
		acl AS (
			SELECT concat_ws(' ', o.object, g.grantor::regrole, CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE g.grantee::regrole::text END,
				g.privilege_type, g.is_grantable) AS line
			FROM (SELECT relname::text AS object, relacl AS acl FROM rel
				UNION ALL SELECT relname || '.' || attname, attacl FROM pg_attribute a JOIN rel ON attrelid = rel.oid
				UNION ALL SELECT proname, proacl FROM pg_proc WHERE pronamespace = $1::text::regnamespace) o, aclexplode(o.acl) g)
		SELECT string_agg(line, E'\n' ORDER BY line COLLATE "C") FROM (
			SELECT concat_ws(' ', relkind, relpersistence, relname, relowner::regrole, reloptions, relrowsecurity, relforcerowsecurity,
				obj_description(oid, 'pg_class')) AS line FROM rel
			UNION ALL SELECT concat_ws(' ', relname, attname, format_type(atttypid, atttypmod), attnotnull, attcollation::regcollation,
				coalesce(attstattarget, -1), attcompression::text,
				ARRAY(SELECT o FROM unnest(attoptions) o WHERE o NOT LIKE 'pg_attver=%'), -- some minor releases add it by themselves
				 pg_get_expr(adbin, adrelid))
			FROM rel JOIN pg_attribute ON attrelid = rel.oid AND attnum > 0 AND NOT attisdropped AND relkind = 'r'
			LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
			UNION ALL SELECT pg_get_indexdef(indexrelid) FROM pg_index JOIN rel ON rel.oid = indrelid
			UNION ALL SELECT conname || ' ' || pg_get_constraintdef(c.oid) FROM pg_constraint c JOIN rel ON rel.oid = conrelid
			UNION ALL SELECT concat_ws(' ', polname, polrelid::regclass, polcmd, polpermissive, polroles::regrole[], pg_get_expr(polqual, polrelid),
				pg_get_expr(polwithcheck, polrelid)) FROM pg_policy JOIN rel ON rel.oid = polrelid
			UNION ALL SELECT concat_ws(' ', pg_get_triggerdef(t.oid), tgenabled) FROM pg_trigger t JOIN rel ON rel.oid = tgrelid
			UNION ALL SELECT pg_get_functiondef(oid) || proowner::regrole FROM pg_proc WHERE pronamespace = $1::text::regnamespace
			UNION ALL SELECT line FROM acl) lines`, pq.QuoteIdentifier(schema))
}

// sqlState returns the SQLSTATE within err, or its text.
func sqlState(err error) string {
	if e := (*pq.Error)(nil); errors.As(err, &e) {
		return string(e.Code)
	}
	return fmt.Sprint(err)
}

// pythonTable is what the Python library's set-up makes.
const pythonTable = `
	CREATE UNLOGGED TABLE cache (
		user_id     TEXT NOT NULL,
		key         TEXT NOT NULL,
		value       TEXT NOT NULL,
		expires_at  TIMESTAMPTZ,
		created_at  TIMESTAMPTZ DEFAULT NOW(),
		accessed_at TIMESTAMPTZ DEFAULT NOW(),
		PRIMARY KEY (user_id, key)
	);
	CREATE INDEX idx_cache_expires_at ON cache (expires_at) WHERE expires_at IS NOT NULL;
	CREATE INDEX idx_cache_user_id ON cache (user_id);
	CREATE FUNCTION cache_set(p_user_id TEXT, p_key TEXT, p_value TEXT, p_ttl_seconds INTEGER DEFAULT NULL) RETURNS BOOLEAN
	LANGUAGE plpgsql AS $$ BEGIN
		INSERT INTO cache VALUES (p_user_id, p_key, p_value, NOW() + (p_ttl_seconds || ' seconds')::INTERVAL, NOW(), NOW())
		ON CONFLICT (user_id, key) DO UPDATE SET value = p_value, expires_at = excluded.expires_at, accessed_at = NOW();
		RETURN TRUE;
	END $$;
	CREATE FUNCTION cache_get(p_user_id TEXT, p_key TEXT) RETURNS TEXT
	LANGUAGE plpgsql AS $$ BEGIN
		UPDATE cache SET accessed_at = NOW() WHERE user_id = p_user_id AND key = p_key;
		RETURN (SELECT value FROM cache WHERE user_id = p_user_id AND key = p_key);
	END $$;
	CREATE FUNCTION cache_delete(p_user_id TEXT, p_key TEXT) RETURNS BOOLEAN LANGUAGE plpgsql AS $$ BEGIN RETURN FALSE; END $$;
	CREATE FUNCTION cache_exists(p_user_id TEXT, p_key TEXT) RETURNS BOOLEAN LANGUAGE plpgsql AS $$ BEGIN RETURN FALSE; END $$;
	CREATE FUNCTION cache_ttl(p_user_id TEXT, p_key TEXT) RETURNS INTEGER LANGUAGE plpgsql AS $$ BEGIN RETURN -2; END $$;
	CREATE FUNCTION cache_cleanup() RETURNS INTEGER LANGUAGE plpgsql AS $$ BEGIN RETURN 0; END $$;`

func TestSetupByManyAtOnce(t *testing.T) {
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

func TestSetupRefusesWhatIsNotTheCaches(t *testing.T) {
	l := newLab(t)
	l.admin.SetMaxOpenConns(1)
	for name, statement := range map[string]string{
		"table":               `CREATE TABLE cache (id int)`,
		"table of like names": `CREATE TABLE cache (user_id int, key text, value text, expires_at timestamptz, created_at timestamptz, accessed_at timestamptz, PRIMARY KEY (user_id, key))`,
		"view":                `CREATE VIEW cache AS SELECT 1 AS x`,
		"sequence":            `CREATE SEQUENCE cache`,
		"index":               `CREATE TABLE t (x int); CREATE INDEX cache_lease ON t (x)`,
		"partitioned table":   `CREATE TABLE cache (user_id text) PARTITION BY LIST (user_id)`,
		"type":                `CREATE TYPE cache AS (x int)`,
		"foreign table":       `CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w; CREATE FOREIGN TABLE cache_epoch (x int) SERVER s`,
		"materialized view":   `CREATE MATERIALIZED VIEW cache_lease AS SELECT 1 AS x`,
		"domain":              `CREATE DOMAIN cache_change AS text; CREATE TABLE t (x int)`,
		"other key":           strings.Replace(pythonTable, "PRIMARY KEY (user_id, key)", "PRIMARY KEY (key)", 1),
		"trigger":             pythonTable + `CREATE TRIGGER t BEFORE UPDATE ON cache FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()`,
		"rule":                pythonTable + `CREATE RULE r AS ON UPDATE TO cache DO ALSO SELECT 1`,
		"check":               pythonTable + `ALTER TABLE cache ADD CHECK (length(value) > 0)`,
		"policy":              pythonTable + `ALTER TABLE cache ENABLE ROW LEVEL SECURITY`,
		"function":            `CREATE FUNCTION cache_get(id text, field text) RETURNS text LANGUAGE sql AS $$ SELECT field $$`,
		"unnamed parameters":  `CREATE FUNCTION cache_exists(text, text) RETURNS boolean LANGUAGE sql AS $$ SELECT true $$`,
		"other result":        `CREATE FUNCTION cache_cleanup() RETURNS text LANGUAGE sql AS $$ SELECT 'x' $$`,
		"procedure":           `CREATE PROCEDURE cache_cleanup() LANGUAGE sql AS $$ SELECT 1 $$`,
		"walk":                `CREATE FUNCTION cache_walk(text, interval) RETURNS integer LANGUAGE sql AS $$ SELECT 1 $$`,
	} {
		t.Run(name, func(t *testing.T) {
			l := l.in(t)
			schema := "s_" + strings.ReplaceAll(name, " ", "_")
			l.exec(l.admin, `CREATE SCHEMA `+schema+`; SET search_path = `+schema+`; `+statement+`; RESET search_path`)
			before := l.catalogOf(schema)
			for _, force := range []bool{false, true} {
				if force && strings.HasPrefix(statement, pythonTable[:20]) {
					continue // Force drops it, as it says.
				}
				err := fastpgcache.Setup(t.Context(), l.admin, fastpgcache.SetupConfig{Schema: schema, Force: force})
				if !errors.Is(err, fastpgcache.ErrForeignTable) {
					t.Errorf("Force %t: got %v", force, err)
				}
			}
			if after := l.catalogOf(schema); after != before {
				t.Errorf("it was touched:\n%s\n%s", before, after)
			}
		})
	}
}

// catalogOf lists the relations and routines of a schema, whatever they are.
func (l *lab) catalogOf(schema string) string {
	return l.text(l.admin, `SELECT string_agg(line, ',' ORDER BY line) FROM (
		SELECT concat(oid, relname, relkind) AS line FROM pg_class WHERE relnamespace = $1::text::regnamespace
		UNION ALL SELECT concat(oid, proname, prosrc) FROM pg_proc WHERE pronamespace = $1::text::regnamespace) lines`, schema)
}

func TestSetupLeavesOverloadsAlone(t *testing.T) {
	l := newLab(t)
	const other = `CREATE FUNCTION cache_get(id integer) RETURNS text LANGUAGE sql AS $$ SELECT 'mine' $$`
	l.exec(l.admin, other)
	l.setup(l.admin, fastpgcache.SetupConfig{})
	l.setup(l.admin, fastpgcache.SetupConfig{Force: true})
	l.want(l.admin, "mine", `SELECT cache_get(1)`)
	l.want(l.admin, true, `SELECT has_function_privilege('public', 'cache_get(integer)', 'EXECUTE')`)
}

// Whoever made the table before the administrator did would own it, and not be
// confined.
func TestSetupTrustsNoStranger(t *testing.T) {
	l := newLab(t)
	stranger, db := l.role()
	_, admin := l.administrator()
	db.SetMaxOpenConns(1)
	for name, statement := range map[string]string{
		"python":   pythonTable[:strings.Index(pythonTable, "CREATE INDEX")],
		"lease":    `CREATE TABLE cache_lease (x int); COMMENT ON TABLE cache_lease IS 'fastpgcache lease'`,
		"forged":   `CREATE TABLE cache (x int); COMMENT ON TABLE cache IS 'fastpgcache schema 1'`,
		"function": `CREATE FUNCTION cache_changed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$`,
		"walk": `CREATE FUNCTION cache_walk(p_position text, p_every interval, OUT removed integer, OUT next_position text)
			LANGUAGE sql AS $$ SELECT 1, '' $$`,
	} {
		t.Run(name, func(t *testing.T) {
			l := l.in(t)
			l.exec(l.admin, `CREATE SCHEMA `+name+`; GRANT ALL ON SCHEMA `+name+` TO PUBLIC`) // as PostgreSQL 14's public
			l.exec(db, `SET search_path = `+name+`; `+statement)
			for who, db := range map[string]*sql.DB{"superuser": l.admin, "administrator": admin} {
				for _, force := range []bool{false, true} {
					err := fastpgcache.Setup(t.Context(), db, fastpgcache.SetupConfig{Schema: name, Force: force})
					if !errors.Is(err, fastpgcache.ErrNotPermitted) || !strings.Contains(err.Error(), stranger) {
						t.Errorf("%s, Force %t: got %v", who, force, err)
					}
				}
			}
		})
	}
}

// A function or operator of the cache's own schema that fits a call better than
// PostgreSQL's own must not be run, neither by set-up nor by the definer functions.
func TestNothingOfTheSchemaIsRun(t *testing.T) {
	l := newLab(t)
	l.exec(l.admin, `GRANT CREATE ON SCHEMA public TO PUBLIC`)
	_, db := l.role()
	l.exec(db, `CREATE FUNCTION caught() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE 'caught'; END $$`)
	for _, signature := range []string{
		"format(text, text)", "format(text, text, text)", "format(text, text, text, text)", "format(text, text, name)", "format(text, regclass)",
		"format(text, regclass, text)", "format(text, name, regclass, text)", "concat(text, text, name)", "concat_ws(text, text, text)",
		"concat(text, bigint, text)", "pg_relation_size(text)", "quote_ident(name)", "obj_description(regclass, text)",
		"obj_description(oid, text)", "pg_has_role(oid, name)", "greatest(integer, integer)",
		"has_schema_privilege(text, text, name)", "set_config(text, text, text)",
	} {
		l.exec(db, `CREATE FUNCTION public.`+signature+` RETURNS text LANGUAGE sql AS $$ SELECT public.caught()::text $$`)
	}
	for i, operator := range []string{
		"= oid,regclass", "= oid,regprocedure", "= oid,regnamespace", "<> oid,regrole", "<> regrole,regrole", "= name,unknown",
		"|| text,name", "|| text,regprocedure", "|| text,regclass", "<< bigint,integer", "| bigint,integer", "/ bigint,integer",
		"+ bigint,integer", "<> name,text", "= name,text", "~~ text,unknown", "<@ text,text[]",
	} {
		symbol, types, _ := strings.Cut(operator, " ")
		if strings.Contains(types, "unknown") {
			types = strings.ReplaceAll(types, "unknown", "varchar")
		}
		left, right, _ := strings.Cut(types, ",")
		function := fmt.Sprintf("public.trap%d", i)
		result := "boolean"
		if !strings.ContainsAny(symbol, "=<>~") || symbol == "<<" {
			result = "text"
		}
		l.exec(db, fmt.Sprintf(`CREATE FUNCTION %s(%s) RETURNS %s LANGUAGE sql AS $$ SELECT public.caught()::%s $$;
			CREATE OPERATOR public.%s (FUNCTION = %s, LEFTARG = %s, RIGHTARG = %s)`, function, types, result, result, symbol, function, left, right))
	}
	l.setup(l.admin, fastpgcache.SetupConfig{})
	l.setup(l.admin, fastpgcache.SetupConfig{})
	l.exec(l.admin, `SELECT cache_set('u', 'k', 'v', -1)`)
	l.want(l.admin, int64(1), `SELECT cache_cleanup()`)
	l.exec(l.admin, `SELECT cache_walk(NULL, interval '0')`)
	l.exec(l.admin, `SELECT cache_trim(current_user, 1)`)
	l.want(l.admin, int64(-2), `SELECT cache_ttl('u', 'k')`)
	l.want(l.admin, false, `SELECT cache_delete('u', 'k')`)
	l.want(l.admin, false, `SELECT cache_exists('u', 'k')`)
	l.setup(l.admin, fastpgcache.SetupConfig{Force: true})
	for _, object := range []string{"TABLE cache", "TABLE cache_change", "TABLE cache_epoch", "TABLE cache_lease", "TABLE cache_limit"} {
		l.exec(l.admin, `DROP `+object)
	}
	l.exec(l.admin, pythonTable[:strings.Index(pythonTable, "CREATE FUNCTION")])
	l.exec(l.admin, `INSERT INTO cache (user_id, key, value, created_at) VALUES ('u', 'k', 'v', NULL)`)
	l.setup(l.admin, fastpgcache.SetupConfig{})
}

func TestSetupGrantsWhatIsNeededAndTakesTheRest(t *testing.T) {
	l := newLab(t)
	owner, admin := l.administrator()
	group := l.group()
	servants := l.group()
	former, formerDB := l.role()
	member, memberDB := l.role("IN ROLE " + group)
	_, servantDB := l.role("IN ROLE " + servants)

	l.setup(admin, fastpgcache.SetupConfig{Schema: "g", Service: former})
	l.exec(admin, `GRANT ALL ON ALL TABLES IN SCHEMA g TO PUBLIC; GRANT ALL (key) ON g.cache TO `+former+` WITH GRANT OPTION;
		GRANT ALL ON ALL FUNCTIONS IN SCHEMA g TO `+former+` WITH GRANT OPTION;
		ALTER TABLE g.cache DISABLE TRIGGER cache_changed_insert`)
	l.exec(formerDB, `GRANT SELECT (key) ON g.cache TO `+member)
	l.setup(admin, fastpgcache.SetupConfig{Schema: "g", Grantee: group, Service: servants})

	query := `SELECT string_agg(privilege_type || coalesce(' ' || columns, ''), ', ' ORDER BY privilege_type, columns) FROM (
		SELECT g.privilege_type, NULL AS columns FROM pg_class c, aclexplode(c.relacl) g
		WHERE c.oid = $1::text::regclass AND g.grantee = $2::text::regrole
		UNION ALL SELECT g.privilege_type, string_agg(a.attname, ' ' ORDER BY a.attname) FROM pg_attribute a, aclexplode(a.attacl) g
		WHERE a.attrelid = $1::text::regclass AND g.grantee = $2::text::regrole GROUP BY 1) privileges`
	for _, role := range []string{group, servants} {
		l.want(l.admin, "DELETE, INSERT expires_at key mark user_id value value_bytes, SELECT, UPDATE expires_at mark value value_bytes", query, "g.cache", role)
		l.want(l.admin, "DELETE, INSERT keys user_id, SELECT, UPDATE keys", query, "g.cache_change", role)
		l.want(l.admin, "DELETE, INSERT expires_at holder key user_id xid, SELECT, UPDATE expires_at holder xid", query, "g.cache_lease", role)
		l.want(l.admin, "INSERT user_id, SELECT, UPDATE low snapshots taken trimmed waiting walk_position walked_at", query, "g.cache_epoch", role)
		l.want(l.admin, "SELECT", query, "g.cache_limit", role)
		l.want(l.admin, int64(9), `SELECT count(*) FROM pg_proc WHERE pronamespace = 'g'::regnamespace AND has_function_privilege($1, oid, 'EXECUTE')`, role)
	}
	l.want(l.admin, int64(0), `SELECT count(*) FROM pg_class c
		LEFT JOIN pg_attribute a ON a.attrelid = c.oid, aclexplode(array_cat(c.relacl, a.attacl)) g
		WHERE c.relnamespace = 'g'::regnamespace AND g.grantee NOT IN ($1::text::regrole, $2::text::regrole, $3::text::regrole)`, owner, group, servants)
	l.want(l.admin, int64(0), `SELECT count(*) FROM pg_proc WHERE pronamespace = 'g'::regnamespace AND has_function_privilege($1, oid, 'EXECUTE')`, former)
	l.want(l.admin, int64(4), `SELECT count(*) FROM pg_trigger WHERE tgrelid = 'g.cache'::regclass AND tgenabled = 'A'`)

	set := func(db *sql.DB, user string) error {
		return l.cache(db, fastpgcache.Config{Schema: "g", User: user}).Set(t.Context(), "k", "v", 0)
	}
	if err := set(memberDB, ""); err != nil {
		t.Errorf("a member of the grantee: %v", err)
	}
	if err := set(servantDB, "anyone"); err != nil {
		t.Errorf("a member of Service: %v", err)
	}
	if err := set(formerDB, ""); !errors.Is(err, fastpgcache.ErrNotPermitted) {
		t.Errorf("who was Service once: %v", err)
	}
}

func TestSetupByWhoMayNot(t *testing.T) {
	l := newLab(t)
	_, admin := l.administrator()
	_, nobody := l.role()
	try := func(db *sql.DB, cfg fastpgcache.SetupConfig, want error) {
		t.Helper()
		if err := fastpgcache.Setup(t.Context(), db, cfg); !errors.Is(err, want) {
			t.Errorf("%+v: got %v, want %v", cfg, err, want)
		}
	}
	try(nobody, fastpgcache.SetupConfig{Schema: "fresh"}, fastpgcache.ErrNotPermitted)
	l.setup(admin, fastpgcache.SetupConfig{Schema: "theirs"})
	try(nobody, fastpgcache.SetupConfig{Schema: "theirs"}, fastpgcache.ErrNotPermitted)
	try(nobody, fastpgcache.SetupConfig{Schema: "theirs", Force: true}, fastpgcache.ErrNotPermitted)
	try(admin, fastpgcache.SetupConfig{Grantee: "no such role"}, fastpgcache.ErrInvalidConfig)
	try(admin, fastpgcache.SetupConfig{Service: "no such role"}, fastpgcache.ErrInvalidConfig)
	try(admin, fastpgcache.SetupConfig{Schema: strings.Repeat("x", 64)}, fastpgcache.ErrInvalidConfig)
	try(admin, fastpgcache.SetupConfig{Schema: "a\x00b"}, fastpgcache.ErrInvalidConfig)
	try(nil, fastpgcache.SetupConfig{}, fastpgcache.ErrInvalidConfig)
	if _, err := fastpgcache.MigrationSQL(fastpgcache.SetupConfig{Grantee: "\xff"}); !errors.Is(err, fastpgcache.ErrInvalidConfig) {
		t.Errorf("got %v", err)
	}
	l.exec(admin, `COMMENT ON TABLE theirs.cache IS 'fastpgcache schema 2'`)
	err := fastpgcache.Setup(t.Context(), admin, fastpgcache.SetupConfig{Schema: "theirs"})
	if err == nil || !strings.Contains(err.Error(), "newer version") {
		t.Errorf("got %v", err)
	}
}

// Only the owner, or who has become the owner, sets up again: another's rights would
// be at the owner's mercy.
func TestSetupAgainByOthers(t *testing.T) {
	l := newLab(t)
	owner, admin := l.administrator()
	member, memberDB := l.role("IN ROLE " + owner)
	l.setup(admin, fastpgcache.SetupConfig{Schema: "kept"})
	before := l.catalog("kept")
	l.exec(admin, `DROP TABLE kept.cache_lease; DROP FUNCTION kept.cache_cleanup, kept.cache_ttl`)
	for _, db := range []*sql.DB{memberDB, l.admin} {
		err := fastpgcache.Setup(t.Context(), db, fastpgcache.SetupConfig{Schema: "kept"})
		if !errors.Is(err, fastpgcache.ErrNotPermitted) || !strings.Contains(err.Error(), owner) {
			t.Errorf("got %v", err)
		}
	}
	l.setup(l.open(pgtest.WithUser(l.dsn, member)+` options='-c role=`+owner+`'`), fastpgcache.SetupConfig{Schema: "kept"})
	if after := l.catalog("kept"); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	// A comment of the administrator's own, or a dump restored without comments.
	l.exec(admin, `COMMENT ON TABLE kept.cache IS NULL; COMMENT ON TABLE kept.cache_epoch IS 'ours'; COMMENT ON TABLE kept.cache_lease IS NULL`)
	l.setup(admin, fastpgcache.SetupConfig{Schema: "kept"})
	l.want(l.admin, "fastpgcache schema 1", `SELECT obj_description('kept.cache'::regclass)`)
}

func TestSetupForce(t *testing.T) {
	l := newLab(t)
	l.setup(l.admin, fastpgcache.SetupConfig{MaxBytes: 1 << 30})
	before := l.catalog("public")
	fill := func() {
		l.exec(l.admin, `SELECT cache_set('u', 'k', 'v'); INSERT INTO cache_epoch (user_id) VALUES ('u');
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

// hostileNames are names that would do harm wherever one is taken for SQL.
var hostileNames = []string{
	`Mixed Case`, `quo"te`, `it's`, `back\slash`, `$setup$ $function$ $$`, `%I %s %1$s`, `a, pg_temp`, `"x"; DROP TABLE cache; --`,
	`{user}`, `ünï ☃`, ` `, "new\nline", `public.cache`, `select`, `:name`, `?`, `$1`,
}

func TestNamesAreDataEverywhere(t *testing.T) {
	l := newLab(t)
	for i, name := range hostileNames {
		role := fmt.Sprintf("%s %s", name, l.text(l.admin, `SELECT current_database()`)[:20])
		service := role + " s"
		for _, r := range []string{role, service} {
			l.exec(l.admin, `CREATE ROLE `+pq.QuoteIdentifier(r)+` LOGIN PASSWORD 'x'`)
			t.Cleanup(func() {
				l.exec(l.admin, `DROP OWNED BY `+pq.QuoteIdentifier(r)+`; DROP ROLE `+pq.QuoteIdentifier(r))
			})
		}
		cfg := fastpgcache.SetupConfig{Schema: name, Grantee: role, Service: service}
		if i%2 == 0 {
			l.setup(l.open(l.dsn+` standard_conforming_strings=off escape_string_warning=off quote_all_identifiers=on`), cfg)
		}
		l.setup(l.admin, cfg)
		before := l.catalog(name)
		l.setup(l.admin, fastpgcache.SetupConfig{Schema: name})
		l.setup(l.admin, cfg)
		if after := l.catalog(name); after != before {
			t.Errorf("%q: before:\n%s\nafter:\n%s", name, before, after)
		}
		l.want(l.admin, int64(0), `SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace`)

		as := func(role string) *sql.DB {
			return l.open(l.dsn + ` user='` + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(role) + `' password=x`)
		}
		c := l.cache(as(role), fastpgcache.Config{Schema: name})
		labelled := l.cache(as(service), fastpgcache.Config{Schema: name, User: role})
		for _, key := range hostileNames {
			if err := c.Set(t.Context(), key, key, time.Hour); err != nil {
				t.Fatalf("%q: %v", name, err)
			}
			var got string
			if found, err := labelled.Get(t.Context(), key, &got); err != nil || !found || got != key {
				t.Fatalf("%q: got %q, %v, %v", name, got, found, err)
			}
		}
		if _, err := c.Cleanup(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

func TestMigrationSQLAndPsqlMakeWhatSetupMakes(t *testing.T) {
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
	for _, cfg := range []fastpgcache.SetupConfig{{}, {Schema: "public", Grantee: group, Service: service}, {Schema: `Wei"rd \ $$`}} {
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
	var sql strings.Builder
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, `\`) { // what is psql's
			sql.WriteString(line)
		}
	}
	conn := restored.open(restored.dsn)
	conn.SetMaxOpenConns(1)
	restored.exec(conn, sql.String())
	conn.Close()
	restored.setup(restored.open(pgtest.WithUser(restored.dsn, owner)), fastpgcache.SetupConfig{Schema: "dumped"})
	comments := strings.NewReplacer(" fastpgcache schema 1", "", " fastpgcache epoch", "", " fastpgcache lease", "", " fastpgcache change", "", " fastpgcache limit", "")
	if got, want := comments.Replace(restored.catalog("dumped")), comments.Replace(l.catalog("dumped")); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
