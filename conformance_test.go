package fastpgcache_test

import (
	"database/sql/driver"
	"errors"
	"testing"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/conformance"
	"github.com/lib/pq"
)

func pqDriver(name, settings string) conformance.Driver {
	return conformance.Driver{Name: name, Connect: func(dsn string) (driver.Connector, error) {
		return pq.NewConnector(dsn + settings)
	}}
}

var (
	pqText   = pqDriver("pq", "")
	pqBinary = pqDriver("pq-binary", " binary_parameters=yes")
)

func TestConformance(t *testing.T) {
	t.Parallel()
	conformance.Run(t, pqText, pqBinary)
}

func TestConformanceOfShards(t *testing.T) {
	t.Parallel()
	conformance.RunSharded(t, pqBinary)
}

func TestProcesses(t *testing.T) { conformance.RunProcesses(t, pqBinary) }

func TestChildProcess(t *testing.T) { conformance.Child(t, pqBinary) }

func TestOpenKeepsAPoolOfTenOverPQAndClosesIt(t *testing.T) {
	c := newCache(t)
	if got := c.DB().Stats().MaxOpenConnections; got != 10 {
		t.Errorf("got at most %d connections, want 10", got)
	}
	if err := c.Set(t.Context(), "k", []byte("\x00\xff"), 0); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := c.DB().Ping(); err == nil {
		t.Error("the pool is still open")
	}
}

func TestOpenDoesNoIO(t *testing.T) {
	c, err := fastpgcache.Open("host=192.0.2.1 connect_timeout=1", fastpgcache.Config{}) // nobody's address, RFC 5737
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestOpenRefusesABadDSN(t *testing.T) {
	for _, dsn := range []string{"no DSN", "postgres://%zz", "port=many"} {
		if _, err := fastpgcache.Open(dsn, fastpgcache.Config{}); !errors.Is(err, fastpgcache.ErrInvalidConfig) {
			t.Errorf("%q: got %v, want ErrInvalidConfig", dsn, err)
		}
	}
}
