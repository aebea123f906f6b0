// Package transaction changes a business row and the value cached of it in one
// transaction: nobody ever sees one without the other.
package transaction

import (
	"context"
	"database/sql"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

// Accounts keeps balances, in a table and in the cache.
type Accounts struct {
	DB    *sql.DB
	Cache *fastpgcache.Cache
}

// Deposit adds cents to an account, and caches its new balance.
func (a Accounts) Deposit(ctx context.Context, account string, cents int64) (balance int64, err error) {
	tx, err := a.DB.BeginTx(ctx, nil)
	if err != nil {
		return 0, err
	}
	defer tx.Rollback()
	err = tx.QueryRowContext(ctx, `UPDATE accounts SET balance = balance + $2 WHERE id = $1 RETURNING balance`,
		account, cents).Scan(&balance)
	if err != nil {
		return 0, err
	}
	if err := a.Cache.WithTx(tx).Set(ctx, "balance/"+account, balance, time.Hour); err != nil {
		return 0, err
	}
	return balance, tx.Commit()
}

// Balance returns an account's balance.
func (a Accounts) Balance(ctx context.Context, account string) (balance int64, err error) {
	err = a.Cache.GetOrSet(ctx, "balance/"+account, &balance, time.Hour, func(ctx context.Context) (any, error) {
		var balance int64
		err := a.DB.QueryRowContext(ctx, `SELECT balance FROM accounts WHERE id = $1`, account).Scan(&balance)
		return balance, err
	})
	return balance, err
}
