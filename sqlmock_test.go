package fastpgcache_test

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"reflect"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/DATA-DOG/go-sqlmock"

	"github.com/fastpgcache/fastpgcache"
)

// operation is one call with the one statement it sends. Its text, columns and
// number of arguments are those of its section in docs/unit-testing.md.
type operation struct {
	name    string // the method, and the section
	call    func(context.Context, *fastpgcache.Cache) (any, error)
	args    []driver.Value // without the label of Config.User
	answers []answer       // one or more
	noTx    bool           // refused inside a transaction
	before  string         // the section of what is sent before

	beforeArgs []driver.Value
}

// answer is what the server says to the statement and what the caller gets.
type answer struct {
	rows     [][]driver.Value // for a statement with columns
	affected int64            // for one without
	want     any
}

type (
	hit struct {
		found bool
		value string
	}
	left struct {
		found bool
		ttl   time.Duration
	}
)

var foundOrNot = []answer{{affected: 1, want: true}, {affected: 0, want: false}}

// keysEnd is greater than every key.
var keysEnd = strings.Repeat("\U0010FFFF", 257)

// operations is where a new operation is added, beside docs/unit-testing.md.
var operations = []operation{{
	name: "Set",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		return nil, c.Set(ctx, "k", "text", 1500*time.Millisecond)
	},
	args:    []driver.Value{"k", "text", nil, int64(1500000)},
	answers: []answer{{affected: 1}},
}, {
	name: "Set",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		return nil, c.Set(ctx, "k", []byte{0xff, 0}, fastpgcache.NoExpiry)
	},
	args:    []driver.Value{"k", nil, []byte{0xff, 0}, nil},
	answers: []answer{{affected: 1}},
}, {
	name: "Set",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		return nil, c.Set(ctx, "k", map[string]int{"n": 1}, time.Millisecond+time.Nanosecond)
	},
	args:    []driver.Value{"k", `{"n":1}`, nil, int64(1001)},
	answers: []answer{{affected: 1}},
}, {
	name: "Get",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		var value string
		found, err := c.Get(ctx, "k", &value)
		return hit{found, value}, err
	},
	args: []driver.Value{"k"},
	answers: []answer{
		{rows: [][]driver.Value{{"text", nil}}, want: hit{true, "text"}},
		{rows: [][]driver.Value{{nil, []byte{0xff, 0}}}, want: hit{true, "\xff\x00"}},
		{rows: [][]driver.Value{{"", nil}}, want: hit{true, ""}},
		{want: hit{}},
	},
}, {
	name: "Delete",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		return c.Delete(ctx, "k")
	},
	args: []driver.Value{"k"},
	answers: []answer{
		{rows: [][]driver.Value{{false, true}}, want: true},
		{rows: [][]driver.Value{{false, false}}, want: false},
	},
}, {
	name: "Exists",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		return c.Exists(ctx, "k")
	},
	args: []driver.Value{"k"},
	answers: []answer{
		{rows: [][]driver.Value{{true}}, want: true},
		{rows: [][]driver.Value{{false}}, want: false},
	},
}, {
	name: "TTL",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		ttl, found, err := c.TTL(ctx, "k")
		return left{found, ttl}, err
	},
	args: []driver.Value{"k"},
	answers: []answer{
		{rows: [][]driver.Value{{int64(1500000)}}, want: left{true, 1500 * time.Millisecond}},
		{rows: [][]driver.Value{{nil}}, want: left{true, fastpgcache.NoExpiry}},
		{want: left{}},
	},
}, {
	name: "Expire",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		return c.Expire(ctx, "k", time.Second)
	},
	args:    []driver.Value{"k", int64(1000000)},
	answers: foundOrNot,
}, {
	name: "Expire",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		return c.Expire(ctx, "k", fastpgcache.NoExpiry)
	},
	args:    []driver.Value{"k", nil},
	answers: foundOrNot,
}, {
	name: "Persist",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		return c.Persist(ctx, "k")
	},
	args:    []driver.Value{"k"},
	answers: foundOrNot,
}, {
	name: "SetMany",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		return nil, c.SetMany(ctx, map[string]any{"b": 1, "a": `say "x\y"`}, time.Second)
	},
	args:    []driver.Value{`{"a","b"}`, `{"say \"x\\y\"","1"}`, `{}`, `{1000000,1000000}`},
	answers: []answer{{affected: 2}},
}, {
	name: "SetMany",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		return nil, c.SetMany(ctx, map[string]any{"b": []byte{0xff, 0}, "a": ""}, 0)
	},
	args:    []driver.Value{`{"a","b"}`, `{"",NULL}`, `{NULL,"\\xff00"}`, `{NULL,NULL}`},
	answers: []answer{{affected: 2}},
}, {
	name: "GetMany",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		return c.GetMany(ctx, []string{"b", "a", "b"})
	},
	args: []driver.Value{`{"b","a"}`},
	answers: []answer{
		{rows: [][]driver.Value{{"a", "text", nil}, {"b", nil, []byte{0xff, 0}}}, want: map[string]fastpgcache.Value{"a": fastpgcache.Value("text"), "b": {0xff, 0}}},
		{want: map[string]fastpgcache.Value{}},
	},
}, {
	name: "DeleteMany",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		return c.DeleteMany(ctx, []string{"b", "a", "b"})
	},
	args: []driver.Value{`{"a","b"}`},
	answers: []answer{
		{rows: [][]driver.Value{{"a", true}, {"b", true}}, want: 2},
		{want: 0},
	},
}, {
	name: "Add",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		return c.Add(ctx, "k", "text", time.Second)
	},
	args:    []driver.Value{"k", "text", nil, int64(1000000)},
	answers: foundOrNot,
}, {
	name: "Increment",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		return c.Increment(ctx, "k", -5, time.Second)
	},
	args: []driver.Value{"k", int64(-5), int64(1000000)},
	answers: []answer{
		{rows: [][]driver.Value{{"37"}}, want: int64(37)},
		{rows: [][]driver.Value{{"-9223372036854775808"}}, want: int64(math.MinInt64)},
	},
}, {
	name: "Take",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		value, found, err := c.Take(ctx, "k")
		return hit{found, value.String()}, err
	},
	args: []driver.Value{"k"},
	answers: []answer{
		{rows: [][]driver.Value{{"text", nil}}, want: hit{true, "text"}},
		{rows: [][]driver.Value{{nil, []byte{0xff, 0}}}, want: hit{true, "\xff\x00"}},
		{want: hit{}},
	},
}, {
	name: "Keys",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		var keys []string
		for key, err := range c.Keys(ctx, "k:") {
			if err != nil {
				return keys, err
			}
			keys = append(keys, key)
		}
		return keys, nil
	},
	args: []driver.Value{"k:", "", "k:" + strings.Repeat("\U0010FFFF", 257)},
	answers: []answer{
		{rows: [][]driver.Value{{"k:1"}, {"k:2"}}, want: []string{"k:1", "k:2"}},
		{want: []string(nil)},
	},
}, {
	name: "Clear",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		return c.Clear(ctx)
	},
	args:       []driver.Value{"", "", keysEnd},
	answers:    []answer{{rows: [][]driver.Value{{int64(7), nil, false}}, want: 7}},
	before:     "Clear, leases",
	beforeArgs: []driver.Value{"", keysEnd},
}, {
	name: "DeletePrefix",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		return c.DeletePrefix(ctx, "k:")
	},
	args:       []driver.Value{"k:", "", "k:" + keysEnd},
	answers:    []answer{{rows: [][]driver.Value{{int64(7), nil, false}}, want: 7}},
	before:     "DeletePrefix, leases",
	beforeArgs: []driver.Value{"k:", "k:" + keysEnd},
}, {
	name: "Cleanup",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		return c.Cleanup(ctx)
	},
	args:    []driver.Value{"", nil},
	answers: []answer{{rows: [][]driver.Value{{int64(7), nil}}, want: 7}},
	noTx:    true,
}, {
	name: "Ping",
	call: func(ctx context.Context, c *fastpgcache.Cache) (any, error) {
		return nil, c.Ping(ctx)
	},
	args:    []driver.Value{`"public".cache`},
	answers: []answer{{rows: [][]driver.Value{{true}}}},
}}

