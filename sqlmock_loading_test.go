package fastpgcache_test

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/DATA-DOG/go-sqlmock"

	"github.com/fastpgcache/fastpgcache"
)

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
		aged := func(left driver.Value) answer { return answer{rows: [][]driver.Value{{"old", nil, left}}} }
		for _, step := range []loading{{
			name: "fresh",
			expect: func(m *mocked, do func(string, answer, ...driver.Value)) {
				do("GetOrRefresh, get", aged(31.), "k", 30_000_000)
			},
			want: "old",
		}, {
			name: "fresh for long, or without a TTL",
			expect: func(m *mocked, do func(string, answer, ...driver.Value)) {
				do("GetOrRefresh, get", aged(nil), "k", 30_000_000)
			},
			want: "old",
		}, {
			name: "stale, and another process is at it",
			expect: func(m *mocked, do func(string, answer, ...driver.Value)) {
				do("GetOrRefresh, get", aged(29.), "k", 30_000_000)
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
				do("GetOrRefresh, get", aged(29.), "k", 30_000_000)
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
