package transaction

import (
	"testing"

	"github.com/fastpgcache/fastpgcache/cachetest"
)

func TestTheRowAndItsCachedValueChangeTogether(t *testing.T) {
	ctx := t.Context()
	cache := cachetest.New(t)
	db := cache.DB()
	if _, err := db.Exec(`CREATE TABLE accounts (id text PRIMARY KEY, balance bigint NOT NULL CHECK (balance >= 0));
		INSERT INTO accounts VALUES ('ada', 100)`); err != nil {
		t.Fatal(err)
	}
	accounts := Accounts{db, cache}
	want := func(want int64) {
		t.Helper()
		var row int64
		if err := db.QueryRow(`SELECT balance FROM accounts WHERE id = 'ada'`).Scan(&row); err != nil {
			t.Fatal(err)
		}
		if got, err := accounts.Balance(ctx, "ada"); err != nil || got != want || row != want {
			t.Errorf("got %d cached, %v, and %d in the row, want %d", got, err, row, want)
		}
	}
	want(100)
	if got, err := accounts.Deposit(ctx, "ada", 50); err != nil || got != 150 {
		t.Errorf("got %d, %v, want 150", got, err)
	}
	want(150)
	if _, err := accounts.Deposit(ctx, "ada", -500); err == nil {
		t.Error("the account is overdrawn")
	}
	want(150)
}
