package fastpgcache

import (
	"database/sql/driver"
	"strings"

	"github.com/lib/pq"
)

// newPQConnector is lib/pq's connector for dsn, with binary_parameters on unless
// dsn says otherwise.
func newPQConnector(dsn string) (driver.Connector, error) {
	cfg, err := pq.NewConfig(dsn)
	if err != nil {
		return nil, err
	}
	if !strings.Contains(dsn, "binary_parameters") {
		cfg.BinaryParameters = true
	}
	return pq.NewConnectorConfig(cfg)
}