// statement is a section of docs/unit-testing.md.
type statement struct {
	text    string
	args    []string
	columns []string // nil where the page says what rows are affected
}

var (
	sectionPattern = regexp.MustCompile("(?s)^## (\\w+(?:, \\w+)?)\n\n```sql\n(.*?)\n```\n\n- Arguments: (.*?)\n- (Columns|Rows affected): (.*)$")
	wordPattern    = regexp.MustCompile("([a-z])([A-Z])")
	namePattern    = regexp.MustCompile("`(\\w+)`")
)

// documented returns the sections of docs/unit-testing.md.
func documented(t *testing.T) map[string]statement {
	t.Helper()
	statements, err := readPage()
	if err != nil {
		t.Fatal(err)
	}
	return statements
}

var readPage = sync.OnceValues(func() (map[string]statement, error) {
	const path = "docs/unit-testing.md"
	page, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	names := func(s string) (names []string) {
		s, _, _ = strings.Cut(s, ";")
		for _, m := range namePattern.FindAllStringSubmatch(s, -1) {
			names = append(names, m[1])
		}
		return names
	}
	statements := map[string]statement{}
	for _, section := range strings.Split(string(page), "\n## ")[1:] {
		if !strings.Contains(section, "```sql") {
			continue
		}
		m := sectionPattern.FindStringSubmatch("## " + section)
		if m == nil {
			return nil, fmt.Errorf("%s: a section is not of the form\n%s\n## %s", path, sectionPattern, section)
		}
		s := statement{text: m[2], args: names(m[3])}
		if m[4] == "Columns" {
			s.columns = names(m[5])
		}
		statements[m[1]] = s
	}
	return statements, nil
})

// TestEveryOperationIsDocumented holds the methods, the table and the page
// together.
func TestEveryOperationIsDocumented(t *testing.T) {
	pinned := map[string]bool{}
	for _, op := range operations {
		pinned[op.name] = true
	}
	for _, name := range []string{"GetOrSet", "GetOrRefresh", "GetOrSetMany"} { // by tests of their own
		pinned[name] = true
	}
	page := documented(t)
	for name := range page {
		name, _, _ := strings.Cut(name, ",")
		if !pinned[name] {
			t.Errorf("docs/unit-testing.md has %s, of which no test knows", name)
		}
	}
	ctx := reflect.TypeFor[context.Context]()
	cache := reflect.TypeFor[*fastpgcache.Cache]()
	for i := range cache.NumMethod() {
		method := cache.Method(i)
		if method.Type.NumIn() < 2 || method.Type.In(1) != ctx {
			continue // no operation
		}
		if !pinned[method.Name] {
			t.Errorf("operations has no %s", method.Name)
		}
		if _, ok := page[method.Name]; !ok && !strings.HasPrefix(method.Name, "GetOr") {
			t.Errorf("docs/unit-testing.md has no %s", method.Name)
		}
	}
}

// mockMode is a way to run an operation.
type mockMode struct {
	name string
	user string
	tx   bool
}

var mockModes = []mockMode{{name: "role"}, {name: "label", user: "alice"}, {name: "tx", tx: true}, {name: "labelTx", user: "bob", tx: true}}

// mocked is a cache over go-sqlmock.
type mocked struct {
	sqlmock.Sqlmock
	*fastpgcache.Cache
	db   *sql.DB
	page map[string]statement
	mode mockMode
}

func newMocked(t *testing.T, mode mockMode) *mocked {
	t.Helper()
	db, mock, err := sqlmock.New(sqlmock.QueryMatcherOption(sqlmock.QueryMatcherEqual))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	c, err := fastpgcache.New(db, fastpgcache.Config{User: mode.user, DisableCoalescing: true, DisablePrepare: true})
	if err != nil {
		t.Fatal(err)
	}
	if mode.tx {
		mock.ExpectBegin()
		tx, err := db.Begin()
		if err != nil {
			t.Fatal(err)
		}
		c = c.WithTx(tx)
	}
	return &mocked{Sqlmock: mock, Cache: c, db: db, page: documented(t), mode: mode}
}

// text is op's statement in m's mode, and its arguments.
func (m *mocked) text(t *testing.T, op operation) (text string, args []driver.Value) {
	t.Helper()
	s := m.page[op.name]
	if len(s.args) != len(op.args) {
		t.Fatalf("%s: docs/unit-testing.md has arguments %v, the table %v", op.name, s.args, op.args)
	}
	return m.labelled(s.text, op.args)
}

// labelled is a statement as it is with the label of m's mode.
func (m *mocked) labelled(text string, args []driver.Value) (string, []driver.Value) {
	if m.mode.user == "" || !strings.Contains(text, "current_user") {
		return text, args
	}
	text = strings.ReplaceAll(text, "current_user", fmt.Sprintf("$%d", len(args)+1))
	return text, append(append([]driver.Value{}, args...), m.mode.user)
}

// expect prepares m for one run of op, which a answers, or fails with err.
func (m *mocked) expect(t *testing.T, op operation, a answer, err error) {
	t.Helper()
	m.expectBefore(op)
	m.expectOnly(t, op, a, err)
}

