package main

import (
	"context"
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
  WHERE p.proname IN ('cache_walk', 'cache_fit', 'cache_trim', 'cache_begin', 'cache_changed', 'cache_moved', 'cache_deleted')) objects, me
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
		return nil, &loginError{o.address, err}
	}
	s.where = fmt.Sprintf("schema %q of database %q", o.setup.Schema, o.database)
	if o.host != "" {
		s.where += " on " + o.host
	}
	return s, nil
}

// open logs in where there is a cache that is to be trusted.
func open(ctx context.Context, o *options) (*server, table, error) {
	s, err := connect(ctx, o)
	if err != nil {
		return nil, table{}, err
	}
	t, err := s.table(ctx)
	switch {
	case err != nil:
	case !t.found:
		err = s.elsewhere(ctx)
	case !t.cache:
		err = fmt.Errorf("%w, in %s", fastpgcache.ErrForeignTable, s.where)
	default:
		err = s.trust(ctx)
	}
	if err != nil {
		s.Close()
		return nil, table{}, err
	}
	return s, t, nil
}

// elsewhere is the error where there is no cache in the schema: it tells where there is one.
func (s *server) elsewhere(ctx context.Context) error {
	rows, err := s.QueryContext(ctx, `SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relname = 'cache' AND c.relkind = 'r' AND obj_description(c.oid, 'pg_class') LIKE 'fastpgcache schema %' ORDER BY 1 LIMIT 10`)
	if err != nil {
		return err
	}
	schemas, err := texts(rows)
	if err != nil {
		return err
	}
	missing := fmt.Errorf("%w: no table in %s", fastpgcache.ErrNotSetUp, s.where)
	if len(schemas) == 0 {
		return missing
	}
	return &adviceError{missing.Error(), "There is one in schema " + strings.Join(schemas, ", ") + ": --schema " + shellWord(schemas[0])}
}

func texts(rows *sql.Rows) (all []string, err error) {
	defer rows.Close()
	for rows.Next() {
		var text string
		if err := rows.Scan(&text); err != nil {
			return nil, err
		}
		all = append(all, text)
	}
	return all, rows.Err()
}

// loginError is a failure before anything was asked of the database.
type loginError struct {
	address string // of the server; empty: the cause names it
	cause   error
}

func (e *loginError) Error() string {
	if e.address == "" {
		return message(e.cause)
	}
	return "connect to " + e.address + ": " + message(e.cause)
}

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
	o.host, o.user, o.database = cfg.Host, cfg.User, cfg.Database
	o.address = address(cfg.Host, cfg.Port)
	for _, m := range cfg.Multi {
		o.address += " or " + address(m.Host, m.Port)
	}
	return pq.NewConnectorConfig(cfg)
}

// address is where a server is, for people.
func address(host string, port uint16) string {
	if filepath.IsAbs(host) {
		return fmt.Sprintf("%s/.s.PGSQL.%d", host, port)
	}
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
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
