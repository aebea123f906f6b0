package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"unicode"

	"github.com/fastpgcache/fastpgcache"
	"github.com/lib/pq"
)

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
	var login *loginError
	if errors.As(err, &login) {
		return login.Error()
	}
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
		return fmt.Sprintf("The server refuses this password of role %s, or got none. Set PGPASSWORD, or add the password to ~/.pgpass.", user)
	case state == "28000":
		return fmt.Sprintf("The server does not let role %s log in: check --user and --database, and the server's pg_hba.conf for this machine and for TLS.", user)
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
	case errors.Is(err, fastpgcache.ErrNotPermitted) && o.label != "":
		return fmt.Sprintf("Log in as that user, as the cache's owner, or as the role that may act for others: %s --service ROLE", o.setUp())
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
		return "Nothing answers there as a PostgreSQL server. Is it running, and do --host and --port (PGHOST, PGPORT) name it?"
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
