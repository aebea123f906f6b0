// Package cacheaside serves a page from the cache, and from the database when it is
// not there: loaded once, however many visitors ask for it at once.
package cacheaside

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"net/http"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

// Product is what the page shows.
type Product struct {
	Name  string `json:"name"`
	Cents int64  `json:"cents"`
}

// Shop serves products.
type Shop struct {
	DB    *sql.DB
	Cache *fastpgcache.Cache
}

func key(id string) string { return "product/" + id }

// ServeHTTP answers GET /products/{id}.
func (s Shop) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	var p Product
	err := s.Cache.GetOrSet(r.Context(), key(id), &p, time.Minute, func(ctx context.Context) (any, error) {
		var p Product
		err := s.DB.QueryRowContext(ctx, `SELECT name, cents FROM products WHERE id = $1`, id).Scan(&p.Name, &p.Cents)
		return p, err
	})
	switch {
	case errors.Is(err, sql.ErrNoRows), errors.Is(err, fastpgcache.ErrInvalidKey):
		http.NotFound(w, r)
	case err != nil:
		http.Error(w, "try again later", http.StatusServiceUnavailable)
	default:
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(p)
	}
}

// SetPrice changes a price. Once the Delete has returned nobody is shown the old one,
// also where it was being loaded at that moment.
func (s Shop) SetPrice(ctx context.Context, id string, cents int64) error {
	if _, err := s.DB.ExecContext(ctx, `UPDATE products SET cents = $2 WHERE id = $1`, id, cents); err != nil {
		return err
	}
	_, err := s.Cache.Delete(ctx, key(id))
	return err
}
