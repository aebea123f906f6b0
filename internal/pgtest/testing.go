package pgtest

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lib/pq"
)

// cleanupTimeout bounds the dropping of a database or role.
const cleanupTimeout = 30 * time.Second

// shared is the server of this test process.
var shared struct {
	mu       sync.Mutex // guards all below
	server   *Server
	err      error
	admin    *sql.DB // the superuser's connections to it
	template string  // the database that Prepared copies
}

// Main runs the tests, then stops the shared server. It returns the exit code:
//
//	func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }
func Main(m *testing.M) int {
	code := m.Run()
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.server == nil {
		return code
	}
	if shared.template != "" && !shared.server.Owned() {
		if err := drop(shared.admin, shared.template); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = max(code, 1)
		}
	}
	if shared.admin != nil {
		shared.admin.Close()
	}
	if !shared.server.Owned() {
		return code
	}
	if err := shared.server.Stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return max(code, 1)
	}
	return code
}

// Shared returns the server that all tests of this process use, started at
// first use, or the one FASTPGCACHE_TEST_DSN names. Without a PostgreSQL the
// test fails, saying how to install one. A test that restarts or kills a server
// takes its own, see [Own].
func Shared(tb testing.TB) *Server {
	tb.Helper()
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.server == nil && shared.err == nil {
		ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
		defer cancel()
		if dsn := os.Getenv("FASTPGCACHE_TEST_DSN"); dsn != "" {
			shared.server, shared.err = external(ctx, dsn)
		} else {
			shared.server, shared.err = Start(ctx, Config{})
		}
	}
	if shared.err == nil && shared.admin == nil {
		shared.admin, shared.err = sql.Open("postgres", shared.server.DSN("postgres"))
	}
	if shared.err != nil {
		tb.Fatal(shared.err)
	}
	return shared.server
}

// Long tells whether tests are to take their full sizes, as FASTPGCACHE_LONG says: minutes
// rather than seconds.
func Long() bool { return os.Getenv("FASTPGCACHE_LONG") != "" }

// Own returns a server of this test's own, stopped when the test ends. It is
// started from local binaries even when FASTPGCACHE_TEST_DSN is set; only then
// are missing binaries a reason to skip the test.
func Own(tb testing.TB, cfg Config) *Server {
	tb.Helper()
	s, err := Start(context.Background(), cfg)
	if errors.Is(err, errNoBinaries) && os.Getenv("FASTPGCACHE_TEST_DSN") != "" {
		tb.Skip(err)
	}
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := s.Stop(); err != nil {
			tb.Error(err)
		}
	})
	return s
}

// Database creates an empty database on the shared server and returns the
// superuser's DSN for it. It is dropped when the test ends, sessions or no.
func Database(tb testing.TB) string {
	tb.Helper()
	s := Shared(tb)
	return s.database(tb, shared.admin, "template0")
}

// Database is the function of that name, for this server.
func (s *Server) Database(tb testing.TB) string {
	tb.Helper()
	admin, err := sql.Open("postgres", s.DSN("postgres"))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { admin.Close() })
	return s.database(tb, admin, "template0")
}

// Prepared is Database, but not empty: it is a copy of one that prepare was called
// with, once in this process, whichever test comes first.
func Prepared(tb testing.TB, prepare func(dsn string) error) string {
	tb.Helper()
	s := Shared(tb)
	return s.database(tb, shared.admin, s.prepared(tb, prepare))
}

// prepared returns the name of the database that Prepared copies.
func (s *Server) prepared(tb testing.TB, prepare func(dsn string) error) string {
	tb.Helper()
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.template == "" {
		name := uniqueName()
		create(tb, shared.admin, name, "template0")
		err := prepare(s.DSN(name))
		if err == nil {
			_, err = shared.admin.Exec(`ALTER DATABASE ` + pq.QuoteIdentifier(name) + ` ALLOW_CONNECTIONS false`)
		}
		if err != nil {
			tb.Fatal(errors.Join(err, drop(shared.admin, name)))
		}
		shared.template = name
	}
	return shared.template
}

// database is one that was made here, with the roles that go once it is gone.
type database struct {
	admin *sql.DB
	mu    sync.Mutex
	roles []string // quoted; guarded by mu
}

var databases sync.Map // by DSN: *database

func (s *Server) database(tb testing.TB, admin *sql.DB, template string) string {
	tb.Helper()
	name := uniqueName()
	dsn := s.DSN(name)
	create(tb, admin, name, template)
	d := &database{admin: admin}
	databases.Store(dsn, d)
	tb.Cleanup(func() {
		databases.Delete(dsn)
		err := drop(admin, name)
		if err == nil && len(d.roles) > 0 {
			_, err = admin.Exec(`DROP ROLE ` + strings.Join(d.roles, ", "))
		}
		if err != nil {
			tb.Errorf("pgtest: %v", err)
		}
	})
	return dsn
}

