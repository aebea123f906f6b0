package fastpgcache_test

import (
	"context"
	"database/sql"
	"fmt"
	"time"

	"github.com/DATA-DOG/go-sqlmock"

	"github.com/fastpgcache/fastpgcache"
)

// Prices is the service under test: it caches what it asks the database.
type Prices struct {
	db    *sql.DB
	cache *fastpgcache.Cache
}

func (p *Prices) Of(ctx context.Context, item string) (cents int, err error) {
	key := "price:" + item
	if found, err := p.cache.Get(ctx, key, &cents); found && err == nil {
		return cents, nil
	}
	if err := p.db.QueryRowContext(ctx, "SELECT cents FROM prices WHERE item = $1", item).Scan(&cents); err != nil {
		return 0, err
	}
	// A price that could not be cached is still a price.
	_ = p.cache.Set(ctx, key, cents, 5*time.Minute)
	return cents, nil
}

// A service is tested without a database, by go-sqlmock. The statements and
// their arguments are those of docs/unit-testing.md; the default matcher is
// content with a part of one.
func Example_unitTest() {
	ctx := context.Background()
	db, mock, err := sqlmock.New()
	if err != nil {
		fmt.Println(err)
		return
	}
	defer db.Close()
	cache, err := fastpgcache.New(db, fastpgcache.Config{
		DisableCoalescing: true, // each call is a statement of its own
		DisablePrepare:    true, // and no Prepare needs to be expected
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	prices := &Prices{db: db, cache: cache}

	// A miss: the service asks the database and caches the answer.
	mock.ExpectQuery("SELECT value, value_bytes FROM").WithArgs("price:tea").
		WillReturnRows(sqlmock.NewRows([]string{"value", "value_bytes"}))
	mock.ExpectQuery("SELECT cents FROM prices").WithArgs("tea").
		WillReturnRows(sqlmock.NewRows([]string{"cents"}).AddRow(350))
	mock.ExpectExec("INSERT INTO").WithArgs("price:tea", "350", nil, (5 * time.Minute).Microseconds()).
		WillReturnResult(sqlmock.NewResult(0, 1))
	fmt.Println(prices.Of(ctx, "tea"))

	// A hit: one statement, and no more.
	mock.ExpectQuery("SELECT value, value_bytes FROM").WithArgs("price:tea").
		WillReturnRows(sqlmock.NewRows([]string{"value", "value_bytes"}).AddRow("350", nil))
	fmt.Println(prices.Of(ctx, "tea"))

	// The cache is down: the service works without it.
	mock.ExpectQuery("SELECT value, value_bytes FROM").WillReturnError(sql.ErrConnDone)
	mock.ExpectQuery("SELECT cents FROM prices").WithArgs("tea").
		WillReturnRows(sqlmock.NewRows([]string{"cents"}).AddRow(350))
	mock.ExpectExec("INSERT INTO").WillReturnError(sql.ErrConnDone)
	fmt.Println(prices.Of(ctx, "tea"))

	fmt.Println(mock.ExpectationsWereMet())
	// Output:
	// 350 <nil>
	// 350 <nil>
	// 350 <nil>
	// <nil>
}
