package drivertest

import (
	"context"
	"log"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
)

// With pgx, a TokenCache gives the password of each new connection.
func Example_tokens() {
	tokens := fastpgcache.NewTokenCache(func(context.Context) (fastpgcache.Token, error) {
		return fastpgcache.Token{Value: "secret", Expiry: time.Now().Add(time.Hour)}, nil
	})
	config, err := pgx.ParseConfig("host=db.example.com user=app dbname=shop sslmode=verify-full")
	if err != nil {
		log.Fatal(err)
	}
	connector := stdlib.GetConnector(*config, stdlib.OptionBeforeConnect(
		func(ctx context.Context, config *pgx.ConnConfig) (err error) {
			config.Password, err = tokens.Token(ctx)
			return err
		}))
	cache, err := fastpgcache.OpenConnector(connector, fastpgcache.Config{})
	if err != nil {
		log.Fatal(err)
	}
	cache.DB().SetConnMaxLifetime(45 * time.Minute)
	defer cache.Close()
}
