// Package drivertest runs the conformance suite over drivers that the library
// itself does not import.
package drivertest

import (
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

func TestConformance(t *testing.T) {
	conformance.Run(t, pgxDriver(""), pgxDriver("exec"), pgxDriver("cache_describe"), pgxDriver("simple_protocol"))
}
