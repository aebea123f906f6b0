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

// walks is the operations on all keys of a user.
type walks struct{ keys, clear, clearLeases *statement }

func newWalks(c *Cache) walks {
	ss := c.statements
	return walks{keys: ss.new(keysSQL), clear: ss.new(clearSQL), clearLeases: ss.new(clearLeasesSQL)}
}

// Keys walks over this user's keys that begin with prefix, in the order of their
// bytes. An empty prefix means all of them; no character is special. A key that lives
// throughout the walk comes exactly once, one that comes or goes meanwhile at most once.
//
// Keys reads pages of 5,000 keys. Between them it holds neither connection nor snapshot:
// the loop may take its time, use the cache, and break. An error comes with an empty
// key, and is the last. It matches ErrInvalidKey for a prefix that no key can have.
func (c *Cache) Keys(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		if prefix != "" {
			if err := checkKey(prefix); err != nil {
				yield("", c.fail(ctx, "keys", fmt.Errorf("prefix: %w", err)))
				return
			}
		}
		for key, err := range c.merged(ctx, func(c *Cache) iter.Seq2[string, error] { return c.walk(ctx, prefix) }) {
			if !yield(key, c.fail(ctx, "keys", err)) {
				return
			}
		}
	}
}

// walk is Keys, but for the form of its errors.
func (c *Cache) walk(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for after := ""; ; {
			page, err := query(ctx, c, c.walks.keys, c.args(prefix, after, prefix+beyondKeys), scanKey)
			if err != nil {
				yield("", err)
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

// keysPage is the LIMIT of keysSQL.
const keysPage = 5000

// While a table is not analysed yet, the planner would sort all that is left for each
// page. So the LIMIT is a query, whose result it does not know; and the end compares rows,
// since it takes two bounds of one column for a short range.
const keysSQL = `
SELECT key FROM {schema}.cache
WHERE user_id = {user} AND key >= $1 AND key > $2 AND (user_id, key) < ({user}, $3)
  AND (expires_at <= statement_timestamp()) IS NOT TRUE
ORDER BY user_id, key LIMIT (SELECT 5000)`

// beyondKeys, after any prefix, is greater than every key with that prefix.
var beyondKeys = strings.Repeat(string(unicode.MaxRune), maxKeyBytes/utf8.UTFMax+1)

// Clear removes this user's entries, and nobody else's, and returns how many there
// were. Expired ones go, too, but do not count. Each statement removes 2,000 at most, so
// that nobody is held up. Entries that are written meanwhile may stay. When it fails,
// removed counts what was removed until then.
func (c *Cache) Clear(ctx context.Context) (removed int, err error) {
	removed, err = c.removePrefix(ctx, "")
	return removed, c.fail(ctx, "clear", err)
}

// DeletePrefix removes this user's entries whose keys begin with prefix, as Clear
// removes all, and returns how many there were. No character of prefix is special. What
// is being loaded under such a key is not stored. With an empty prefix, or one that no
// key can have, the error matches ErrInvalidKey.
func (c *Cache) DeletePrefix(ctx context.Context, prefix string) (deleted int, err error) {
	if err = checkKey(prefix); err != nil {
		err = fmt.Errorf("prefix: %w", err)
	} else {
		deleted, err = c.removePrefix(ctx, prefix)
	}
	return deleted, c.fail(ctx, "delete prefix", err)
}

func (c *Cache) removePrefix(ctx context.Context, prefix string) (removed int, err error) {
	counts, err := everywhere(ctx, c, func(c *Cache) (int, error) { return c.removeAll(ctx, prefix) })
	return sum(counts), err
}

// removeAll removes the leases first, so that what is being loaded is not stored
// behind us.
func (c *Cache) removeAll(ctx context.Context, prefix string) (removed int, err error) {
	w := c.writeAll()
	defer w.done()
	_, err = c.exec(ctx, c.walks.clearLeases, c.args(prefix, prefix+beyondKeys)...)
	for after, tries := new(string), 1; after != nil && err == nil; {
		var page cleared
		page, _, err = first(query(ctx, c, c.walks.clear, c.args(prefix, *after, prefix+beyondKeys), func(rows *sql.Rows) (page cleared, err error) {
			return page, rows.Scan(&page.live, &page.last, &page.again)
		}))
		removed += page.live
		if tries++; !page.again || tries > maxPageTries {
			after, tries = page.last, 1
		}
	}
	c.stats.deletes.Add(int64(removed))
	return removed, err
}

// maxPageTries is how often a page comes whose entries others keep changing.
const maxPageTries = 4

// cleared is a page of entries that were removed.
type cleared struct {
	live  int
	last  *string // of their keys; nil: there were none
	again bool    // some of them have stayed
}

const clearLeasesSQL = `
WITH lease AS MATERIALIZED (
  SELECT key FROM {schema}.cache_lease WHERE user_id = {user} AND key >= $1 AND key < $2 ORDER BY user_id, key FOR UPDATE)
DELETE FROM {schema}.cache_lease WHERE user_id = {user} AND key IN (SELECT key FROM lease)`

// Concurrent statements lock entries in the order of the primary key, or they could
// deadlock. A row that a concurrent write has changed since the statement began, even
// its TTL alone, is locked but not deleted: the page comes again.
const clearSQL = `/*fastpgcache*/
WITH page AS MATERIALIZED (
  SELECT ctid, key FROM {schema}.cache WHERE user_id = {user} AND key >= $1 AND key > $2 AND (user_id, key) < ({user}, $3)
  ORDER BY user_id, key LIMIT (SELECT 2000) FOR UPDATE),
removed AS (
  DELETE FROM {schema}.cache c USING page WHERE c.ctid = page.ctid
  RETURNING c.key, (c.expires_at <= statement_timestamp()) IS NOT TRUE AS live),
change AS (
  INSERT INTO {schema}.cache_change (user_id, keys)
  SELECT {user}, array_agg(key) FROM removed WHERE live HAVING count(*) > 0)
SELECT (SELECT count(*) FROM removed WHERE live), (SELECT max(key) FROM page),
  (SELECT count(*) FROM page) > (SELECT count(*) FROM removed)`
