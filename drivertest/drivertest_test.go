// Package drivertest runs the conformance suite over drivers that the library
// itself does not import.
package drivertest

import (
	"database/sql"
	"database/sql/driver"
	"os"
	"testing"

	"github.com/fastpgcache/fastpgcache/internal/conformance"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

// pgxDriver is pgx in one of its modes; the empty one is its default,
// cache_statement.
func pgxDriver(mode string) conformance.Driver {
	d := conformance.Driver{Name: "pgx"}
	settings := ""
	if mode != "" {
		d.Name += "-" + mode
		settings = " default_query_exec_mode=" + mode
		d.Unprepared = true
	}
	d.Connect = func(dsn string) (driver.Connector, error) {
		cfg, err := pgx.ParseConfig(dsn + settings)
		if err != nil {
			return nil, err
		}
		return stdlib.GetConnector(*cfg), nil
	}
	return d
}

var drivers = []conformance.Driver{pgxDriver(""), pgxDriver("exec"), pgxDriver("cache_describe"), pgxDriver("simple_protocol")}

func TestConformance(t *testing.T) {
	t.Parallel()
	conformance.Run(t, drivers...)
}

func TestProcesses(t *testing.T) { conformance.RunProcesses(t, drivers[0]) }

func TestChildProcess(t *testing.T) { conformance.Child(t, drivers...) }

// TestEveryModeTakesTheArgumentsOfTheStatements is for whoever writes one: an
// array goes as its text or, to pgx, as a slice, a value that is absent as nil.
func TestEveryModeTakesTheArgumentsOfTheStatements(t *testing.T) {
	dsn := pgtest.Database(t)
	for _, d := range drivers {
		t.Run(d.Name, func(t *testing.T) {
			connector, err := d.Connect(dsn)
			if err != nil {
				t.Fatal(err)
			}
			db := sql.OpenDB(connector)
			defer db.Close()
			for _, tt := range []struct {
				query string
				arg   any
				want  string
			}{
				{`SELECT $1::text`, "a'\\", "a'\\"},
				{`SELECT coalesce($1::text, 'null')`, nil, "null"},
				{`SELECT encode($1::bytea, 'hex')`, []byte("\x00\xff"), "00ff"},
				{`SELECT coalesce(encode($1::bytea, 'hex'), 'null')`, nil, "null"},
				{`SELECT encode($1::bytea, 'hex')`, []byte{}, ""},
				{`SELECT ($1::bigint)::text`, int64(1) << 62, "4611686018427387904"},
				{`SELECT coalesce(($1::bigint)::text, 'null')`, nil, "null"},
				{`SELECT array_to_string($1::text[], '|', 'null')`, `{a,"b\"\\","",NULL,"NULL","{}"}`, `a|b"\||null|NULL|{}`},
				{`SELECT coalesce(array_length($1::text[], 1)::text, 'none')`, `{}`, "none"},
				{`SELECT encode(($1::bytea[])[1], 'hex')`, `{"\\x00ff",NULL}`, "00ff"},
				{`SELECT ($1::bigint[])[2]::text`, `{1,-2}`, "-2"},
				{`SELECT array_to_string($1::text[], '|', 'null')`, []string{"a", "b\"\\", "", "NULL", "{}"}, `a|b"\||NULL|{}`},
				{`SELECT array_to_string($1::text[], '|', 'null')`, []*string{new(string), nil}, `|null`},
				{`SELECT coalesce(array_length($1::bytea[], 1)::text, 'none')`, [][]byte{}, "none"},
				{`SELECT encode(($1::bytea[])[1], 'hex') || coalesce(($1::bytea[])[2]::text, 'null')`, [][]byte{{0, 0xff}, nil}, "00ffnull"},
				{`SELECT array_to_string($1::bigint[], '|', 'null')`, []*int64{new(int64), nil}, "0|null"},
			} {
				stmt, err := db.PrepareContext(t.Context(), tt.query)
				if err != nil {
					t.Fatal(err)
				}
				defer stmt.Close()
				for how, row := range map[string]*sql.Row{
					"text":     db.QueryRowContext(t.Context(), tt.query, tt.arg),
					"prepared": stmt.QueryRowContext(t.Context(), tt.arg),
				} {
					var got string
					if err := row.Scan(&got); err != nil || got != tt.want {
						t.Errorf("%s, %s: got %q, %v, want %q", how, tt.query, got, err, tt.want)
					}
				}
			}
		})
	}
}
