package fastpgcache

import (
	"context"
	"database/sql"
	"fmt"
	"iter"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Keys walks over this user's keys that begin with prefix, in the order of their
// bytes; an empty prefix means all of them. No character of it is special. A key
// that lives throughout the walk comes exactly once, one that comes or goes
// meanwhile at most once. Between the pages that it reads, of 5,000 keys, it holds
// neither connection nor snapshot: the loop may take its time, use the cache, and
// break. An error comes with an empty key, and is the last; it matches ErrInvalidKey
// for a prefix that no key can have.
func (c *Cache) Keys(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		if prefix != "" {
			if err := checkKey(prefix); err != nil {
				yield("", c.fail(ctx, "keys", fmt.Errorf("prefix: %w", err)))
				return
			}
		}
		var page []string
		var err error
		for after := ""; ; {
			if page, err = c.keys(ctx, prefix, after, page[:0]); err != nil {
				yield("", c.fail(ctx, "keys", err))
				return
			}
			for _, after = range page {
				if !yield(after, nil) {
					return
				}
			}
			if len(page) < keysPage {
				return
			}
		}
	}
}

// keysPage is the LIMIT of keysSQL. The planner must not know it: it would sort the
// rest of a table that was never analysed for each page.
const keysPage = 5000

const keysSQL = `
SELECT key FROM {schema}.cache
WHERE user_id = {user} AND key >= $1 AND key > $2 AND key < $3
  AND (expires_at IS NULL OR expires_at > statement_timestamp())
ORDER BY user_id, key LIMIT (SELECT 5000)`

// beyondKeys, after any prefix, is greater than every key with that prefix.
var beyondKeys = strings.Repeat(string(unicode.MaxRune), maxKeyBytes/utf8.UTFMax+1)

// keys appends to page the keys that begin with prefix and come after the key after.
func (c *Cache) keys(ctx context.Context, prefix, after string, page []string) ([]string, error) {
	err := c.query(ctx, c.stmt.keys, c.args(prefix, after, prefix+beyondKeys), func(rows *sql.Rows) error {
		var key string
		if err := rows.Scan(&key); err != nil {
			return err
		}
		if n := len(page); n > 0 && key <= page[n-1] {
			page = page[:0] // the statement runs again
		}
		page = append(page, key)
		return nil
	})
	return page, err
}

// Clear removes this user's entries, and nobody else's, and returns how many there
// were; expired ones go, too, but do not count. It works in short statements of
// 2,000 entries each, so it holds nobody up, and entries that are written meanwhile
// may stay. When it fails, removed counts what was removed until then.
func (c *Cache) Clear(ctx context.Context) (removed int, err error) {
	// First the leases, so that what is being loaded is not stored behind us.
	_, err = c.exec(ctx, c.stmt.clearLeases, c.args()...)
	for after := new(string); after != nil && err == nil; {
		var n int
		n, after, err = c.clear(ctx, *after)
		removed += n
	}
	c.stats.deletes.Add(int64(removed))
	return removed, c.fail(ctx, "clear", err)
}

const clearLeasesSQL = `
WITH lease AS MATERIALIZED (
  SELECT key FROM {schema}.cache_lease WHERE user_id = {user} ORDER BY user_id, key FOR UPDATE)
DELETE FROM {schema}.cache_lease WHERE user_id = {user} AND key IN (SELECT key FROM lease)`

// Concurrent statements lock entries in the order of the primary key, or they could
// deadlock. A LIMIT that the planner knew would have it sort all that is left for each
// page while a table is not analysed yet.
const clearSQL = `
WITH page AS MATERIALIZED (
  SELECT ctid, key FROM {schema}.cache WHERE user_id = {user} AND key > $1 AND key < $2
  ORDER BY user_id, key LIMIT (SELECT 2000) FOR UPDATE),
removed AS (
  DELETE FROM {schema}.cache WHERE ctid = ANY (ARRAY(SELECT ctid FROM page))
  RETURNING expires_at IS NULL OR expires_at > statement_timestamp() AS live)
SELECT (SELECT count(*) FROM removed WHERE live), (SELECT max(key) FROM page)`

// clear removes the first entries whose key comes after the key after, and returns
// how many were live, and the last of their keys; nil when there were none.
func (c *Cache) clear(ctx context.Context, after string) (removed int, last *string, err error) {
	_, err = c.row(ctx, c.stmt.clear, c.args(after, beyondKeys), &removed, &last)
	return removed, last, err
}
