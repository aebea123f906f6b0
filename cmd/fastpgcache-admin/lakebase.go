package main

import (
	"context"
	"database/sql/driver"
	"errors"
)

// lakebaseConnector logs in to Databricks Lakebase.
func lakebaseConnector(context.Context, *options) (driver.Connector, error) {
	return nil, errors.New("--databricks is not in this build yet: it needs the package fastpgcache/lakebase")
}