// expectBefore prepares m for what op sends before its statement, and expectOnly for
// that.
func (m *mocked) expectBefore(op operation) {
	if op.before != "" {
		text, args := m.labelled(m.page[op.before].text, op.beforeArgs)
		m.ExpectExec(text).WithArgs(args...).WillReturnResult(sqlmock.NewResult(0, 1))
	}
}

func (m *mocked) expectOnly(t *testing.T, op operation, a answer, err error) {
	t.Helper()
	text, args := m.text(t, op)
	if columns := m.page[op.name].columns; columns != nil {
		m.ExpectQuery(text).WithArgs(args...).WillReturnRows(rows(columns, a)).WillReturnError(err)
	} else {
		m.ExpectExec(text).WithArgs(args...).WillReturnResult(sqlmock.NewResult(0, a.affected)).WillReturnError(err)
	}
}

func rows(columns []string, a answer) *sqlmock.Rows {
	return sqlmock.NewRows(columns).AddRows(a.rows...)
}

// run calls op and checks that it sent what was expected.
func (m *mocked) run(ctx context.Context, t *testing.T, op operation) (any, error) {
	t.Helper()
	got, err := op.call(ctx, m.Cache)
	if err := m.ExpectationsWereMet(); err != nil {
		t.Error(err)
	}
	return got, err
}

// eachOperation runs f for the operations and modes that go together.
func eachOperation(t *testing.T, f func(t *testing.T, op operation, mode mockMode)) {
	for _, op := range operations {
		for _, mode := range mockModes {
			if mode.tx && op.noTx {
				continue
			}
			t.Run(op.name+"/"+mode.name, func(t *testing.T) { f(t, op, mode) })
		}
	}
}

func TestOperationIsOneDocumentedStatement(t *testing.T) {
	eachOperation(t, func(t *testing.T, op operation, mode mockMode) {
		for _, a := range op.answers {
			m := newMocked(t, mode)
			m.expect(t, op, a, nil)
			got, err := m.run(t.Context(), t, op)
			if err != nil || !reflect.DeepEqual(got, a.want) {
				t.Errorf("rows %v, affected %d: got %v, %v, want %v", a.rows, a.affected, got, err, a.want)
			}
		}
	})
}

func TestOperationUsesTheSchema(t *testing.T) {
	db, mock, err := sqlmock.New(sqlmock.QueryMatcherOption(sqlmock.QueryMatcherEqual))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	c, err := fastpgcache.New(db, fastpgcache.Config{Schema: `a"b; DROP`, DisableCoalescing: true, DisablePrepare: true})
	if err != nil {
		t.Fatal(err)
	}
	page := documented(t)
	for _, op := range operations {
		s := page[op.name]
		quoted := func(text string) string { return strings.ReplaceAll(text, `"public"`, `"a""b; DROP"`) }
		if op.before != "" {
			mock.ExpectExec(quoted(page[op.before].text)).WillReturnResult(sqlmock.NewResult(0, 1))
		}
		text := quoted(s.text)
		if s.columns != nil {
			mock.ExpectQuery(text).WillReturnRows(rows(s.columns, op.answers[0]))
		} else {
			mock.ExpectExec(text).WillReturnResult(sqlmock.NewResult(0, 1))
		}
		if _, err := op.call(t.Context(), c); err != nil {
			t.Errorf("%s: %v", op.name, err)
		}
	}
}

// TestCleanupGoesOnUntilTheEnd pins what follows Cleanup's first statement.
func TestCleanupGoesOnUntilTheEnd(t *testing.T) {
	m := newMocked(t, mockMode{})
	s := m.page["Cleanup"]
	boom := errors.New("boom")
	bite := func(position string) *sqlmock.ExpectedQuery {
		return m.ExpectQuery(s.text).WithArgs(position, nil)
	}

	bite("").WillReturnRows(sqlmock.NewRows(s.columns).AddRow(3, "b256"))
	bite("b256").WillReturnRows(sqlmock.NewRows(s.columns).AddRow(0, "b512"))
	bite("b512").WillReturnRows(sqlmock.NewRows(s.columns).AddRow(4, nil))
	if n, err := m.Cleanup(t.Context()); n != 7 || err != nil {
		t.Errorf("got %d, %v, want 7", n, err)
	}
	bite("").WillReturnRows(sqlmock.NewRows(s.columns).AddRow(3, "b256"))
	bite("b256").WillReturnError(boom)
	if n, err := m.Cleanup(t.Context()); n != 3 || !errors.Is(err, boom) {
		t.Errorf("got %d, %v, want 3 and the error", n, err)
	}
	if err := m.ExpectationsWereMet(); err != nil {
		t.Error(err)
	}
	m.ExpectBegin()
	tx, err := m.db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.WithTx(tx).Cleanup(t.Context()); err == nil || !strings.HasPrefix(err.Error(), "fastpgcache: cleanup: ") {
		t.Errorf("in a transaction: got %v, want an error", err)
	}
}

// TestIncrementOfNoNumber is no error of the server.
func TestIncrementOfNoNumber(t *testing.T) {
	m := newMocked(t, mockMode{})
	s := m.page["Increment"]
	m.ExpectQuery(s.text).WithArgs("k", int64(1), nil).WillReturnRows(sqlmock.NewRows(s.columns))
	if n, err := m.Increment(t.Context(), "k", 1, 0); n != 0 || !errors.Is(err, fastpgcache.ErrNotInteger) {
		t.Errorf("got %d, %v, want %v", n, err, fastpgcache.ErrNotInteger)
	}
}

