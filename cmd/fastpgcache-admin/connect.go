package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/lib/pq"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/conninfo"
)

// connectTimeout bounds a login unless PGCONNECT_TIMEOUT or the DSN does.
const connectTimeout = 10 * time.Second

// searchPath goes into the startup packet, before anything looks up a name: the database's
// own setting may lead to functions, operators and types of anybody's.
const searchPath = "pg_catalog,pg_temp"

// server is the database that the command works on.
type server struct {
	*sql.DB
	name   string // the schema
	schema string // the schema, quoted
	where  string // for people: schema, database and host
}

// trustSQL finds what somebody could have replaced who has not this role's rights: whoever
// owns a schema, or what is in it, decides what a statement on it runs.
const trustSQL = `
WITH me AS (SELECT oid FROM pg_roles WHERE rolname = current_user),
schema AS (SELECT * FROM pg_namespace WHERE nspname = $1)
SELECT object, owner::regrole FROM (
  SELECT format('schema %I', nspname) AS object, CASE WHEN nspowner::regrole::text = 'pg_database_owner'
    THEN (SELECT datdba FROM pg_database WHERE datname = current_database()) ELSE nspowner END AS owner FROM schema
  UNION ALL
  SELECT 'table ' || c.oid::regclass, c.relowner FROM pg_class c JOIN schema n ON n.oid = c.relnamespace
  WHERE c.relname IN ('cache', 'cache_change', 'cache_epoch', 'cache_lease', 'cache_limit')
  UNION ALL
  SELECT 'function ' || p.oid::regprocedure, p.proowner FROM pg_proc p JOIN schema n ON n.oid = p.pronamespace
  WHERE p.proname IN ('cache_walk', 'cache_trim', 'cache_begin', 'cache_changed', 'cache_moved', 'cache_deleted')) objects, me
WHERE NOT pg_has_role(owner, me.oid, 'MEMBER')
LIMIT 1`

// trust refuses to act on what another role could have run with this one's rights.
func (s *server) trust(ctx context.Context) error {
	var object, owner string
	err := s.QueryRowContext(ctx, trustSQL, s.name).Scan(&object, &owner)
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	if err != nil {
		return err
	}
	return &adviceError{
		fmt.Sprintf("%s belongs to role %s, which could have it run anything with your rights", object, owner),
		"Log in as that role: --user " + shellWord(strings.Trim(owner, `"`)),
	}
}

// connect logs in. It completes o by what it finds out, for messages.
func connect(ctx context.Context, o *options) (*server, error) {
	connector, err := o.connector(ctx)
	if err != nil {
		return nil, err
	}
	db := sql.OpenDB(connector)
	db.SetMaxOpenConns(1)
	s := &server{DB: db, name: o.setup.Schema, schema: pq.QuoteIdentifier(o.setup.Schema)}
	if err := db.QueryRowContext(ctx, "SELECT current_database(), current_user").Scan(&o.database, &o.user); err != nil {
		db.Close()
		return nil, &loginError{err}
	}
	s.where = fmt.Sprintf("schema %q of database %q", o.setup.Schema, o.database)
	if o.host != "" {
		s.where += " on " + o.host
	}
	return s, nil
}

// loginError is a failure before anything was asked of the database.
type loginError struct{ cause error }

func (e *loginError) Error() string { return e.cause.Error() }
func (e *loginError) Unwrap() error { return e.cause }

// connector is where and how to log in.
func (o *options) connector(ctx context.Context) (driver.Connector, error) {
	if o.databricks {
		if err := os.Setenv("PGOPTIONS", strings.TrimSpace(os.Getenv("PGOPTIONS")+" -c search_path="+searchPath)); err != nil {
			return nil, err
		}
		return lakebaseConnector(ctx, o)
	}
	cfg, err := o.config()
	if err != nil {
		return nil, err
	}
	o.host, o.port, o.user, o.database = cfg.Host, uint(cfg.Port), cfg.User, cfg.Database
	return pq.NewConnectorConfig(cfg)
}

// config is the flags over the DSN over the environment over the defaults.
func (o *options) config() (pq.Config, error) {
	// lib/pq takes the operating system's user for a default, and an empty variable
	// for a value.
	for _, variable := range os.Environ() {
		if name, value, _ := strings.Cut(variable, "="); strings.HasPrefix(name, "PG") && value == "" {
			os.Unsetenv(name)
		}
	}
	if os.Getenv("PGUSER") == "" {
		os.Setenv("PGUSER", "postgres")
	}
	cfg, err := conninfo.Parse(o.dsn)
	if err != nil {
		return pq.Config{}, err
	}
	if o.set["host"] {
		cfg.Host, cfg.Hostaddr, cfg.Multi = o.host, pq.Config{}.Hostaddr, nil
		if filepath.IsAbs(o.host) {
			cfg.SSLMode = pq.SSLModeDisable // a socket has none
		}
	}
	if o.set["port"] {
		cfg.Port = uint16(o.port)
		for i := range cfg.Multi {
			cfg.Multi[i].Port = cfg.Port
		}
	}
	if o.set["database"] {
		cfg.Database = o.database
	}
	if o.set["user"] {
		cfg.User = o.user
	}
	if o.set["password"] {
		cfg.Password = o.password
	}
	if cfg.Database == "" {
		cfg.Database = "postgres"
	}
	if cfg.SSLMode == "" && cfg.SSLNegotiation != pq.SSLNegotiationDirect {
		cfg.SSLMode = pq.SSLModePrefer // as libpq has it
	}
	if cfg.ConnectTimeout <= 0 {
		cfg.ConnectTimeout = connectTimeout
	}
	if cfg.Runtime == nil {
		cfg.Runtime = map[string]string{}
	}
	cfg.Runtime["search_path"] = searchPath
	if cfg.ApplicationName == "" {
		cfg.ApplicationName = "fastpgcache-admin"
	}
	return cfg, nil
}

