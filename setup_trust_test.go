package fastpgcache_test

import (
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
	"github.com/lib/pq"
)

func TestSetupRefusesWhatIsNotTheCaches(t *testing.T) {
	t.Parallel()
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
		l.want(l.admin, "INSERT user_id, SELECT, UPDATE begun bites bytes counted cut entries evicted growth half low since sized_at sizing snapshots sums taken trimmed waiting walk_position walked_at written", query, "g.cache_epoch", role)
		l.want(l.admin, "SELECT", query, "g.cache_limit", role)
		l.want(l.admin, int64(10), `SELECT count(*) FROM pg_proc WHERE pronamespace = 'g'::regnamespace AND has_function_privilege($1, oid, 'EXECUTE')`, role)
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

// hostileNames are names that would do harm wherever one is taken for SQL.
var hostileNames = []string{
	`Mixed Case`, `quo"te`, `it's`, `back\slash`, `$setup$ $function$ $$`, `%I %s %1$s`, `a, pg_temp`, `"x"; DROP TABLE cache; --`,
	`{user}`, `ünï ☃`, ` `, "new\nline", `public.cache`, `select`, `:name`, `?`, `$1`,
}

func TestNamesAreDataEverywhere(t *testing.T) {
	t.Parallel()
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
