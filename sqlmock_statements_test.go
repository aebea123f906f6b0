package fastpgcache_test

import (
	"database/sql/driver"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/DATA-DOG/go-sqlmock"

	"github.com/fastpgcache/fastpgcache"
)

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
	c, mock := newMock(t, fastpgcache.Config{Schema: `a"b; DROP`, DisableCoalescing: true, DisablePrepare: true})
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

	bite("").WillReturnRows(sqlmock.NewRows(s.columns).AddRow(3, 0, "b256"))
	bite("b256").WillReturnRows(sqlmock.NewRows(s.columns).AddRow(0, 0, "b512"))
	bite("b512").WillReturnRows(sqlmock.NewRows(s.columns).AddRow(4, 0, nil))
	if n, err := m.Cleanup(t.Context()); n != 7 || err != nil {
		t.Errorf("got %d, %v, want 7", n, err)
	}
	bite("").WillReturnRows(sqlmock.NewRows(s.columns).AddRow(3, 0, "b256"))
	bite("b256").WillReturnError(boom)
	if n, err := m.Cleanup(t.Context()); n != 3 || !errors.Is(err, boom) {
		t.Errorf("got %d, %v, want 3 and the error", n, err)
	}
	if err := m.ExpectationsWereMet(); err != nil {
		t.Error(err)
	}
	m.ExpectBegin()
	tx, err := m.DB().Begin()
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

// TestStatementIsPreparedOnce and closed with the cache.
func TestStatementIsPreparedOnce(t *testing.T) {
	c, mock := newMock(t, fastpgcache.Config{DisableCoalescing: true})
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
	c, mock := newMock(t, fastpgcache.Config{DisableCoalescing: true})
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