func create(tb testing.TB, admin *sql.DB, name, template string) {
	tb.Helper()
	if _, err := admin.Exec(`CREATE DATABASE ` + pq.QuoteIdentifier(name) + ` TEMPLATE ` + pq.QuoteIdentifier(template)); err != nil {
		tb.Fatalf("pgtest: %v", err)
	}
}

func drop(admin *sql.DB, name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
	defer cancel()
	if _, err := admin.ExecContext(ctx, `DROP DATABASE IF EXISTS `+pq.QuoteIdentifier(name)+` WITH (FORCE)`); err != nil {
		return fmt.Errorf("pgtest: %w", err)
	}
	return nil
}

// Role creates a login role on the server of dsn, a superuser's, and returns its
// name, see [WithUser]. Options are those of CREATE ROLE, in SQL: "IN ROLE a".
// When the test ends, its sessions are ended. The role is dropped then, with what it
// owns in the database of dsn; where that is of [Database] or [Prepared], with that.
func Role(tb testing.TB, dsn string, options ...string) (name string) {
	tb.Helper()
	name = uniqueName()
	role := pq.QuoteIdentifier(name)
	create := `CREATE ROLE ` + role + ` LOGIN PASSWORD ` + pq.QuoteLiteral(name) + ` ` + strings.Join(options, " ")
	terminate := `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = ` + pq.QuoteLiteral(name)
	if made, ok := databases.Load(dsn); ok {
		d := made.(*database)
		if _, err := d.admin.Exec(create); err != nil {
			tb.Fatalf("pgtest: %v", err)
		}
		d.mu.Lock()
		d.roles = append(d.roles, role)
		d.mu.Unlock()
		tb.Cleanup(func() {
			if _, err := d.admin.Exec(terminate); err != nil {
				tb.Errorf("pgtest: %v", err)
			}
		})
		return name
	}
	if err := execute(dsn, create); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := execute(dsn, terminate, `DROP OWNED BY `+role+` CASCADE`, `DROP ROLE `+role); err != nil {
			tb.Error(err)
		}
	})
	return name
}

// WithUser returns dsn, in key/value form, for a role made by [Role], whose
// password is its name.
func WithUser(dsn, user string) string {
	return dsn + " user=" + quoteValue(user) + " password=" + quoteValue(user)
}

// external describes a server not started here.
func external(ctx context.Context, dsn string) (*Server, error) {
	dsn, err := keyValue(dsn)
	if err != nil {
		return nil, err
	}
	cfg, err := pq.NewConfig(dsn)
	if err != nil {
		return nil, fmt.Errorf("pgtest: FASTPGCACHE_TEST_DSN: %w", err)
	}
	s := &Server{dsn: dsn, host: cfg.Host, port: int(cfg.Port)}
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		return nil, fmt.Errorf("pgtest: FASTPGCACHE_TEST_DSN: %w", err)
	}
	defer db.Close()
	if err := db.QueryRowContext(ctx, `SELECT current_setting('server_version_num')::int`).Scan(&s.version); err != nil {
		return nil, fmt.Errorf("pgtest: FASTPGCACHE_TEST_DSN: %w", err)
	}
	return s, nil
}

// keyValue turns a connection URL into key/value form, to which options can be
// appended; what is no URL is returned as it is.
func keyValue(dsn string) (string, error) {
	if !strings.HasPrefix(dsn, "postgres://") && !strings.HasPrefix(dsn, "postgresql://") {
		return dsn, nil
	}
	u, err := url.Parse(dsn)
	if err != nil {
		// Its text would show the password.
		return "", fmt.Errorf("pgtest: FASTPGCACHE_TEST_DSN is no valid URL")
	}
	var pairs []string
	add := func(key, value string) {
		if value != "" {
			pairs = append(pairs, key+"="+quoteValue(value))
		}
	}
	password, _ := u.User.Password()
	add("host", u.Hostname())
	add("port", u.Port())
	add("user", u.User.Username())
	add("password", password)
	add("dbname", strings.TrimPrefix(u.Path, "/"))
	for key, values := range u.Query() {
		add(key, values[len(values)-1])
	}
	return strings.Join(pairs, " "), nil
}

// execute runs statements one by one over a connection of their own.
func execute(dsn string, statements ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
	defer cancel()
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		return fmt.Errorf("pgtest: %w", err)
	}
	defer db.Close()
	db.SetMaxOpenConns(1)
	for _, statement := range statements {
		if _, err := db.ExecContext(ctx, statement); err != nil {
			return fmt.Errorf("pgtest: %s: %w", statement, err)
		}
	}
	return nil
}

// uniqueName is unlike any on a server that other processes use, too.
func uniqueName() string { return fmt.Sprintf("pgtest_%016x", rand.Uint64()) }

// quoteValue quotes a value of a key/value connection string.
func quoteValue(v string) string {
	if v != "" && !strings.ContainsAny(v, ` '\`+"\t\n\r\f\v") {
		return v
	}
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(v) + "'"
}
