package fastpgcache_test

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net/http"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/lib/pq"
)

type User struct {
	ID    string
	Name  string
	Email string
}

func ExampleNewTyped() {
	// Every key begins with "user:v2:". Programs that know User as it was go on
	// under "user:v1:", and neither reads the other's values.
	users := fastpgcache.NewTyped[User](cache, "user:v2:")

	if err := users.Set(ctx, "42", User{Name: "Anna"}, time.Hour); err != nil {
		log.Fatal(err)
	}
	u, found, err := users.Get(ctx, "42")
	fmt.Println(u.Name, found, err)

	pages := fastpgcache.NewTyped[string](cache, "page:") // stored byte for byte
	html, err := pages.GetOrSet(ctx, "/", time.Minute, func(ctx context.Context) (string, error) {
		return "<h1>Hello</h1>", nil
	})
	fmt.Println(html, err)
}

// A page that is never waited for twice. While the database behind it is down, it is
// served as it was, for up to a day; only who asks for one that is not there sees the
// error.
func ExampleTyped_GetOrRefresh() {
	products := fastpgcache.NewTyped[Product](cache, "product:")

	http.HandleFunc("GET /products/{id}", func(w http.ResponseWriter, r *http.Request) {
		id := r.PathValue("id")
		p, err := products.GetOrRefresh(r.Context(), id, time.Minute, 24*time.Hour, func(ctx context.Context) (Product, error) {
			return loadProduct(ctx, id)
		})
		if err != nil {
			http.Error(w, "try again later", http.StatusServiceUnavailable)
			return
		}
		json.NewEncoder(w).Encode(p)
	})
}

// What is not there is asked for once a minute, not with each request.
func ExampleNotFoundFor() {
	users := fastpgcache.NewTyped[User](cache, "user:")
	loadUser := func(ctx context.Context, id string) (u User, err error) {
		err = db.QueryRowContext(ctx, "SELECT id, name, email FROM users WHERE id = $1", id).Scan(&u.ID, &u.Name, &u.Email)
		if errors.Is(err, sql.ErrNoRows) {
			return u, fastpgcache.NotFoundFor(time.Minute)
		}
		return u, err
	}

	u, err := users.GetOrSet(ctx, "42", time.Hour, func(ctx context.Context) (User, error) { return loadUser(ctx, "42") })
	switch {
	case errors.Is(err, fastpgcache.ErrNotFound):
		fmt.Println("no such user")
	case err != nil:
		log.Fatal(err)
	default:
		fmt.Println(u.Name)
	}

	// A new user's Set, in the transaction that makes him, ends that.
}

// A batch function, as GraphQL's data loaders call it: all the ids that one level of a
// query needs, in one call.
func ExampleTyped_GetOrSetMany() {
	users := fastpgcache.NewTyped[User](cache, "user:")

	batch := func(ctx context.Context, ids []string) (map[string]User, error) {
		return users.GetOrSetMany(ctx, ids, time.Hour, func(ctx context.Context, missing []string) (map[string]User, error) {
			rows, err := db.QueryContext(ctx, "SELECT id, name, email FROM users WHERE id = ANY ($1)", pq.Array(missing))
			if err != nil {
				return nil, err
			}
			defer rows.Close()
			found := map[string]User{}
			for rows.Next() {
				var u User
				if err := rows.Scan(&u.ID, &u.Name, &u.Email); err != nil {
					return nil, err
				}
				found[u.ID] = u
			}
			if err := rows.Err(); err != nil {
				return nil, err
			}
			return found, fastpgcache.NotFoundFor(time.Minute) // of the ids that have no row
		})
	}
	byID, err := batch(ctx, []string{"1", "2", "3"})
	fmt.Println(len(byID), err)
}

// All that was made of a row goes in the transaction that changes it, or stays with it.
func ExampleCache_DeletePrefix() {
	rename := func(ctx context.Context, team, name string) error {
		tx, err := db.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		defer tx.Rollback()
		if _, err := tx.ExecContext(ctx, "UPDATE teams SET name = $2 WHERE id = $1", team, name); err != nil {
			return err
		}
		// "team:7:page", "team:7:members", and whatever else there is. The last colon
		// keeps those of team 70.
		if _, err := cache.WithTx(tx).DeletePrefix(ctx, "team:"+team+":"); err != nil {
			return err
		}
		return tx.Commit()
	}
	fmt.Println(rename(ctx, "7", "The Sevens"))
}
