package main

import (
	"database/sql"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"

	_ "github.com/lib/pq"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

func TestMain(m *testing.M) {
	testscript.Main(servers{m}, map[string]func(){"fastpgcache-admin": main})
}

// servers runs the tests, then stops their server.
type servers struct{ *testing.M }

func (s servers) Run() int { return pgtest.Main(s.M) }

// TestScripts runs testdata/script, each on a database of its own, $DATABASE, of
// a server that asks every role but postgres for its password. $ADMIN, $ALICE and
// $BOB are roles, and their own passwords; $ADMIN may create in the database.
// query is SQL that the superuser runs; [pty] tells whether there are terminals.
func TestScripts(t *testing.T) {
	server := pgtest.Own(t, pgtest.Config{HBA: "host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n"})
	host, port := server.Addr()
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			tb := env.T().(testing.TB)
			dsn := server.Database(tb)
			_, database, _ := strings.Cut(dsn, "dbname=")
			env.Values["dsn"] = dsn
			admin := pgtest.Role(tb, dsn)
			env.Setenv("ADMIN", admin)
			env.Setenv("ALICE", pgtest.Role(tb, dsn))
			env.Setenv("BOB", pgtest.Role(tb, dsn))
			env.Setenv("DATABASE", database)
			env.Setenv("PGHOST", host)
			env.Setenv("PGPORT", strconv.Itoa(port))
			env.Setenv("PORT", strconv.Itoa(port))
			env.Setenv("PGDATABASE", database)
			_, err := query(dsn, fmt.Sprintf(`GRANT CREATE ON DATABASE %s TO %s; GRANT CREATE ON SCHEMA public TO %[2]s`, database, admin))
			return err
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"query": func(ts *testscript.TestScript, neg bool, args []string) {
				if len(args) != 1 || neg {
					ts.Fatalf("usage: query SQL")
				}
				out, err := query(ts.Value("dsn").(string), args[0])
				ts.Check(err)
				fmt.Fprint(ts.Stdout(), out)
			},
		},
		Condition: func(condition string) (bool, error) {
			if condition != "pty" {
				return false, fmt.Errorf("no condition %q", condition)
			}
			// A chroot may have none.
			terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
			if err != nil {
				return false, nil
			}
			return runtime.GOOS == "linux", terminal.Close()
		},
		UpdateScripts: os.Getenv("UPDATE_SCRIPTS") != "",
	})
}

// query returns the rows of a statement, columns apart by "|".
func query(dsn, statement string) (string, error) {
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		return "", err
	}
	defer db.Close()
	rows, err := db.Query(statement)
	if err != nil {
		return "", fmt.Errorf("%s: %w", statement, err)
	}
	defer rows.Close()
	columns, err := rows.Columns()
	if err != nil {
		return "", err
	}
	var out strings.Builder
	for rows.Next() {
		values := make([]sql.NullString, len(columns))
		dest := make([]any, len(columns))
		for i := range values {
			dest[i] = &values[i]
		}
		if err := rows.Scan(dest...); err != nil {
			return "", err
		}
		for i, v := range values {
			if i > 0 {
				out.WriteByte('|')
			}
			out.WriteString(v.String)
		}
		out.WriteByte('\n')
	}
	return out.String(), rows.Err()
}