// TestPagesFollow pins what comes after the first page of Keys and of Clear.
func TestPagesFollow(t *testing.T) {
	m := newMocked(t, mockMode{})
	keys := m.page["Keys"]
	page, end := sqlmock.NewRows(keys.columns), strings.Repeat("\U0010FFFF", 257)
	for i := range 5000 {
		page.AddRow(fmt.Sprintf("%04d", i))
	}
	m.ExpectQuery(keys.text).WithArgs("", "", end).WillReturnRows(page)
	m.ExpectQuery(keys.text).WithArgs("", "4999", end).WillReturnRows(sqlmock.NewRows(keys.columns).AddRow("5000"))
	var n int
	for _, err := range m.Keys(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
	if n != 5001 {
		t.Errorf("got %d keys, want 5001", n)
	}
	clear := m.page["Clear"]
	m.ExpectExec(m.page["Clear, leases"].text).WillReturnResult(sqlmock.NewResult(0, 0))
	m.ExpectQuery(clear.text).WithArgs("", "", end).WillReturnRows(sqlmock.NewRows(clear.columns).AddRow(900, "0999", true))
	m.ExpectQuery(clear.text).WithArgs("", "", end).WillReturnRows(sqlmock.NewRows(clear.columns).AddRow(100, "0999", false))
	m.ExpectQuery(clear.text).WithArgs("", "0999", end).WillReturnRows(sqlmock.NewRows(clear.columns).AddRow(1, "1000", false))
	m.ExpectQuery(clear.text).WithArgs("", "1000", end).WillReturnRows(sqlmock.NewRows(clear.columns).AddRow(0, nil, false))
	if n, err := m.Clear(t.Context()); n != 1001 || err != nil {
		t.Errorf("got %d, %v, want 1001", n, err)
	}
	if err := m.ExpectationsWereMet(); err != nil {
		t.Error(err)
	}
}

// loading is a way through GetOrSet or its kin.
type loading struct {
	name   string
	expect func(m *mocked, do func(section string, a answer, args ...driver.Value))
	err    error // of the loader
	want   string
	is     error // what the caller's error matches
}

// run expects l, and checks what call then returns.
func (l loading) run(t *testing.T, mode mockMode, call func(m *mocked) (string, error)) {
	t.Run(mode.name+"/"+l.name, func(t *testing.T) {
		m := newMocked(t, mode)
		l.expect(m, func(section string, a answer, args ...driver.Value) {
			text, args := m.labelled(m.page[section].text, args)
			if columns := m.page[section].columns; columns != nil {
				m.ExpectQuery(text).WithArgs(args...).WillReturnRows(rows(columns, a))
			} else {
				m.ExpectExec(text).WithArgs(args...).WillReturnResult(sqlmock.NewResult(0, a.affected))
			}
		})
		got, err := call(m)
		if !errors.Is(err, l.is) {
			t.Errorf("got %v, want %v", err, l.is)
		}
		if got != l.want {
			t.Errorf("got %q, want %q", got, l.want)
		}
		m.Close() // waits for what goes on in the background
		if err := m.ExpectationsWereMet(); err != nil {
			t.Error(err)
		}
	})
}

// looked is an entry as a look gives it, of the server's clock at 1000 s.
func looked(value string, expires float64, version string, absent bool) answer {
	return answer{rows: [][]driver.Value{{"k", value, nil, 1000.0, expires, version, absent}}}
}

var (
	never    = math.Inf(1)
	leased   = answer{rows: [][]driver.Value{{"k"}}}
	wrote    = answer{rows: [][]driver.Value{{"k", true, int64(1), 1000.0}}}
	wroteNot = answer{rows: [][]driver.Value{{"k", false, int64(1), 1000.0}}}
)

const leaseTTL = int64(10_000_000)

// TestGetOrSetSendsTheDocumentedStatements covers all but renew, which the clock
// sends; that is compared below.
func TestGetOrSetSendsTheDocumentedStatements(t *testing.T) {
	errLoad := errors.New("load failed")
	set := []driver.Value{`{"k"}`, `{"loaded"}`, `{}`, `{1000000}`}
	for _, mode := range mockModes {
		begin := func(do func(string, answer, ...driver.Value)) {
			do("Get", answer{}, "k")
			do("GetOrSet, lease", leased, `{"k"}`, sqlmock.AnyArg(), leaseTTL)
		}
		steps := []loading{{
			name: "hit",
			expect: func(m *mocked, do func(string, answer, ...driver.Value)) {
				do("Get", answer{rows: [][]driver.Value{{"cached", nil}}}, "k")
			},
			want: "cached",
		}, {
			name: "miss",
			expect: func(m *mocked, do func(string, answer, ...driver.Value)) {
				begin(do)
				do("GetOrSet, look", answer{}, `{"k"}`)
				do("GetOrSet, store", wrote, append([]driver.Value{`{"k"}`, sqlmock.AnyArg()}, append(set, `{}`)...)...)
			},
			want: "loaded",
		}, {
			name: "another process was first",
			expect: func(m *mocked, do func(string, answer, ...driver.Value)) {
				do("Get", answer{}, "k")
				do("GetOrSet, lease", answer{}, `{"k"}`, sqlmock.AnyArg(), leaseTTL)
				do("GetOrSet, look", answer{}, `{"k"}`)
				do("GetOrSet, lease", leased, `{"k"}`, sqlmock.AnyArg(), leaseTTL)
				do("GetOrSet, look", looked("of another", never, "700", false), `{"k"}`)
				do("GetOrSet, release", answer{affected: 1}, `{"k"}`, sqlmock.AnyArg())
			},
			want: "of another",
		}, {
			name: "expired entry",
			expect: func(m *mocked, do func(string, answer, ...driver.Value)) {
				begin(do)
				do("GetOrSet, look", looked("old", 999, "700", false), `{"k"}`)
				do("GetOrSet, store", wroteNot, append([]driver.Value{`{"k"}`, sqlmock.AnyArg()}, append(set, `{"700"}`)...)...)
				do("GetOrSet, look", looked("of another", 1001, "701", false), `{"k"}`)
			},
			want: "of another",
		}, {
			name: "failed loader",
			expect: func(m *mocked, do func(string, answer, ...driver.Value)) {
				begin(do)
				do("GetOrSet, look", answer{}, `{"k"}`)
				do("GetOrSet, release", answer{affected: 1}, `{"k"}`, sqlmock.AnyArg())
			},
			err: errLoad,
			is:  errLoad,
		}, {
			name: "absence",
			expect: func(m *mocked, do func(string, answer, ...driver.Value)) {
				begin(do)
				do("GetOrSet, look", answer{}, `{"k"}`)
				do("GetOrSet, store", wrote, `{"k"}`, sqlmock.AnyArg(), `{"k"}`, `{""}`, `{}`, `{-60000000}`, `{}`)
			},
			err: fastpgcache.NotFoundFor(time.Minute),
			is:  fastpgcache.ErrNotFound,
		}, {
			name: "absence that is remembered",
			expect: func(m *mocked, do func(string, answer, ...driver.Value)) {
				do("Get", answer{}, "k")
				do("GetOrSet, lease", answer{}, `{"k"}`, sqlmock.AnyArg(), leaseTTL)
				do("GetOrSet, look", looked("1060.5", math.Inf(-1), "700", true), `{"k"}`)
			},
			is: fastpgcache.ErrNotFound,
		}}
		if mode.tx {
			steps = []loading{{
				name: "hit",
				expect: func(m *mocked, do func(string, answer, ...driver.Value)) {
					do("GetOrSet, look", looked("cached", never, "700", false), `{"k"}`)
				},
				want: "cached",
			}, {
				name: "miss",
				expect: func(m *mocked, do func(string, answer, ...driver.Value)) {
					do("GetOrSet, look", answer{}, `{"k"}`)
					do("SetMany", answer{rows: [][]driver.Value{{int64(1), 1000.0}}, affected: 1}, set...)
				},
				want: "loaded",
			}, {
				name: "failed loader",
				expect: func(m *mocked, do func(string, answer, ...driver.Value)) {
					do("GetOrSet, look", looked("old", 999, "700", false), `{"k"}`)
				},
				err: errLoad,
				is:  errLoad,
			}, {
				name: "absence",
				expect: func(m *mocked, do func(string, answer, ...driver.Value)) {
					do("GetOrSet, look", answer{}, `{"k"}`)
					do("GetOrSet, remember", answer{affected: 1}, `{"k"}`, `{60000000}`)
				},
				err: fastpgcache.NotFoundFor(time.Minute),
				is:  fastpgcache.ErrNotFound,
			}, {
				name: "absence that is remembered",
				expect: func(m *mocked, do func(string, answer, ...driver.Value)) {
					do("GetOrSet, look", looked("1060.5", math.Inf(-1), "700", true), `{"k"}`)
				},
				is: fastpgcache.ErrNotFound,
			}}
		}
		for _, step := range steps {
			step.run(t, mode, func(m *mocked) (got string, err error) {
				err = m.GetOrSet(t.Context(), "k", &got, time.Second, func(context.Context) (any, error) { return "loaded", step.err })
				return got, err
			})
		}
	}
}

func TestGetOrRefreshSendsTheDocumentedStatements(t *testing.T) {
	for _, mode := range mockModes[:2] {
		aged := func(left float64) answer { return answer{rows: [][]driver.Value{{"old", nil, 1000.0, 1000 + left}}} }
		for _, step := range []loading{{
			name: "fresh",
			expect: func(m *mocked, do func(string, answer, ...driver.Value)) {
				do("GetOrRefresh, get", aged(31), "k")
			},
			want: "old",
		}, {
			name: "without a TTL",
			expect: func(m *mocked, do func(string, answer, ...driver.Value)) {
				do("GetOrRefresh, get", aged(never), "k")
			},
			want: "old",
		}, {
			name: "stale, and another process is at it",
			expect: func(m *mocked, do func(string, answer, ...driver.Value)) {
				do("GetOrRefresh, get", aged(29), "k")
				do("GetOrSet, lease", answer{}, `{"k"}`, sqlmock.AnyArg(), leaseTTL)
			},
			want: "old",
		}} {
			step.run(t, mode, func(m *mocked) (got string, err error) {
				err = m.GetOrRefresh(t.Context(), "k", &got, 30*time.Second, time.Minute, func(context.Context) (any, error) { return "loaded", nil })
				time.Sleep(20 * time.Millisecond) // for what goes on in the background
				return got, err
			})
		}
		loading{
			name: "stale",
			expect: func(m *mocked, do func(string, answer, ...driver.Value)) {
				do("GetOrRefresh, get", aged(29), "k")
				do("GetOrSet, lease", leased, `{"k"}`, sqlmock.AnyArg(), leaseTTL)
				do("GetOrSet, look", looked("old", 1029, "700", false), `{"k"}`)
				do("GetOrSet, store", wrote, `{"k"}`, sqlmock.AnyArg(), `{"k"}`, `{"loaded"}`, `{}`, `{60000000}`, `{"700"}`)
			},
			want: "old",
		}.run(t, mode, func(m *mocked) (got string, err error) {
			err = m.GetOrRefresh(t.Context(), "k", &got, 30*time.Second, time.Minute, func(context.Context) (any, error) { return "loaded", nil })
			for deadline := time.Now().Add(5 * time.Second); m.ExpectationsWereMet() != nil && time.Now().Before(deadline); {
				time.Sleep(time.Millisecond)
			}
			return got, err
		})
	}
}

func TestGetOrSetManySendsTheDocumentedStatements(t *testing.T) {
	ask := func(t *testing.T, m *mocked) (string, error) {
		got, err := m.GetOrSetMany(t.Context(), []string{"k", "there", "k", "a"}, time.Second, func(_ context.Context, missing []string) (map[string]any, error) {
			return map[string]any{"k": "loaded"}, fastpgcache.NotFoundFor(time.Minute)
		})
		return fmt.Sprint(got), err
	}
	for _, mode := range mockModes {
		step := loading{
			name: "some",
			expect: func(m *mocked, do func(string, answer, ...driver.Value)) {
				do("GetMany", answer{rows: [][]driver.Value{{"there", "cached", nil}}}, `{"k","there","a"}`)
				do("GetOrSet, lease", answer{rows: [][]driver.Value{{"a"}, {"k"}}}, `{"a","k"}`, sqlmock.AnyArg(), leaseTTL)
				do("GetOrSet, look", answer{}, `{"k","a"}`)
				do("GetOrSet, store", answer{rows: [][]driver.Value{{"a", true, int64(1), 1000.0}, {"k", true, int64(1), 1000.0}}},
					`{"a","k"}`, sqlmock.AnyArg(), `{"a","k"}`, `{"","loaded"}`, `{}`, `{-60000000,1000000}`, `{}`)
			},
			want: "map[k:loaded there:cached]",
		}
		if mode.tx {
			step.expect = func(m *mocked, do func(string, answer, ...driver.Value)) {
				do("GetOrSet, look", answer{rows: [][]driver.Value{{"there", "cached", nil, 1000.0, never, "700", false}}}, `{"k","there","a"}`)
				do("SetMany", answer{rows: [][]driver.Value{{int64(1), 1000.0}}, affected: 1}, `{"k"}`, `{"loaded"}`, `{}`, `{1000000}`)
				do("GetOrSet, remember", answer{affected: 1}, `{"a"}`, `{60000000}`)
			}
		}
		step.run(t, mode, func(m *mocked) (string, error) { return ask(t, m) })
	}
}

// TestBatchFollowsUp pins the statements that a batch sends after its own.
func TestBatchFollowsUp(t *testing.T) {
	m := newMocked(t, mockMode{})
	get, getMany := m.page["Get"], m.page["GetMany"]
	m.ExpectQuery(getMany.text).WithArgs(`{"a","large"}`).
		WillReturnRows(sqlmock.NewRows(getMany.columns).AddRow("a", "text", nil).AddRow("large", nil, nil))
	m.ExpectQuery(get.text).WithArgs("large").WillReturnRows(sqlmock.NewRows(get.columns).AddRow("value", nil))
	got, err := m.GetMany(t.Context(), []string{"a", "large"})
	if want := map[string]fastpgcache.Value{"a": fastpgcache.Value("text"), "large": fastpgcache.Value("value")}; err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("GetMany: got %v, %v, want %v", got, err, want)
	}
	deleteMany := m.page["DeleteMany"]
	m.ExpectQuery(deleteMany.text).WithArgs(`{"a","b","loaded"}`).
		WillReturnRows(sqlmock.NewRows(deleteMany.columns).AddRow("a", true).AddRow("b", false).AddRow("loaded", nil))
	lock := m.page["DeleteMany, lock"]
	m.ExpectBegin()
	m.ExpectQuery(lock.text).WithArgs(`{"loaded"}`).WillReturnRows(sqlmock.NewRows(lock.columns).AddRow("loaded"))
	m.ExpectQuery(deleteMany.text).WithArgs(`{"loaded"}`).
		WillReturnRows(sqlmock.NewRows(deleteMany.columns).AddRow("loaded", true))
	m.ExpectCommit()
	if n, err := m.DeleteMany(t.Context(), []string{"loaded", "b", "a"}); n != 2 || err != nil {
		t.Errorf("DeleteMany: got %d, %v, want 2", n, err)
	}
	if err := m.ExpectationsWereMet(); err != nil {
		t.Error(err)
	}
}

