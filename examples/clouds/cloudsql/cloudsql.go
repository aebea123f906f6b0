// Package cloudsql opens a cache on Google Cloud SQL with IAM authentication, through Google's own
// connector, which brings TLS, the token and the way to private addresses. It needs pgx.
//
// The instance must have the flag cloudsql.iam_authentication, and the identity the roles Cloud SQL
// Client and Cloud SQL Instance User. A service account's role in PostgreSQL is its address
// without .gserviceaccount.com.
package cloudsql

import (
	"context"
	"fmt"
	"net"

	"cloud.google.com/go/cloudsqlconn"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"

	"github.com/fastpgcache/fastpgcache"
)

// Open opens a cache; instance is project:region:instance. Call end after the cache's Close.
func Open(ctx context.Context, instance, user, database string, options ...cloudsqlconn.Option) (cache *fastpgcache.Cache, end func() error, err error) {
	dialer, err := cloudsqlconn.NewDialer(ctx, append(options, cloudsqlconn.WithIAMAuthN())...)
	if err != nil {
		return nil, nil, err
	}
	// The dialer encrypts; no host is looked up but the instance's.
	config, err := pgx.ParseConfig(fmt.Sprintf("host=localhost user=%s dbname=%s sslmode=disable", user, database))
	if err != nil {
		dialer.Close()
		return nil, nil, err
	}
	config.DialFunc = func(ctx context.Context, _, _ string) (net.Conn, error) { return dialer.Dial(ctx, instance) }
	cache, err = fastpgcache.OpenConnector(stdlib.GetConnector(*config), fastpgcache.Config{})
	if err != nil {
		dialer.Close()
		return nil, nil, err
	}
	return cache, dialer.Close, nil
}
