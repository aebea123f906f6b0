package fastpgcache_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"testing"

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

// catalogOf lists the relations and routines of a schema, whatever they are.
func (l *lab) catalogOf(schema string) string {
	return l.text(l.admin, `SELECT string_agg(line, ',' ORDER BY line) FROM (
		SELECT concat(oid, relname, relkind) AS line FROM pg_class WHERE relnamespace = $1::text::regnamespace
		UNION ALL SELECT concat(oid, proname, prosrc) FROM pg_proc WHERE pronamespace = $1::text::regnamespace) lines`, schema)
}