// TestLargeBatchIsSeveralStatements of 1,000 keys, in one transaction where they
// write.
func TestLargeBatchIsSeveralStatements(t *testing.T) {
	m := newMocked(t, mockMode{})
	items, keys := map[string]any{}, make([]string, 1001)
	for i := range keys {
		keys[i] = fmt.Sprintf("%04d", i)
		items[keys[i]] = "v"
	}
	set, boom := m.page["SetMany"], &serverError{"XX000"}
	last := []driver.Value{`{"1000"}`, `{"v"}`, `{}`, `{NULL}`}
	m.ExpectBegin()
	m.ExpectExec(set.text).WillReturnResult(sqlmock.NewResult(0, 1000))
	m.ExpectExec(set.text).WithArgs(last...).WillReturnResult(sqlmock.NewResult(0, 1))
	m.ExpectCommit()
	if err := m.SetMany(t.Context(), items, 0); err != nil {
		t.Error(err)
	}
	// None or all: the whole transaction is retried, or rolled back.
	m.ExpectBegin()
	m.ExpectExec(set.text).WillReturnResult(sqlmock.NewResult(0, 1000))
	m.ExpectExec(set.text).WithArgs(last...).WillReturnError(&serverError{"40P01"})
	m.ExpectRollback()
	m.ExpectBegin()
	m.ExpectExec(set.text).WillReturnResult(sqlmock.NewResult(0, 1000))
	m.ExpectExec(set.text).WithArgs(last...).WillReturnError(boom)
	m.ExpectRollback()
	if err := m.SetMany(t.Context(), items, 0); !errors.Is(err, boom) {
		t.Errorf("SetMany: got %v, want %v", err, boom)
	}
	for _, name := range []string{"GetMany", "DeleteMany"} {
		s := m.page[name]
		m.ExpectQuery(s.text).WillReturnRows(sqlmock.NewRows(s.columns))
		m.ExpectQuery(s.text).WithArgs(`{"1000"}`).WillReturnRows(sqlmock.NewRows(s.columns))
	}
	if _, err := m.GetMany(t.Context(), keys); err != nil {
		t.Error(err)
	}
	if _, err := m.DeleteMany(t.Context(), keys); err != nil {
		t.Error(err)
	}
	if err := m.ExpectationsWereMet(); err != nil {
		t.Error(err)
	}
}

