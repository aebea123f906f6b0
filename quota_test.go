package fastpgcache

import (
	"database/sql"
	"fmt"
	"testing"
	"time"
)

// fit brings the entries of user within their limit, by as many bites as it takes.
func fit(t testing.TB, db *sql.DB, user string) (removed, evicted, bites int) {
	t.Helper()
	for next := 0; ; bites++ {
		var r, e, n sql.NullInt64
		if err := db.QueryRow(`SELECT removed, evicted, next_bite FROM cache_fit($1, $2)`, user, next).Scan(&r, &e, &n); err != nil {
			t.Fatal(err)
		}
		removed += int(r.Int64)
		evicted += int(e.Int64)
		if !n.Valid {
			return removed, evicted, bites + 1
		}
		next = int(n.Int64)
	}
}

func TestScratch(t *testing.T) {
	dsn, admin := setUp(t)
	db, sup := openDB(t, dsn), openDB(t, admin)
	var user string
	if err := db.QueryRow(`SELECT current_user`).Scan(&user); err != nil {
		t.Fatal(err)
	}
	execAdmin(t, admin, `INSERT INTO cache_limit VALUES ('', 32 * 1024 * 1024)`)
	for i := range 30 {
		if _, err := db.Exec(`INSERT INTO cache (key, value, mark) SELECT 'key:' || $1::text || ':' || g, repeat('v', 100), txid_current() FROM generate_series(1, 10000) g`, i); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		start := time.Now()
		r, e, b := fit(t, db, user)
		took := time.Since(start)
		var entries, bytes int64
		var half sql.NullInt64
		sup.QueryRow(`SELECT entries, bytes, half FROM cache_epoch`).Scan(&entries, &bytes, &half)
		fmt.Println(r, e, b, took, entries, bytes, half)
	}
	rows, _ := sup.Query(`SELECT split_part(key, ':', 2)::int, count(*) FROM cache GROUP BY 1 ORDER BY 1`)
	for rows.Next() {
		var a, n int
		rows.Scan(&a, &n)
		fmt.Print(a, ":", n, " ")
	}
	fmt.Println()
}
