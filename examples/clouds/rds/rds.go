// Package rds opens a cache on Amazon RDS or Aurora with IAM authentication: the password is a
// token that is signed here, without asking anybody, and good for 15 minutes.
//
// The role must be granted rds_iam, and the identity be allowed rds-db:connect. The bundle of
// certificates is https://truststore.pki.rds.amazonaws.com/global/global-bundle.pem.
package rds

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/feature/rds/auth"

	"github.com/fastpgcache/fastpgcache"
)

// Open opens a cache; host is the endpoint of the cluster's writer or of the instance.
func Open(ctx context.Context, host, region, user, database, bundle string) (*fastpgcache.Cache, error) {
	cfg, err := config.LoadDefaultConfig(ctx, config.WithRegion(region))
	if err != nil {
		return nil, err
	}
	tokens := fastpgcache.NewTokenCache(func(ctx context.Context) (fastpgcache.Token, error) {
		return token(ctx, host+":5432", region, user, cfg.Credentials)
	})
	dsn := fmt.Sprintf("host=%s user=%s dbname=%s sslrootcert=%s", host, user, database, bundle)
	connector, err := fastpgcache.NewConnector(dsn, tokens)
	if err != nil {
		return nil, err
	}
	return fastpgcache.OpenConnector(connector, fastpgcache.Config{})
}

// token signs a token. endpoint must have the port.
func token(ctx context.Context, endpoint, region, user string, credentials aws.CredentialsProvider) (fastpgcache.Token, error) {
	expiry := time.Now().Add(15 * time.Minute)
	value, err := auth.BuildAuthToken(ctx, endpoint, region, user, credentials)
	// BuildAuthToken leaves out the "/" before the "?", which some servers insist on: "PAM
	// authentication failed" (https://github.com/aws/aws-sdk-go-v2/issues/3365). The signature is
	// the same, with it and without.
	if host, query, found := strings.Cut(value, "?"); found && !strings.HasSuffix(host, "/") {
		value = host + "/?" + query
	}
	return fastpgcache.Token{Value: value, Expiry: expiry}, err
}
