package main

import (
	"context"
	"database/sql/driver"

	"github.com/fastpgcache/fastpgcache/lakebase"
)

// lakebaseConnector logs in to Databricks Lakebase, with what the workspace knows
// where no flag says otherwise.
func lakebaseConnector(ctx context.Context, o *options) (driver.Connector, error) {
	return lakebase.NewConnector(ctx, lakebase.Config{
		Instance: o.instance, Endpoint: o.endpoint, Profile: o.profile,
		Host: o.host, Database: o.database, User: o.user,
	})
}