// serverError is what a driver reports from the server.
type serverError struct{ state string }

func (e *serverError) Error() string {
	switch e.state {
	case "08P01":
		return "bind message supplies 1 parameters, but prepared statement \"\" requires 2"
	case "0A000":
		return "cannot access temporary or unlogged relations during recovery"
	}
	return "server says " + e.state
}
func (e *serverError) SQLState() string { return e.state }

// checkFault checks what an operation returned that failed for cause.
func checkFault(t *testing.T, op operation, got any, err, cause error) {
	t.Helper()
	if !errors.Is(err, cause) {
		t.Fatalf("got %v, want an error that wraps %v", err, cause)
	}
	words := strings.ToLower(wordPattern.ReplaceAllString(op.name, "$1 $2"))
	prefix := "fastpgcache: " + words + ": "
	if !strings.HasPrefix(err.Error(), prefix) || strings.Count(err.Error(), "fastpgcache: ") != 1 {
		t.Errorf("got %q, want the prefix %q once", err, prefix)
	}
	if want := zero(op.answers[0].want); !reflect.DeepEqual(got, want) {
		t.Errorf("with the error: got %v, want %v", got, want)
	}
}

func zero(v any) any {
	if v == nil {
		return nil
	}
	return reflect.Zero(reflect.TypeOf(v)).Interface()
}

var sentinels = []error{
	fastpgcache.ErrClosed, fastpgcache.ErrInvalidKey, fastpgcache.ErrInvalidTTL, fastpgcache.ErrInvalidConfig, fastpgcache.ErrValueTooLarge,
	fastpgcache.ErrNotSetUp, fastpgcache.ErrNotPermitted, fastpgcache.ErrNotInteger, fastpgcache.ErrForeignTable,
}

func TestErrorsMatchTheirSentinelAndSayWhatToDo(t *testing.T) {
	t.Parallel()
	setUp := "run fastpgcache-admin --schema public, or call fastpgcache.Setup"
	pooler := "set Config.DisablePrepare"
	for _, fault := range []struct {
		cause error
		is    error // the only sentinel it matches
		says  string
	}{
		{cause: errors.New("boom")},
		{cause: &serverError{"XX000"}},
		{cause: &serverError{"42P01"}, is: fastpgcache.ErrNotSetUp, says: setUp},
		{cause: &serverError{"42703"}, is: fastpgcache.ErrNotSetUp, says: setUp},
		{cause: &serverError{"42883"}, is: fastpgcache.ErrNotSetUp, says: setUp},
		{cause: &serverError{"3F000"}, is: fastpgcache.ErrNotSetUp, says: setUp},
		{cause: fmt.Errorf("wrapped: %w", &serverError{"42P01"}), is: fastpgcache.ErrNotSetUp, says: setUp},
		{cause: &serverError{"42501"}, is: fastpgcache.ErrNotPermitted},
		{cause: &serverError{"26000"}, says: pooler},
		{cause: &serverError{"42P05"}, says: pooler},
		{cause: &serverError{"08P01"}, says: pooler},
		{cause: &serverError{"0A000"}, says: "connect to the primary"},
		{cause: &serverError{"25006"}, says: "the cache needs the primary and a transaction that may write"},
	} {
		t.Run(fault.cause.Error(), func(t *testing.T) {
			eachOperation(t, func(t *testing.T, op operation, mode mockMode) {
				m := newMocked(t, mode)
				m.expect(t, op, op.answers[0], fault.cause)
				got, err := m.run(t.Context(), t, op)
				checkFault(t, op, got, err, fault.cause)
				for _, sentinel := range sentinels {
					if errors.Is(err, sentinel) != (sentinel == fault.is) {
						t.Errorf("%v: errors.Is(err, %q) is %t", err, sentinel, errors.Is(err, sentinel))
					}
				}
				if !strings.Contains(fmt.Sprint(err), fault.says) {
					t.Errorf("got %v, want it to say %q", err, fault.says)
				}
			})
		})
	}
}

