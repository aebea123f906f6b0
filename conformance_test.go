package fastpgcache_test

import (
	"database/sql/driver"
	"testing"

	"github.com/fastpgcache/fastpgcache/internal/conformance"
	"github.com/lib/pq"
)

func TestConformance(t *testing.T) {
	connect := func(settings string) func(string) (driver.Connector, error) {
		return func(dsn string) (driver.Connector, error) { return pq.NewConnector(dsn + settings) }
	}
	conformance.Run(t,
		conformance.Driver{Name: "pq", Connect: connect("")},
		conformance.Driver{Name: "pq-binary", Connect: connect(" binary_parameters=yes")},
	)
}
