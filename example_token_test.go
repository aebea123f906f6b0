package fastpgcache_test

import (
	"context"
	"log"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

// rdsAuthToken stands for auth.BuildAuthToken of github.com/aws/aws-sdk-go-v2/feature/rds/auth, and what
// examples/clouds/rds does to its token: the "/" before the "?" is missing, which some servers insist on
// (https://github.com/aws/aws-sdk-go-v2/issues/3365).
func rdsAuthToken(ctx context.Context, endpoint, region, user string) (string, error) {
	return "", nil
}

// Logins to AWS RDS with IAM tokens, which are valid for 15 minutes. Any function that returns a password will do.
func ExampleNewConnector() {
	tokens := fastpgcache.NewTokenCache(func(ctx context.Context) (fastpgcache.Token, error) {
		expiry := time.Now().Add(15 * time.Minute)
		value, err := rdsAuthToken(ctx, "mydb.example.eu-west-1.rds.amazonaws.com:5432", "eu-west-1", "app")
		return fastpgcache.Token{Value: value, Expiry: expiry}, err
	})
	connector, err := fastpgcache.NewConnector(
		"host=mydb.example.eu-west-1.rds.amazonaws.com user=app dbname=app sslrootcert=/etc/ssl/rds-global-bundle.pem", tokens)
	if err != nil {
		log.Fatal(err)
	}
	cache, err := fastpgcache.OpenConnector(connector, fastpgcache.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer cache.Close()
}
