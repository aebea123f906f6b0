package fastpgcache_test

import (
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/lib/pq"
)

// entries is all that a table holds of a user, to the last bit.
func (l *lab) entries(user string) string {
	l.Helper()
	return l.text(l.admin, `SELECT concat(
		(SELECT string_agg(concat_ws(',', c.ctid, c.xmin, c.xmax, c), ';' ORDER BY c.key) FROM cache c WHERE user_id = $1),
		(SELECT string_agg(concat_ws(',', c.ctid, c.xmin, c.xmax, c), ';' ORDER BY c.key) FROM cache_lease c WHERE user_id = $1),
		(SELECT string_agg(e.id::text, ';') FROM cache_epoch e WHERE user_id = $1),  -- the rest changes with the user's own trimming
		(SELECT string_agg(concat_ws(',', c.ctid, c.xmin, c.xmax, c), ';' ORDER BY c) FROM cache_change c WHERE user_id = $1))`, user)
}

// village is a cache of a plain administrator's, with two users and what alice,
// the one, has stored.
type village struct {
	*lab
	owner, alice, mallory       string
	ownerDB, aliceDB, malloryDB *sql.DB
}

func newVillage(t *testing.T) *village {
	v := &village{lab: newLab(t)}
	v.owner, v.ownerDB = v.administrator()
	group := v.group()
	v.alice, v.aliceDB = v.role("IN ROLE " + group)
	v.mallory, v.malloryDB = v.role("IN ROLE " + group)
	v.setup(v.ownerDB, fastpgcache.SetupConfig{Grantee: group})
	c := v.cache(v.aliceDB, fastpgcache.Config{})
	for key, value := range map[string]any{"text": "secret", "bytes": []byte{0, 255}, "both": "alice's"} {
		if err := c.Set(t.Context(), key, value, time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	v.exec(v.aliceDB, `SELECT cache_begin(current_user::text)`) // or trimming would make it, any time
	v.exec(v.aliceDB, `INSERT INTO cache_lease (key, holder, expires_at) VALUES ('text', 'alice', now() + interval '1 h')`)
	v.exec(v.ownerDB, `INSERT INTO cache (user_id, key, value, expires_at) VALUES ($1, 'expired', 'secret', now() - interval '1 h')`, v.alice)
	return v
}

func TestAClaimedUserGivesNoRights(t *testing.T) {
	v := newVillage(t)
	before := v.entries(v.alice)
	ctx := t.Context()
	for _, prepare := range []bool{true, false} {
		c := v.cache(v.malloryDB, fastpgcache.Config{User: v.alice, DisablePrepare: !prepare})
		tx, err := v.malloryDB.Begin()
		if err != nil {
			t.Fatal(err)
		}
		defer tx.Rollback()
		for name, c := range map[string]*fastpgcache.Cache{"": c, " in a transaction": c.WithTx(tx)} {
			for _, key := range []string{"text", "bytes", "both", "expired", "absent"} {
				var got string
				if found, err := c.Get(ctx, key, &got); found || err != nil || got != "" {
					t.Errorf("Get%s: %v, %v, %q", name, found, err, got)
				}
				if found, err := c.Exists(ctx, key); found || err != nil {
					t.Errorf("Exists%s: %v, %v", name, found, err)
				}
				if ttl, found, err := c.TTL(ctx, key); found || err != nil || ttl != 0 {
					t.Errorf("TTL%s: %v, %v, %v", name, ttl, found, err)
				}
				if found, err := c.Expire(ctx, key, time.Second); found || err != nil {
					t.Errorf("Expire%s: %v, %v", name, found, err)
				}
				if found, err := c.Persist(ctx, key); found || err != nil {
					t.Errorf("Persist%s: %v, %v", name, found, err)
				}
				if found, err := c.Delete(ctx, key); found || err != nil {
					t.Errorf("Delete%s: %v, %v", name, found, err)
				}
			}
		}
		for _, key := range []string{"text", "expired", "absent"} {
			if err := c.Set(ctx, key, "mallory's", 0); !errors.Is(err, fastpgcache.ErrNotPermitted) {
				t.Errorf("Set: %v", err)
			}
		}
		if err := c.WithTx(tx).Set(ctx, "text", "mallory's", 0); !errors.Is(err, fastpgcache.ErrNotPermitted) {
			t.Errorf("Set in a transaction: %v", err)
		}
	}
	if after := v.entries(v.alice); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	// The two keep entries of one name apart.
	c := v.cache(v.malloryDB, fastpgcache.Config{})
	if err := c.Set(ctx, "both", "mallory's", 0); err != nil {
		t.Fatal(err)
	}
	var got string
	if _, err := v.cache(v.aliceDB, fastpgcache.Config{User: v.alice}).Get(ctx, "both", &got); err != nil || got != "alice's" {
		t.Errorf("got %q, %v", got, err)
	}
	if removed, err := c.Cleanup(ctx); err != nil || removed != 0 {
		t.Errorf("Cleanup of another's: %d, %v", removed, err)
	}
}

// Whatever SQL a confined role sends, others' entries stay what and where they
// are, and what it reads is its own.
func TestNoStatementReachesOthersEntries(t *testing.T) {
	v := newVillage(t)
	mallory := v.cache(v.malloryDB, fastpgcache.Config{})
	if err := mallory.Set(t.Context(), "mine", "mine", 0); err != nil {
		t.Fatal(err)
	}
	v.exec(v.admin, `CREATE SCHEMA workshop; GRANT ALL ON SCHEMA workshop TO PUBLIC`)
	const denied, rowSecurity, noCopy = "42501", "42501", "0A000"
	before := v.entries(v.alice)
	a := pq.QuoteLiteral(v.alice)

	// Each fails, or affects nothing; none returns a row.
	for statement, want := range map[string]string{
		`INSERT INTO cache (user_id, key, value) VALUES (` + a + `, 'new', 'x')`:                                                       rowSecurity,
		`INSERT INTO cache (user_id, key, value) VALUES (` + a + `, 'text', 'x')`:                                                      rowSecurity, // not 23505
		`INSERT INTO cache (user_id, key, value) VALUES (` + a + `, 'text', 'x') ON CONFLICT DO NOTHING`:                               rowSecurity,
		`INSERT INTO cache (user_id, key, value) VALUES (` + a + `, 'no', 'x') ON CONFLICT DO NOTHING`:                                 rowSecurity,
		`INSERT INTO cache (user_id, key, value) VALUES (` + a + `, 'text', 'x') ON CONFLICT (user_id, key) DO UPDATE SET value = 'x'`: rowSecurity,
		`INSERT INTO cache (user_id, key, value) VALUES (NULL, 'text', 'x')`:                                                           rowSecurity,
		`INSERT INTO cache (user_id, key, value, mark) VALUES (` + a + `, 'x', 'x', 1)`:                                                rowSecurity,
		`INSERT INTO cache (key, value, created_at) VALUES ('x', 'x', now())`:                                                          denied,
		`UPDATE cache SET value = 'x' WHERE user_id = ` + a:                                                                            "",
		`UPDATE cache SET value = 'x' WHERE key <> 'mine'`:                                                                             "",
		`UPDATE cache SET user_id = ` + a + ` WHERE key = 'mine'`:                                                                      denied,
		`UPDATE cache SET key = 'text' WHERE key = 'mine'`:                                                                             denied,
		`UPDATE cache SET mark = 1 WHERE user_id = ` + a:                                                                               "",
		`UPDATE cache SET user_id = user_id`:                                                                                           denied,
		`UPDATE cache SET created_at = now()`:                                                                                          denied,
		`DELETE FROM cache WHERE user_id = ` + a:                                                                                       "",
		`DELETE FROM cache WHERE key <> 'mine' RETURNING *`:                                                                            "",
		`DELETE FROM cache USING cache_lease l WHERE cache.key = l.key`:                                                                "",
		`DELETE FROM cache WHERE ctid = ANY (SELECT format('(0,%s)', g)::tid FROM generate_series(1, 20) g) AND key <> 'mine'`:         "",
		`SELECT FROM cache WHERE user_id = ` + a + ` FOR UPDATE`:                                                                       "",
		`SELECT FROM cache WHERE user_id <> current_user`:                                                                              "",
		`SELECT FROM cache_lease`:                                                                                                      "",
		`COPY cache (user_id, key, value) FROM STDIN`:                                                                                  noCopy,
		`COPY cache TO PROGRAM 'cat'`:                                                                                                  denied,
		`TRUNCATE cache`:                                                                                                               denied,
		`TRUNCATE cache_lease`:                                                                                                         denied,
		`TRUNCATE cache_epoch`:                                                                                                         denied,
		`DROP TABLE cache`:                                                                                                             denied,
		`ALTER TABLE cache DISABLE ROW LEVEL SECURITY`:                                                                                 denied,
		`CREATE POLICY p ON cache USING (true)`:                                                                                        denied,
		`DROP POLICY cache_own_rows ON cache`:                                                                                          denied,
		`CREATE INDEX ON cache (expires_at)`:                                                                                           denied,
		`CREATE RULE r AS ON INSERT TO cache DO ALSO SELECT 1`:                                                                         denied,
		`CREATE STATISTICS workshop.s ON key, value FROM cache`:                                                                        denied,
		`COMMENT ON TABLE cache IS ''`:                                                                                                 denied,
		`CREATE TRIGGER t BEFORE INSERT ON cache FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()`:                   denied,
		`CREATE UNLOGGED TABLE workshop.ref (u text, k text, FOREIGN KEY (u, k) REFERENCES cache)`:                                     denied,
		`CREATE TABLE workshop.kid () INHERITS (cache)`:                                                                                denied,
		`CREATE FUNCTION workshop.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN END'; ALTER FUNCTION cache_changed() OWNER TO ` + v.mallory: denied,
		`CREATE OR REPLACE FUNCTION cache_cleanup() RETURNS integer LANGUAGE sql AS 'SELECT 1'`:                                              denied,
		`SELECT cache_changed()`:                    denied,
		`SET row_security = off; SELECT FROM cache`: denied,
		`SET ROLE ` + v.owner:                       denied,
		`SET SESSION AUTHORIZATION ` + v.alice:      denied,
		`SET session_replication_role = replica`:    denied,
		`INSERT INTO cache_lease (user_id, key, holder, expires_at) VALUES (` + a + `, 'k', 'm', 'infinity')`:                       rowSecurity,
		`INSERT INTO cache_lease VALUES (` + a + `, 'text', 'm', 'infinity') ON CONFLICT (user_id, key) DO UPDATE SET holder = 'm'`: rowSecurity,
		`UPDATE cache_lease SET holder = 'm'`:                                            "",
		`UPDATE cache_lease SET user_id = 'x'`:                                           denied,
		`DELETE FROM cache_lease`:                                                        "",
		`UPDATE cache_epoch SET id = gen_random_uuid()`:                                  denied,
		`UPDATE cache_epoch SET walked_at = 'infinity' WHERE user_id = ` + a:             "",
		`UPDATE cache_epoch SET low = 1, trimmed = NULL WHERE user_id <> current_user`:   "",
		`DELETE FROM cache_epoch`:                                                        denied,
		`INSERT INTO cache_epoch (id) VALUES (gen_random_uuid())`:                        denied,
		`INSERT INTO cache_epoch (user_id) VALUES (` + a + `)`:                           rowSecurity,
		`INSERT INTO cache_epoch (user_id) VALUES (` + a + `) ON CONFLICT DO NOTHING`:    rowSecurity,
		`SELECT FROM cache_epoch WHERE user_id <> current_user FOR UPDATE`:               "", // or it could stop another's cleanup
		`SELECT FROM cache_change WHERE user_id <> current_user`:                         "",
		`INSERT INTO cache_change (user_id, keys) VALUES (` + a + `, '{text}')`:          rowSecurity,
		`INSERT INTO cache_change (xid) VALUES (1)`:                                      denied,
		`UPDATE cache_change SET keys = NULL WHERE user_id = ` + a:                       "",
		`UPDATE cache_change SET xid = 1`:                                                denied,
		`DELETE FROM cache_change WHERE user_id <> current_user`:                         "",
		`TRUNCATE cache_change`:                                                          denied,
		`INSERT INTO cache_limit VALUES ('', 1)`:                                         denied,
		`UPDATE cache_limit SET max_bytes = 1`:                                           denied,
		`DELETE FROM cache_limit`:                                                        denied,
		`SELECT FROM cache_limit FOR SHARE`:                                              denied,
		`LOCK TABLE cache_limit IN ROW SHARE MODE`:                                       denied, // or it could stop set-ups
		`LOCK TABLE cache_limit IN SHARE UPDATE EXCLUSIVE MODE`:                          denied,
		`SELECT FROM cache_trim(` + a + `, 10)`:                                          rowSecurity,
		`SELECT FROM cache_begin(` + a + `)`:                                             rowSecurity,
		`SELECT FROM cache_set(` + a + `, 'text', 'x')`:                                  rowSecurity,
		`SELECT FROM cache_set(NULL, 'text', 'x')`:                                       rowSecurity,
		`SELECT cache_get FROM cache_get(` + a + `, 'text') WHERE cache_get IS NOT NULL`: "",
		`SELECT FROM cache_exists(` + a + `, 'text') WHERE cache_exists`:                 "",
		`SELECT FROM cache_ttl(` + a + `, 'text') WHERE cache_ttl <> -2`:                 "",
		`SELECT FROM cache_delete(` + a + `, 'text') WHERE cache_delete`:                 "",
		`SELECT FROM pg_stats WHERE tablename LIKE 'cache%'`:                             "",
		`SELECT FROM pg_statistic`:                                                       denied,
		// A condition that tells what it sees is not asked about others' rows.
		`CREATE FUNCTION workshop.tell(text) RETURNS boolean COST 0.0000001 LANGUAGE plpgsql AS $$ BEGIN
			IF $1 = 'secret' THEN RAISE 'told'; END IF; RETURN false; END $$; SELECT FROM cache WHERE workshop.tell(value)`: "",
		`CREATE OPERATOR workshop.=== (FUNCTION = texteq, LEFTARG = text, RIGHTARG = text, RESTRICT = eqsel);
			SELECT FROM cache WHERE value OPERATOR(workshop.===) 'secret'`: "",
		`CREATE VIEW workshop.v AS SELECT * FROM cache; UPDATE workshop.v SET value = 'x' WHERE key <> 'mine'`: "",
		`SELECT 1/(length(value) - 6) FROM cache WHERE key = 'text'`:                                           "",
	} {
		conn, err := v.malloryDB.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		affected := int64(-1)
		tx, err := conn.BeginTx(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		result, err := tx.Exec(statement)
		if err == nil {
			affected, _ = result.RowsAffected()
		}
		tx.Rollback()
		conn.Close()
		switch {
		case want == "":
			if err != nil || affected > 0 {
				t.Errorf("%s: affects %d rows, %v", statement, affected, err)
			}
		default:
			if got := sqlState(err); got != want {
				t.Errorf("%s: got %v, want %s", statement, err, want)
			}
			if e := (*pq.Error)(nil); errors.As(err, &e) && e.Detail != "" && strings.Contains(e.Detail, v.alice) {
				t.Errorf("%s: its detail tells %s", statement, e.Detail)
			}
		}
		if after := v.entries(v.alice); after != before {
			t.Fatalf("%s\nbefore:\n%s\nafter:\n%s", statement, before, after)
		}
	}
	v.want(v.malloryDB, "mine", `SELECT string_agg(value, ',') FROM cache`)
	v.want(v.malloryDB, int64(0), `SELECT count(*) FROM cache_lease`)
}

// GRANT by one who may not is a warning, or an error: either way nothing changes.
func TestAConfinedRoleCannotPassOnItsRights(t *testing.T) {
	v := newVillage(t)
	before := v.catalog("public")
	v.malloryDB.Exec(`GRANT ALL ON cache, cache_lease, cache_epoch, cache_change, cache_limit TO PUBLIC`)
	v.malloryDB.Exec(`GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO PUBLIC`)
	if after := v.catalog("public"); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// EXPLAIN shows a role the planner's estimates, made from everybody's rows: they
// must not depend on keys or values.
func TestEstimatesTellNothingOfKeysAndValues(t *testing.T) {
	for _, python := range []bool{false, true} {
		l := newLab(t)
		name, mallory := l.role()
		if python {
			l.exec(l.admin, pythonTable)
		} else {
			l.setup(l.admin, fastpgcache.SetupConfig{})
		}
		l.exec(l.admin, `INSERT INTO cache (user_id, key, value) SELECT CASE g % 5 WHEN 0 THEN '`+name+`' ELSE 'u' END,
			CASE WHEN g % 2 = 0 THEN 'm' ELSE 'z' END || g, CASE WHEN g % 3 > 0 THEN 'frequent' ELSE 'v' || g END
			FROM generate_series(1, 20000) g; ANALYZE cache`)
		l.setup(l.admin, fastpgcache.SetupConfig{})
		for range 2 {
			estimate := func(where string) (rows string) {
				var line string
				if err := mallory.QueryRow(`EXPLAIN SELECT FROM cache WHERE ` + where).Scan(&line); err != nil {
					t.Fatal(err)
				}
				_, rows, _ = strings.Cut(line, "rows=")
				return rows
			}
			for _, pair := range [][2]string{
				{`value = 'frequent'`, `value = 'rare'`}, {`value < 'f'`, `value < 'zzz'`},
				{`key < 'a'`, `key < 'n'`}, {`key = 'm2'`, `key = 'no'`}, {`key LIKE 'm%'`, `key LIKE 'n%'`},
			} {
				if a, b := estimate(pair[0]), estimate(pair[1]); a != b {
					t.Errorf("Python's table %t: %s gives %s, %s %s", python, pair[0], a, pair[1], b)
				}
			}
			l.exec(l.admin, `ANALYZE cache`)
		}
	}
}

func TestServiceAndOwnerServeManyLabels(t *testing.T) {
	l := newLab(t)
	owner, ownerDB := l.administrator()
	service, serviceDB := l.role()
	_, memberDB := l.role("IN ROLE " + owner)
	group := l.group()
	_, strangerDB := l.role()
	_, userDB := l.role("IN ROLE " + group)
	l.setup(ownerDB, fastpgcache.SetupConfig{Grantee: group, Service: service})
	ctx := t.Context()
	for who, db := range map[string]*sql.DB{"owner": ownerDB, "service": serviceDB, "owner's member": memberDB, "superuser": l.admin} {
		caches := map[string]*fastpgcache.Cache{"": l.cache(db, fastpgcache.Config{})}
		for _, label := range []string{"tenant-1", "tenant-2", `'; --`} {
			caches[label] = l.cache(db, fastpgcache.Config{User: label})
		}
		for label, c := range caches {
			if err := c.Set(ctx, "k", who+label, time.Hour); err != nil {
				t.Fatalf("%s: %v", who, err)
			}
		}
		for label, c := range caches {
			var got string
			if found, err := c.Get(ctx, "k", &got); err != nil || !found || got != who+label {
				t.Errorf("%s: got %q, %v, %v", who, got, found, err)
			}
			if found, err := c.Expire(ctx, "k", time.Minute); err != nil || !found {
				t.Errorf("%s: %v, %v", who, found, err)
			}
			if deleted, err := c.Delete(ctx, "k"); err != nil || !deleted {
				t.Errorf("%s: %v, %v", who, deleted, err)
			}
			if deleted, err := c.Delete(ctx, "k"); err != nil || deleted {
				t.Errorf("%s: %v, %v", who, deleted, err)
			}
		}
		for _, f := range []string{`SELECT cache_set('tenant-3', 'k', 'v')`, `SELECT cache_exists('tenant-3', 'k')`, `SELECT cache_delete('tenant-3', 'k')`} {
			l.want(db, true, f)
		}
		l.want(db, int64(0), `SELECT count(*) FROM cache`)
	}
	// A service does not own the cache.
	for _, statement := range []string{`TRUNCATE cache`, `UPDATE cache SET user_id = 'x'`, `INSERT INTO cache_limit VALUES ('x', 1)`} {
		if _, err := serviceDB.Exec(statement); sqlState(err) != "42501" {
			t.Errorf("%s: %v", statement, err)
		}
	}
	// And who is neither covered by the grantee nor a service has no rights at all.
	c := l.cache(strangerDB, fastpgcache.Config{})
	if _, err := c.Get(ctx, "k", nil); !errors.Is(err, fastpgcache.ErrNotPermitted) {
		t.Errorf("got %v", err)
	}
	if _, err := c.Cleanup(ctx); !errors.Is(err, fastpgcache.ErrNotPermitted) {
		t.Errorf("got %v", err)
	}
	if err := l.cache(userDB, fastpgcache.Config{User: "tenant-1"}).Set(ctx, "k", "v", 0); !errors.Is(err, fastpgcache.ErrNotPermitted) {
		t.Errorf("got %v", err)
	}
}

// A pool that changes its role between statements, as poolers do, never sees
// through a plan made for another.
func TestAPreparedPlanFollowsTheRole(t *testing.T) {
	v := newVillage(t)
	conn, err := v.admin.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stmt, err := conn.PrepareContext(t.Context(), `SELECT count(*) FROM cache WHERE user_id = $1`)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 30 {
		role, want := v.alice, 4
		if i%2 == 1 {
			role, want = v.mallory, 0
		}
		if i%3 == 2 {
			role, want = "postgres", 4
		}
		if _, err := conn.ExecContext(t.Context(), fmt.Sprintf(`SET ROLE %s`, role)); err != nil {
			t.Fatal(err)
		}
		var got int
		if err := stmt.QueryRow(v.alice).Scan(&got); err != nil || got != want {
			t.Errorf("as %s: got %d, %v; want %d", role, got, err, want)
		}
	}
}
