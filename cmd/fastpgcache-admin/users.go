package main

import (
	"context"
	"fmt"
	"time"
)

// user is what the entries of one are, of those that the role may see.
type user struct {
	User    string     `json:"user"`
	Live    int64      `json:"live"`
	Expired int64      `json:"expired"`
	Absent  int64      `json:"absent"`        // remembered as such
	Bytes   int64      `json:"bytes"`         // keys and values of live ones, as they are stored
	Oldest  *time.Time `json:"oldest"`        // when the first of the live ones was created
	Counted int64      `json:"counted_bytes"` // of live ones, with their rows, as the limit counts them
	Limit   *int64     `json:"max_bytes"`     // theirs, or that of everybody
	Evicted int64      `json:"evicted"`       // since the cache was set up, or PostgreSQL crashed
}

// users is some of them, and what all of them have together.
type users struct {
	Live    int64  `json:"live"`
	Expired int64  `json:"expired"`
	Absent  int64  `json:"absent"`
	Stored  int64  `json:"stored_bytes"`
	Count   int64  `json:"user_count"`
	Users   []user `json:"users"`
}

// Orders of users.
const (
	byEntries = "live + expired DESC"
	byBytes   = "bytes DESC"
	byAge     = "oldest NULLS LAST"
)

const usersSQL = `
SELECT user_id, live, expired, absent, bytes, oldest,
  sum(live) OVER (), sum(expired) OVER (), sum(absent) OVER (), sum(bytes) OVER (), count(*) OVER (), %[4]s
FROM (
  SELECT user_id,
    count(*) FILTER (WHERE expires_at IS NULL OR expires_at > statement_timestamp()) AS live,
    count(*) FILTER (WHERE expires_at <= statement_timestamp() AND expires_at > '-infinity') AS expired,
    count(*) FILTER (WHERE expires_at = '-infinity') AS absent,
    coalesce(sum(%[2]s) FILTER (WHERE expires_at IS NULL OR expires_at > statement_timestamp()), 0) AS bytes,
    min(created_at) FILTER (WHERE expires_at IS NULL OR expires_at > statement_timestamp()) AS oldest
  FROM %[1]s.cache WHERE $1 IN ('', user_id) GROUP BY user_id) users
ORDER BY %[3]s, user_id LIMIT $2`

// limited is the limit of each user, and how many entries were evicted.
func (s *server) limited(t table) string {
	if t.version == 0 {
		return "NULL::bigint, 0::bigint"
	}
	return fmt.Sprintf(`(SELECT max_bytes FROM %[1]s.cache_limit l WHERE l.user_id IN (users.user_id, '') ORDER BY l.user_id DESC LIMIT 1),
  coalesce((SELECT evicted FROM %[1]s.cache_epoch e WHERE e.user_id = users.user_id), 0)`, s.schema)
}

// rowBytes is what the limit counts for an entry's row.
const rowBytes = 128

// entryBytes is what an entry takes, as it is stored.
func (t table) entryBytes() string {
	if t.version == 0 {
		return "octet_length(key) + pg_column_size(value)"
	}
	return "octet_length(key) + coalesce(pg_column_size(value), 0) + coalesce(pg_column_size(value_bytes), 0)"
}

// users looks up the first of all users, or the one of a label.
func (s *server) users(ctx context.Context, t table, label, order string, limit int) (all users, err error) {
	all.Users = []user{}
	rows, err := s.QueryContext(ctx, fmt.Sprintf(usersSQL, s.schema, t.entryBytes(), order, s.limited(t)), label, limit)
	if err != nil {
		return users{}, err
	}
	defer rows.Close()
	for rows.Next() {
		var u user
		if err := rows.Scan(&u.User, &u.Live, &u.Expired, &u.Absent, &u.Bytes, &u.Oldest,
			&all.Live, &all.Expired, &all.Absent, &all.Stored, &all.Count, &u.Limit, &u.Evicted); err != nil {
			return users{}, err
		}
		u.Counted = u.Bytes + rowBytes*u.Live
		all.Users = append(all.Users, u)
	}
	return all, rows.Err()
}

// more says that there are others than those listed, or nothing.
func (all users) more() string {
	if n := all.Count - int64(len(all.Users)); n > 0 {
		return "  and " + count(n, "user more", "users more") + "\n"
	}
	return ""
}

// limitText is how much of the limit is taken, with the rows, and what had to go for it.
func (u user) limitText() string {
	if u.Limit == nil {
		return ""
	}
	return fmt.Sprintf("; with rows %s of %s, %d evicted", bytes(u.Counted), bytes(*u.Limit), u.Evicted)
}
