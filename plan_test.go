package fastpgcache

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
	"github.com/lib/pq"
)

// planSize entries are in the table, and planBlocks and planRows bound what a
// statement about one key may read of it, with a margin for the index's depth and
// for dead rows; one about many keys may read that for each.
const (
	planSize   = 20_000
	planBlocks = 80
	planRows   = 50
	clearPage  = 2000
	beyond     = `'􏿿'`
)

// samples are, by the name of each statement in core, arguments in SQL without the
// user's label, and how many keys it is about. Whoever adds a statement adds it here.
var samples = map[string]struct {
	args []string
	keys int
}{
	"single.get":        {[]string{`'k42'`}, 1},
	"single.set":        {[]string{`'k42'`, `'v'`, `NULL`, `1000000`}, 1},
	"single.aged":       {[]string{`'k42'`, `1000000`}, 1},
	"batches.aged":      {[]string{`ARRAY['k42', 'k43', 'k1000', 'none']`, `1000000`}, 4},
	"single.del":        {[]string{`'k42'`}, 1},
	"single.exists":     {[]string{`'k42'`}, 1},
	"ttls.ttl":          {[]string{`'k42'`}, 1},
	"ttls.expire":       {[]string{`'k42'`, `1000000`}, 1},
	"ttls.persist":      {[]string{`'k42'`}, 1},
	"ttls.cleanup":      {[]string{`''`, `NULL`}, 150}, // a bite
	"batches.get":       {[]string{`ARRAY['k42', 'k43', 'k1000', 'none']`}, 4},
	"batches.set":       {[]string{`ARRAY['k42', 'k43', 'new']`, `ARRAY['v', NULL, 'v']`, `ARRAY[NULL, 'v', NULL]::bytea[]`, `ARRAY[1000000, NULL, 1]`}, 3},
	"batches.del":       {[]string{`ARRAY['k42', 'k43', 'k1000', 'none']`}, 4},
	"batches.lock":      {[]string{`ARRAY['k42', 'k43', 'k1000', 'none']`}, 4},
	"batches.exists":    {[]string{`ARRAY['k42', 'k43', 'k1000', 'none']`}, 4},
	"atomics.add":       {[]string{`'k42'`, `'v'`, `NULL`, `1000000`}, 1},
	"atomics.increment": {[]string{`'n'`, `1`, `NULL`}, 1},
	"atomics.take":      {[]string{`'k42'`}, 1},
	"walks.keys":        {[]string{`''`, `'k1'`, beyond}, keysPage},
	"walks.clear":       {[]string{`''`, `'k1'`, beyond}, clearPage},
	"walks.clearLeases": {[]string{`''`, beyond}, 3}, // the user's own
	"loads.acquire":     {[]string{`ARRAY['k42', 'k43', 'none']`, `'h'`, `1000000`}, 3},
	"loads.renew":       {[]string{`ARRAY['k42', 'k43', 'none']`, `'h'`, `1000000`}, 3},
	"loads.release":     {[]string{`ARRAY['k42', 'k43', 'none']`, `'h'`}, 3},
	"loads.look":        {[]string{`ARRAY['k42', 'k43', 'none']`}, 3},
	"loads.store":       {[]string{`ARRAY['k42', 'k43']`, `'h'`, `ARRAY['k42', 'k43']`, `ARRAY['v', '']`, `ARRAY[]::bytea[]`, `ARRAY[1000000, -2000000]`, `ARRAY['1']`}, 2},
	"loads.remember":    {[]string{`ARRAY['k42', 'k43', 'none']`, `ARRAY[1, 2, 3]`}, 3},
	"feed.read":         {[]string{`9223372036854775807`, `''`, `'public.cache'`, `'public.cache_change'`}, 1},
	"feed.page":         {[]string{`'k99990'`}, 100},
	"feed.begin":        {nil, 1},
	"feed.trimFeed":     {nil, 3},
	"quota.tell":        {[]string{`1`}, 1},
	"quota.fit":         {[]string{`0`}, 1},
	"quota.touch":       {[]string{`ARRAY['k42', 'k43', 'k1000', 'none']`}, 4},
}

// named returns a cache's statements by the names of their fields.
func (c *core) named(t *testing.T) map[string]*statement {
	t.Helper()
	named := map[string]*statement{}
	for _, room := range []any{&c.single, &c.batches, &c.ttls, &c.atomics, &c.walks, &c.loads, c.feed, c.quota} {
		fields := reflect.ValueOf(room).Elem()
		for i := range fields.NumField() {
			if f := fields.Field(i); f.Type() == reflect.TypeFor[*statement]() {
				named[fields.Type().Name()+"."+fields.Type().Field(i).Name] = (*statement)(f.UnsafePointer())
			}
		}
	}
	if len(named) != len(c.statements.all)-1 || len(samples) != len(named) { // without Ping's
		t.Fatalf("%d statements, %d of them in fields, %d samples", len(c.statements.all), len(named), len(samples))
	}
	return named
}

