package fastpgcache_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log"
	"net"
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

	sessions := fastpgcache.NewTyped[Session](cache, "session:")
	err = sessions.Set(ctx, "42", Session{User: "anna"}, 30*time.Minute)
	if err != nil {
		log.Fatal(err)
	}

	s, found, err := sessions.Get(ctx, "42")
	fmt.Println(found, err, s.User)
}

func ExampleNew() {
	cache, err := fastpgcache.New(db, fastpgcache.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer cache.Close() // db stays open
}

func ExampleTyped_SetMany() {
	prices := fastpgcache.NewTyped[int](cache, "price:")
	err := prices.SetMany(ctx, map[string]int{"tea": 350, "coffee": 420}, time.Hour)
	if err != nil {
		log.Fatal(err)
	}

	found, err := prices.GetMany(ctx, []string{"tea", "coffee", "cocoa"})
	fmt.Println(found["tea"], len(found), err) // cocoa is not in it
}

func ExampleCache_Get() {
	var s Session
	found, err := cache.Get(ctx, "session:42", &s)
	fmt.Println(found, err, s.User)
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
		host, _, _ := net.SplitHostPort(r.RemoteAddr) // the port is another one for each connection
		n, err := cache.Increment(ctx, "requests:"+host, 1, time.Minute)
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