// TestFaultAfterTheStatement breaks the answer, not the statement.
func TestFaultAfterTheStatement(t *testing.T) {
	boom := errors.New("boom")
	eachOperation(t, func(t *testing.T, op operation, mode mockMode) {
		m := newMocked(t, mode)
		text, args := m.text(t, op)
		columns := m.page[op.name].columns
		m.expectBefore(op)
		if columns == nil {
			m.ExpectExec(text).WithArgs(args...).WillReturnResult(sqlmock.NewErrorResult(boom))
			got, err := m.run(t.Context(), t, op)
			checkFault(t, op, got, err, boom)
			return
		}
		a := op.answers[0]
		m.ExpectQuery(text).WithArgs(args...).WillReturnRows(rows(columns, a).RowError(0, boom))
		got, err := m.run(t.Context(), t, op)
		checkFault(t, op, got, err, boom)

		// A row, then the fault.
		m.expectBefore(op)
		a.rows = append(append([][]driver.Value{}, a.rows...), a.rows[0])
		m.ExpectQuery(text).WithArgs(args...).WillReturnRows(rows(columns, a).RowError(len(a.rows)-1, boom))
		_, err = m.run(t.Context(), t, op)
		if !errors.Is(err, boom) {
			t.Errorf("after a row: got %v, want %v", err, boom)
		}

		// Columns that nothing asked for.
		m.expectBefore(op)
		m.ExpectQuery(text).WithArgs(args...).WillReturnRows(sqlmock.NewRows(make([]string, 9)).AddRow(1, 2, 3, 4, 5, 6, 7, 8, 9))
		if _, err = m.run(t.Context(), t, op); err == nil {
			t.Error("other columns: got no error")
		}
	})
}

// TestLostToConcurrentStatements covers deadlocks and serialization failures: up
// to five attempts, and one where the transaction is the caller's.
func TestLostToConcurrentStatements(t *testing.T) {
	t.Parallel()
	for _, state := range []string{"40001", "40P01"} {
		cause := &serverError{state}
		t.Run(state, func(t *testing.T) {
			eachOperation(t, func(t *testing.T, op operation, mode mockMode) {
				attempts := 5
				if mode.tx {
					attempts = 1
				}
				m := newMocked(t, mode)
				m.expectBefore(op)
				for range attempts {
					m.expectOnly(t, op, op.answers[0], cause)
				}
				got, err := m.run(t.Context(), t, op)
				checkFault(t, op, got, err, cause)
				if mode.tx {
					return
				}
				m.expectBefore(op)
				m.expectOnly(t, op, op.answers[0], cause)
				m.expectOnly(t, op, op.answers[0], cause)
				m.expectOnly(t, op, op.answers[0], nil)
				if got, err := m.run(t.Context(), t, op); err != nil || !reflect.DeepEqual(got, op.answers[0].want) {
					t.Errorf("third attempt: got %v, %v, want %v", got, err, op.answers[0].want)
				}
			})
		})
	}
}

// TestBadConnectionIsReplaced relies on database/sql, which tries three times.
func TestBadConnectionIsReplaced(t *testing.T) {
	eachOperation(t, func(t *testing.T, op operation, mode mockMode) {
		if mode.tx {
			return
		}
		m := newMocked(t, mode)
		// The mock is gone when its last connection is closed.
		conn, err := m.db.Conn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		m.expectBefore(op)
		m.expectOnly(t, op, op.answers[0], driver.ErrBadConn)
		m.expectOnly(t, op, op.answers[0], nil)
		if got, err := m.run(t.Context(), t, op); err != nil || !reflect.DeepEqual(got, op.answers[0].want) {
			t.Errorf("one bad connection: got %v, %v, want %v", got, err, op.answers[0].want)
		}
		m.expectBefore(op)
		for range 3 {
			m.expectOnly(t, op, op.answers[0], driver.ErrBadConn)
		}
		got, err := m.run(t.Context(), t, op)
		checkFault(t, op, got, err, driver.ErrBadConn)
	})
}

// canceller is an argument that ends the caller's context when the statement is
// sent.
type canceller struct{ cancel context.CancelFunc }

func (c canceller) Match(driver.Value) bool {
	c.cancel()
	return true
}

func TestContextThatEndedIsTheError(t *testing.T) {
	eachOperation(t, func(t *testing.T, op operation, mode mockMode) {
		m := newMocked(t, mode)
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		got, err := m.run(ended, t, op)
		checkFault(t, op, got, err, context.Canceled)

		// In flight. The mock then has an error of its own, as drivers have. Only in a
		// transaction does the call wait for it, and then it stands in the chain, too.
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		text, args := m.text(t, op)
		args = append([]driver.Value{canceller{cancel}}, args[1:]...)
		m.expectBefore(op)
		if columns := m.page[op.name].columns; columns != nil {
			m.ExpectQuery(text).WithArgs(args...).WillDelayFor(time.Hour).WillReturnRows(rows(columns, op.answers[0]))
		} else {
			m.ExpectExec(text).WithArgs(args...).WillDelayFor(time.Hour).WillReturnResult(sqlmock.NewResult(0, 1))
		}
		got, err = m.run(ctx, t, op)
		checkFault(t, op, got, err, context.Canceled)
		if mode.tx && !errors.Is(err, sqlmock.ErrCancelled) {
			t.Errorf("got %v, want it to wrap the driver's error, too", err)
		}
	})
}

// TestRetryEndsWithTheContext ends the context after the first of five attempts.
func TestRetryEndsWithTheContext(t *testing.T) {
	m := newMocked(t, mockMode{})
	ctx, cancel := context.WithCancel(t.Context())
	m.ExpectQuery(m.page["Get"].text).WithArgs(canceller{cancel}).WillReturnError(&serverError{"40001"})
	_, err := m.Get(ctx, "k", nil)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	if err := m.ExpectationsWereMet(); err != nil {
		t.Error(err)
	}
}

func TestClosedCacheSendsNothing(t *testing.T) {
	eachOperation(t, func(t *testing.T, op operation, mode mockMode) {
		if mode.tx {
			return
		}
		m := newMocked(t, mode)
		for range 2 {
			if err := m.Close(); err != nil {
				t.Fatal(err)
			}
		}
		got, err := m.run(t.Context(), t, op)
		checkFault(t, op, got, err, fastpgcache.ErrClosed)
	})
}

