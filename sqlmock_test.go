package fastpgcache_test

import (
	"context"
	"database/sql/driver"
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
	answers: []answer{{rows: [][]driver.Value{{int64(7), int64(0), nil}}, want: 7}},
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
		if method.Type.NumIn() < 2 || method.Type.In(1) != ctx || method.Name == "Sweep" {
			continue // no operation, or one that sends nothing, as the next test shows
		}
		if !pinned[method.Name] {
			t.Errorf("operations has no %s", method.Name)
		}
		if _, ok := page[method.Name]; !ok && !strings.HasPrefix(method.Name, "GetOr") {
			t.Errorf("docs/unit-testing.md has no %s", method.Name)
		}
	}
}

func TestSweepOfOneCacheSendsNothing(t *testing.T) {
	m := newMocked(t, mockMode{})
	if n, err := m.Sweep(t.Context()); n != 0 || err != nil {
		t.Errorf("got %d, %v", n, err)
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
	page map[string]statement
	mode mockMode
}

// newMock returns a cache over a mock that knows statements by their exact text.
func newMock(t *testing.T, config fastpgcache.Config) (*fastpgcache.Cache, sqlmock.Sqlmock) {
	t.Helper()
	db, mock, err := sqlmock.New(sqlmock.QueryMatcherOption(sqlmock.QueryMatcherEqual))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	c, err := fastpgcache.New(db, config)
	if err != nil {
		t.Fatal(err)
	}
	return c, mock
}

func newMocked(t *testing.T, mode mockMode) *mocked {
	t.Helper()
	c, mock := newMock(t, fastpgcache.Config{User: mode.user, DisableCoalescing: true, DisablePrepare: true})
	if mode.tx {
		mock.ExpectBegin()
		tx, err := c.DB().Begin()
		if err != nil {
			t.Fatal(err)
		}
		c = c.WithTx(tx)
	}
	return &mocked{Sqlmock: mock, Cache: c, page: documented(t), mode: mode}
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
