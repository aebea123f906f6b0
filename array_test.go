package fastpgcache

import (
	"context"
	"database/sql"
	"fmt"
	"reflect"
	"testing"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
	"github.com/lib/pq"
)

// FuzzArrays sends texts and bytes to PostgreSQL in every form of an array, which must
// hold what went in.
func FuzzArrays(f *testing.F) {
	for _, seed := range []string{"", "a", `"`, `\`, `{}`, "NULL", ",", " ", "é\t\n", `a"b\c`, "\xff\x00", "\x00"} {
		f.Add(seed, "x", int64(1))
		f.Add("y", seed, int64(noTTL))
	}
	dsn := pgtest.Database(f)
	text, binary := openDB(f, dsn), openDB(f, dsn+" binary_parameters=yes")
	f.Fuzz(func(t *testing.T, a, b string, micros int64) {
		var entries []entry
		var keys textArray
		for _, s := range []string{a, b, a + b} {
			value, err := encode(s)
			check(t, err)
			entries = append(entries, entry{value: value, micros: micros})
			if value.isText {
				keys = append(keys, s)
			}
		}
		wantText, wantBytes, wantTTL := []sql.NullString{}, [][]byte{}, []sql.NullInt64{}
		for _, e := range entries {
			wantText = append(wantText, sql.NullString{String: e.value.text, Valid: e.value.isText})
			if valueBytesArray(entries).len() > 0 {
				wantBytes = append(wantBytes, nil)
				if !e.value.isText {
					wantBytes[len(wantBytes)-1] = append([]byte{}, e.value.bytes...)
				}
			}
			ttl := sql.NullInt64{Int64: e.micros, Valid: e.micros != noTTL}
			if !ttl.Valid {
				ttl.Int64 = 0
			}
			wantTTL = append(wantTTL, ttl)
		}
		for form, db := range map[string]*sql.DB{"text": text, "binary": binary} {
			got := func(what, element string, array array, dest, want any) {
				t.Helper()
				var parameter any = array
				if form == "text" {
					v, err := array.Value()
					check(t, err)
					parameter = v
				}
				if err := db.QueryRow(`SELECT $1::`+element+`[]`, parameter).Scan(pq.Array(dest)); err != nil {
					t.Fatalf("%s, %s: %v", form, what, err)
				}
				if got := reflect.ValueOf(dest).Elem(); fmt.Sprintf("%q", got) != fmt.Sprintf("%q", reflect.ValueOf(want)) {
					t.Errorf("%s, %s: got %q, want %q", form, what, got, want)
				}
			}
			var gotKeys []string
			got("keys", "text", keys, &gotKeys, append([]string{}, keys...))
			var gotText []sql.NullString
			got("values", "text", valueArray(entries), &gotText, wantText)
			var gotBytes [][]byte
			got("bytes", "bytea", valueBytesArray(entries), &gotBytes, wantBytes)
			var gotTTL []sql.NullInt64
			got("ttls", "bigint", ttlArray(entries), &gotTTL, wantTTL)
		}
	})
}

// FuzzFeedRows puts into the feed whatever its table takes, as any login may: a catch-up
// copes, and what it named is answered by the database.
func FuzzFeedRows(f *testing.F) {
	for _, seed := range []string{`{a}`, `{}`, `{NULL}`, `{a,NULL}`, `{{a,b},{c,d}}`, `[5:6]={a,b}`, `{""}`, `{"k","a\\"}`, `NULL`, `{k}`, "{\u00ff}"} {
		f.Add(seed)
	}
	dsn, _ := setUp(f)
	db := openDB(f, dsn)
	other := openCache(f, dsn, Config{})
	c := openFiltered(f, dsn, Config{MaxStaleness: hour})
	values := 0
	f.Fuzz(func(t *testing.T, keys string) {
		values++
		want := fmt.Sprint(values)
		check(t, c.Set(t.Context(), "k", "old", 0))
		tx, err := db.BeginTx(t.Context(), nil)
		check(t, err)
		defer tx.Rollback()
		if _, err := tx.Exec(`INSERT INTO cache_change (keys) VALUES ($1::text[])`, keys); err != nil {
			if sqlState(err) == "" {
				t.Fatal(err)
			}
			return
		}
		check(t, tx.Commit())
		check(t, other.Set(t.Context(), "k", want, 0))
		if err := c.feed.catchUp(context.Background()); err != nil {
			t.Fatalf("%q: %v", keys, err)
		}
		wantText(t, c, "k", want)
		for _, key := range []string{"a", "b", keys} {
			if found, err := c.Get(t.Context(), "p"+key, nil); found || err != nil && checkKey("p"+key) == nil {
				t.Errorf("%q: got %t, %v", key, found, err)
			}
		}
	})
}

// FuzzSnapshot reads what need not be one; what is one sees what it says.
func FuzzSnapshot(f *testing.F) {
	for _, seed := range []string{"1:2:", "10:20:10,14,15", "", ":", "::", "1:x:", "1:5:2,,3", "9223372036854775807:9223372036854775807:9223372036854775807", "1:-5:-3"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := parseSnapshot(text)
		if err != nil {
			return
		}
		for _, xid := range s.running {
			if s.saw(xid) {
				t.Errorf("%q sees %d, which runs", text, xid)
			}
		}
		if s.saw(s.xmax) {
			t.Errorf("%q sees its xmax", text)
		}
		again, err := parseSnapshot(fmt.Sprintf("0:%d:%s", s.xmax, s.list()))
		if err != nil || !reflect.DeepEqual(again, s) {
			t.Errorf("%q: got %v, %v, want %v", text, again, err, s)
		}
	})
}