// setUp is the command that sets o's schema up.
func (o *options) setUp() string {
	return "fastpgcache-admin setup --schema " + shellWord(o.setup.Schema)
}

// shellWord is a word as a shell takes it.
func shellWord(word string) string {
	if word == "" || strings.ContainsFunc(word, func(r rune) bool { return r != '_' && !unicode.IsLetter(r) && !unicode.IsDigit(r) }) {
		return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
	}
	return word
}

// adviceError is a failure that knows what to do about it.
type adviceError struct{ text, todo string }

func (e *adviceError) Error() string { return e.text }

// explain says what went wrong and, on a line of its own, what to do about it.
func explain(err error, o *options) string {
	text, todo := message(err), advice(err, o)
	if todo == "" {
		return text
	}
	return text + "\n  " + todo
}

// message is the server's own words where it has some.
func message(err error) string {
	var e *pq.Error
	if !errors.As(err, &e) {
		return strings.TrimPrefix(err.Error(), "fastpgcache: ")
	}
	text := e.Message
	if e.Detail != "" {
		text += " (" + e.Detail + ")"
	}
	return text
}

// advice is what a DBA can do about err, or empty.
func advice(err error, o *options) string {
	schema, user := pq.QuoteIdentifier(o.setup.Schema), pq.QuoteIdentifier(o.user)
	server := net.JoinHostPort(o.host, strconv.Itoa(int(o.port)))
	if filepath.IsAbs(o.host) {
		server = fmt.Sprintf("the socket in %s, port %d", o.host, o.port)
	}

	var known *adviceError
	var login *loginError
	var network net.Error
	var authority x509.UnknownAuthorityError
	var certificate *tls.CertificateVerificationError
	switch state := sqlState(err); {
	case errors.As(err, &known):
		return known.todo
	case errors.Is(err, context.Canceled):
		return "It was interrupted."
	case o.databricks && strings.HasPrefix(state, "28"):
		return "The identity of --profile needs a PostgreSQL role of its name in the database, made with databricks_create_role."
	case state == "28P01":
		return fmt.Sprintf("The server at %s refuses this password of role %s, or got none. Set PGPASSWORD, or add the password to ~/.pgpass.", server, user)
	case state == "28000":
		return fmt.Sprintf("The server at %s does not let role %s log in: check --user and --database, and the server's pg_hba.conf for this machine and for TLS.", server, user)
	case state == "3D000":
		return fmt.Sprintf("Name another by --database or PGDATABASE, or create it: createdb %s", o.database)
	case state == "42501" && o.command == "setup":
		return fmt.Sprintf("Run this as a role that may create there, or let a superuser grant it: "+
			"GRANT CREATE ON SCHEMA %s TO %s; where the schema does not exist: GRANT CREATE ON DATABASE %s TO %s;",
			schema, user, pq.QuoteIdentifier(o.database), user)
	case state == "42501":
		return fmt.Sprintf("Role %s may not use this cache. Run this as its owner, or let the owner grant it the cache's role: %s --grant ROLE", user, o.setUp())
	case errors.Is(err, fastpgcache.ErrForeignTable):
		return "Nothing was changed, and --force does not drop it either. Remove what is not the cache's, or choose another schema for the cache: --schema fastpgcache"
	case errors.Is(err, fastpgcache.ErrNotPermitted): // FPG02, of migrations.sql
		return "Nothing was changed. Log in as that role (--user), or give the cache a schema of your own: --schema fastpgcache"
	case state == "42P01", state == "42883", state == "42703", state == "3F000", errors.Is(err, fastpgcache.ErrNotSetUp):
		return "Run: " + o.setUp()
	case state == "42704":
		return "Create the role first (CREATE ROLE), or name another by --grant or --service."
	case state == "25006":
		return "This server is a standby, or the session is read-only. Connect to the primary."
	case state == "57P03", state == "53300":
		return "Try again in a moment."
	case errors.Is(err, pq.ErrSSLNotSupported):
		return "The server speaks no TLS. If the network between is safe: PGSSLMODE=prefer"
	case errors.As(err, &authority), errors.As(err, &certificate):
		return "Name the file with the certificate of the server's authority by PGSSLROOTCERT."
	case errors.As(err, &login) && state == "" && !o.databricks && errors.As(err, &network):
		return fmt.Sprintf("Nothing answers as a PostgreSQL server at %s. Is it running, and do --host and --port (PGHOST, PGPORT) name it?", server)
	}
	return ""
}

func sqlState(err error) string {
	var e interface{ SQLState() string }
	if errors.As(err, &e) {
		return e.SQLState()
	}
	return ""
}