func TestBadArgumentsSendNothing(t *testing.T) {
	ctx := t.Context()
	for _, mode := range mockModes {
		m := newMocked(t, mode)
		for _, key := range []string{"", "a\x00b", "\xff", strings.Repeat("k", 1025)} {
			for name, err := range map[string]error{
				"set":         m.Set(ctx, key, "v", 0),
				"get":         second(m.Get(ctx, key, nil)),
				"delete":      second(m.Delete(ctx, key)),
				"exists":      second(m.Exists(ctx, key)),
				"expire":      second(m.Expire(ctx, key, time.Second)),
				"persist":     second(m.Persist(ctx, key)),
				"set many":    m.SetMany(ctx, map[string]any{"good": 1, key: 1}, 0),
				"get many":    second(m.GetMany(ctx, []string{"good", key})),
				"delete many": second(m.DeleteMany(ctx, []string{"good", key})),
			} {
				if !errors.Is(err, fastpgcache.ErrInvalidKey) || !strings.HasPrefix(err.Error(), "fastpgcache: "+name+": ") {
					t.Errorf("%s %.10q: got %v, want %v", name, key, err, fastpgcache.ErrInvalidKey)
				}
			}
			if _, _, err := m.TTL(ctx, key); !errors.Is(err, fastpgcache.ErrInvalidKey) {
				t.Errorf("ttl %.10q: got %v, want %v", key, err, fastpgcache.ErrInvalidKey)
			}
		}
		for _, ttl := range []time.Duration{-2, -time.Second, -1 << 63} {
			if err := m.Set(ctx, "k", "v", ttl); !errors.Is(err, fastpgcache.ErrInvalidTTL) {
				t.Errorf("set for %v: got %v, want %v", ttl, err, fastpgcache.ErrInvalidTTL)
			}
			if _, err := m.Expire(ctx, "k", ttl); !errors.Is(err, fastpgcache.ErrInvalidTTL) {
				t.Errorf("expire %v: got %v, want %v", ttl, err, fastpgcache.ErrInvalidTTL)
			}
		}
		if _, err := m.Expire(ctx, "k", 0); !errors.Is(err, fastpgcache.ErrInvalidTTL) {
			t.Errorf("expire 0: got %v, want %v", err, fastpgcache.ErrInvalidTTL)
		}
		if err := m.Set(ctx, "k", make(chan int), 0); !errors.As(err, new(*json.UnsupportedTypeError)) {
			t.Errorf("set of a channel: got %v, want json's error", err)
		}
		for _, dest := range []any{"text", (*string)(nil), (*[]byte)(nil), (*struct{})(nil), 1} {
			if _, err := m.Get(ctx, "k", dest); err == nil {
				t.Errorf("get into %T: got no error", dest)
			}
		}
	}
}

func second[T any](_ T, err error) error { return err }

// TestStatementIsPreparedOnce and closed with the cache.
func TestStatementIsPreparedOnce(t *testing.T) {
	db, mock, err := sqlmock.New(sqlmock.QueryMatcherOption(sqlmock.QueryMatcherEqual))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	c, err := fastpgcache.New(db, fastpgcache.Config{DisableCoalescing: true})
	if err != nil {
		t.Fatal(err)
	}
	page := documented(t)
	prepared := map[string]bool{}
	for _, op := range operations {
		s := page[op.name]
		prepare := func(text string) {
			if !prepared[text] {
				mock.ExpectPrepare(text).WillBeClosed()
			}
			prepared[text] = true
		}
		for range 2 {
			if op.before != "" {
				prepare(page[op.before].text)
				mock.ExpectExec(page[op.before].text).WillReturnResult(sqlmock.NewResult(0, 1))
			}
			prepare(s.text)
			if s.columns != nil {
				mock.ExpectQuery(s.text).WithArgs(op.args...).WillReturnRows(rows(s.columns, op.answers[0]))
			} else {
				mock.ExpectExec(s.text).WithArgs(op.args...).WillReturnResult(sqlmock.NewResult(0, op.answers[0].affected))
			}
			if got, err := op.call(t.Context(), c); err != nil || !reflect.DeepEqual(got, op.answers[0].want) {
				t.Errorf("%s: got %v, %v, want %v", op.name, got, err, op.answers[0].want)
			}
		}
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := mock.ExpectationsWereMet(); err != nil {
		t.Error(err)
	}
}

// TestFailedPrepareIsTriedAgain keeps one failure from staying.
func TestFailedPrepareIsTriedAgain(t *testing.T) {
	db, mock, err := sqlmock.New(sqlmock.QueryMatcherOption(sqlmock.QueryMatcherEqual))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	c, err := fastpgcache.New(db, fastpgcache.Config{DisableCoalescing: true})
	if err != nil {
		t.Fatal(err)
	}
	text := documented(t)["Get"].text
	mock.ExpectPrepare(text).WillReturnError(&serverError{"42P01"})
	if _, err := c.Get(t.Context(), "k", nil); !errors.Is(err, fastpgcache.ErrNotSetUp) {
		t.Errorf("got %v, want %v", err, fastpgcache.ErrNotSetUp)
	}
	mock.ExpectPrepare(text)
	mock.ExpectQuery(text).WithArgs("k").WillReturnRows(sqlmock.NewRows([]string{"value", "value_bytes"}).AddRow("v", nil))
	if found, err := c.Get(t.Context(), "k", nil); !found || err != nil {
		t.Errorf("got %t, %v, want a hit", found, err)
	}
	if err := mock.ExpectationsWereMet(); err != nil {
		t.Error(err)
	}
}

// A server can undo a statement after its rows have come, at its commit.
func TestRowsOfAFailedAttemptCountForNothing(t *testing.T) {
	for _, op := range operations {
		switch op.name {
		case "Get", "TTL", "GetMany", "DeleteMany", "Delete", "Take", "Keys":
		default:
			continue
		}
		t.Run(op.name, func(t *testing.T) {
			m := newMocked(t, mockMode{name: "role"})
			text, args := m.text(t, op)
			columns := m.page[op.name].columns
			undone := rows(columns, op.answers[0]).AddRow(make([]driver.Value, len(columns))...)
			undone.RowError(len(op.answers[0].rows), &serverError{"40001"})
			nothing := op.answers[len(op.answers)-1]
			m.ExpectQuery(text).WithArgs(args...).WillReturnRows(undone)
			m.ExpectQuery(text).WithArgs(args...).WillReturnRows(rows(columns, nothing))
			if got, err := m.run(t.Context(), t, op); err != nil || !reflect.DeepEqual(got, nothing.want) {
				t.Errorf("got %v, %v, want %v", got, err, nothing.want)
			}
		})
	}
}
