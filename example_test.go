package fastpgcache_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log"
	"net/http"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

var (
	ctx   = context.Background()
	db    *sql.DB
	cache *fastpgcache.Cache
)

type Session struct {
	User  string
	Roles []string
}

type Product struct {
	Name  string
	Price int
}

func loadProduct(ctx context.Context, id string) (Product, error) { return Product{}, nil }

func Example() {
	cache, err := fastpgcache.Open("host=db.example.com user=app dbname=shop", fastpgcache.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer cache.Close()

	err = cache.Set(ctx, "session:42", Session{User: "anna"}, 30*time.Minute)
	if err != nil {
		log.Fatal(err)
	}

	var s Session
	found, err := cache.Get(ctx, "session:42", &s)
	fmt.Println(found, err, s.User)
}

func ExampleNew() {
	cache, err := fastpgcache.New(db, fastpgcache.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer cache.Close() // db stays open
}

func ExampleCache_SetMany() {
	err := cache.SetMany(ctx, map[string]any{
		"price:1": 100,
		"price:2": 250,
	}, time.Hour)
	if err != nil {
		log.Fatal(err)
	}

	prices, err := cache.GetMany(ctx, []string{"price:1", "price:2", "price:3"})
	for key, value := range prices { // price:3 is not in it
		fmt.Println(key, value, err)
	}
}

func ExampleCache_GetOrSet() {
	var p Product
	err := cache.GetOrSet(ctx, "product:7", &p, 10*time.Minute, func(ctx context.Context) (any, error) {
		return loadProduct(ctx, "7")
	})
	fmt.Println(p, err)
}

func ExampleCache_Increment() {
	limited := func(w http.ResponseWriter, r *http.Request) {
		n, err := cache.Increment(ctx, "requests:"+r.RemoteAddr, 1, time.Minute)
		if err == nil && n > 100 {
			http.Error(w, "slow down", http.StatusTooManyRequests)
		}
	}
	_ = limited
}

func ExampleCache_Keys() {
	for key, err := range cache.Keys(ctx, "session:") {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(key)
	}
}

func ExampleCache_WithTx() {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer tx.Rollback()
	if _, err := tx.ExecContext(ctx, "UPDATE products SET price = 120 WHERE id = 7"); err != nil {
		log.Fatal(err)
	}
	if _, err := cache.WithTx(tx).Delete(ctx, "product:7"); err != nil {
		log.Fatal(err)
	}
	if err := tx.Commit(); err != nil { // now both, or neither
		log.Fatal(err)
	}
}

func ExampleConfig_maxStaleness() {
	cache, err := fastpgcache.New(db, fastpgcache.Config{
		MaxStaleness: 100 * time.Millisecond, // how old an answer from memory may be
	})
	fmt.Println(cache, err)
}

func ExampleConfig_cleanupInterval() {
	cache, err := fastpgcache.New(db, fastpgcache.Config{
		CleanupInterval: time.Minute,
		OnError:         func(err error) { log.Print(err) },
	})
	fmt.Println(cache, err)
}

func ExampleSetup() {
	err := fastpgcache.Setup(ctx, db, fastpgcache.SetupConfig{Grantee: "app"})
	if errors.Is(err, fastpgcache.ErrForeignTable) {
		log.Fatal("the schema has another table named cache")
	}
}