// node is what EXPLAIN tells of a node of a plan.
type node struct {
	Type    string  `json:"Node Type"`
	Index   string  `json:"Index Name"`
	Rows    float64 `json:"Actual Rows"`
	Loops   float64 `json:"Actual Loops"`
	Removed float64 `json:"Rows Removed by Filter"`
	Recheck float64 `json:"Rows Removed by Index Recheck"`
	Hit     int     `json:"Shared Hit Blocks"`
	Read    int     `json:"Shared Read Blocks"`
	Plans   []node
}

// rows returns the most rows that any node below n read.
func (n node) rows() float64 {
	most := (n.Rows + n.Removed + n.Recheck) * n.Loops
	for _, p := range n.Plans {
		most = max(most, p.rows())
	}
	return most
}

// Whoever asks, with whatever statistics, the planner finds the row by its key.
func TestEveryStatementReadsABoundedNumberOfRows(t *testing.T) {
	t.Parallel()
	dsn := pgtest.Database(t)
	admin, err := sql.Open("postgres", dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	if err := Setup(t.Context(), admin, SetupConfig{}); err != nil {
		t.Fatal(err)
	}
	user := pgtest.Role(t, dsn)
	for _, users := range []int{1, 1000} {
		for _, analyzed := range []bool{false, true} {
			fillPlanned(t, admin, user, users, analyzed)
			for _, label := range []string{"", user} {
				for _, as := range []string{"postgres", user} {
					if as == "postgres" && label == "" && users > 1 {
						continue // has no entries here
					}
					for _, mode := range []string{"force_generic_plan", "force_custom_plan"} {
						name := fmt.Sprintf("%d users, analyzed %t, label %q, as %s, %s", users, analyzed, label, as, mode)
						s := newSession(t, dsn, as, label, mode)
						for op := range s.statements {
							s.check(t, name, op)
						}
					}
				}
			}
		}
	}
}

// fillPlanned makes the cache anew with planSize entries in random order, those of user
// among them.
func fillPlanned(t *testing.T, admin *sql.DB, user string, users int, analyzed bool) {
	t.Helper()
	if err := Setup(t.Context(), admin, SetupConfig{Force: true}); err != nil {
		t.Fatal(err)
	}
	statements := []string{
		`ALTER TABLE cache SET (autovacuum_enabled = off)`,
		`ALTER TABLE cache_epoch SET (autovacuum_enabled = off)`, // who counts its 95 rows reads them one by one
		fmt.Sprintf(`INSERT INTO cache (user_id, key, value, expires_at)
			SELECT CASE WHEN g %% %[2]d = 0 THEN %[1]s ELSE 'u' || g %% %[2]d END, 'k' || g, repeat('v', 100), now() + interval '1 h'
			FROM generate_series(1, %[3]d) g ORDER BY md5(g::text)`, pq.QuoteLiteral(user), users, planSize),
		fmt.Sprintf(`INSERT INTO cache (user_id, key, value) SELECT u, 'k42', 'v' FROM unnest(ARRAY['postgres', %s]) u ON CONFLICT DO NOTHING`, pq.QuoteLiteral(user)),
		`INSERT INTO cache_lease SELECT 'u' || g % 100, 'k' || g, 'h', now() + interval '1 h' FROM generate_series(1, 2000) g`,
		fmt.Sprintf(`INSERT INTO cache_lease SELECT u, k, 'h', now() + interval '1 h' FROM unnest(ARRAY['postgres', %s]) u, unnest('{k42,k43,x}'::text[]) k`, pq.QuoteLiteral(user)),
	}
	if analyzed {
		statements = append(statements, `VACUUM ANALYZE cache`, `VACUUM ANALYZE cache_lease`)
	}
	for _, statement := range statements {
		if _, err := admin.Exec(statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
}

// explainNode runs a statement, undoes it, and returns its plan.
func explainNode(t *testing.T, conn *sql.Conn, statement string) (plan node, text string) {
	t.Helper()
	tx, err := conn.BeginTx(context.Background(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if err := tx.QueryRow(`EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) ` + statement).Scan(&text); err != nil {
		t.Fatalf("%s: %v", statement, err)
	}
	// Once more: the first time reads the catalogs, too.
	if err := tx.QueryRow(`EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) ` + statement).Scan(&text); err != nil {
		t.Fatalf("%s: %v", statement, err)
	}
	var plans []struct{ Plan node }
	if err := json.Unmarshal([]byte(text), &plans); err != nil {
		t.Fatal(err)
	}
	return plans[0].Plan, text
}

// A plan that was made while a user had few entries is right when there are many:
// at once, where the planner knew nothing of the table or of more than the user's; where
// it had counted those few and nothing else, once they are counted again. SQL-NOTES 34.
func TestPlansStayRightWhenAUserGrows(t *testing.T) {
	t.Parallel()
	n := 100_000
	if pgtest.Long() {
		n = 1_000_000
	}
	dsn := pgtest.Database(t)
	admin, err := sql.Open("postgres", dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	user := pgtest.Role(t, dsn)
	if err := Setup(t.Context(), admin, SetupConfig{}); err != nil {
		t.Fatal(err)
	}
	exec := func(statement string) {
		t.Helper()
		if _, err := admin.Exec(statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
	insert := func(user string, from, to int) {
		t.Helper()
		exec(fmt.Sprintf(`INSERT INTO cache (user_id, key, value, expires_at, mark) SELECT %s, 'k' || g, repeat('v', 100), now() + interval '1 h', txid_current()
			FROM generate_series(%d, %d) g ORDER BY md5(g::text)`, pq.QuoteLiteral(user), from, to))
	}
	exec(`ALTER TABLE cache SET (autovacuum_enabled = off)`)
	for _, state := range []string{"never analysed", "among others", "analysed again"} {
		exec(`TRUNCATE cache`)
		insert(user, 40, 49)
		switch state {
		case "among others":
			insert("other", 1, planSize)
			exec(`VACUUM ANALYZE cache`)
		case "analysed again":
			exec(`VACUUM ANALYZE cache`)
		}
		var sessions []*session
		for _, label := range []string{"", user} {
			for _, as := range []string{"postgres", user} {
				if as == "postgres" && label == "" {
					continue
				}
				for _, mode := range []string{"auto", "force_generic_plan"} {
					s := newSession(t, dsn, as, label, mode)
					for op := range s.statements {
						for range 7 { // a generic plan may be made from the sixth on
							s.run(t, op)
						}
					}
					sessions = append(sessions, s)
				}
			}
		}
		insert(user, 50, n)
		if state == "analysed again" {
			exec(`ANALYZE cache`)
		}
		for _, s := range sessions {
			for op := range s.statements {
				s.check(t, fmt.Sprintf("%s, %s", state, s.name), op)
			}
			s.conn.Close()
		}
	}
}

// session is a connection that has a cache's statements prepared.
type session struct {
	name       string
	conn       *sql.Conn
	statements map[string]string // EXECUTE of each, by its name
}

func newSession(t *testing.T, dsn, as, label, mode string) *session {
	t.Helper()
	db, err := sql.Open("postgres", pgtest.WithUser(dsn, as)+" plan_cache_mode="+mode)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	c, err := New(db, Config{User: label})
	if err != nil {
		t.Fatal(err)
	}
	s := &session{fmt.Sprintf("label %q, as %s, %s", label, as, mode), nil, map[string]string{}}
	if s.conn, err = db.Conn(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.conn.Close() })
	for op, st := range c.named(t) {
		sample, ok := samples[op]
		if !ok {
			t.Fatalf("samples has no %q", op)
		}
		args := slices.Clone(sample.args)
		if strings.Contains(st.text, fmt.Sprintf("$%d", len(args)+1)) {
			args = append(args, pq.QuoteLiteral(label))
		}
		s.statements[op] = fmt.Sprintf(`EXECUTE %q(%s)`, op, strings.Join(args, ", "))
		if len(args) == 0 {
			s.statements[op] = fmt.Sprintf(`EXECUTE %q`, op)
		}
		if _, err := s.conn.ExecContext(t.Context(), fmt.Sprintf(`PREPARE %q AS %s`, op, st.text)); err != nil {
			t.Fatalf("%s: %s: %v", s.name, op, err)
		}
	}
	return s
}

// run runs a statement and undoes it.
func (s *session) run(t *testing.T, op string) {
	t.Helper()
	tx, err := s.conn.BeginTx(context.Background(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.Exec(s.statements[op]); err != nil {
		t.Fatalf("%s: %v", s.statements[op], err)
	}
}

// check fails if a statement reads more than what it is about.
func (s *session) check(t *testing.T, name, op string) {
	t.Helper()
	plan, text := explainNode(t, s.conn, s.statements[op])
	blocks, rows := planBlocks+10*samples[op].keys, float64(planRows+2*samples[op].keys)
	if got := plan.Hit + plan.Read; got > blocks || plan.rows() > rows {
		t.Errorf("%s: %s reads %d blocks and %v rows:\n%s", name, op, got, plan.rows(), text)
	}
}
