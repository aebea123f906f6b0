package main

import (
	"context"
	"fmt"
	"io"
	"text/tabwriter"
	"time"
)

// topShown is how many users and entries top lists, if it is not told.
const topShown = 10

// top is the users that take most, and the largest entries; or the oldest of both.
type top struct {
	Role     string `json:"role"`
	Confined bool   `json:"confined"` // to the entries of Role
	users
	Entries []topEntry `json:"entries"`

	now time.Time
}

type topEntry struct {
	User    string     `json:"user"`
	Key     string     `json:"key"`
	Bytes   int64      `json:"bytes"` // key and value, as they are stored
	Created time.Time  `json:"created_at"`
	Expires *time.Time `json:"expires_at"`
}

const topSQL = `
SELECT user_id, key, %[2]s AS bytes, created_at, CASE WHEN isfinite(expires_at) THEN expires_at END
FROM %[1]s.cache WHERE (expires_at IS NULL OR expires_at > statement_timestamp()) AND $1 IN ('', user_id)
ORDER BY %[3]s, user_id, key LIMIT $2`

// runTop reads the whole table, but no long value.
func runTop(ctx context.Context, o *options, out, _ io.Writer) error {
	s, t, err := open(ctx, o)
	if err != nil {
		return err
	}
	defer s.Close()
	limit, order, entryOrder := o.limit, byBytes, byBytes
	if limit == 0 {
		limit = topShown
	}
	if o.by == "age" {
		order, entryOrder = byAge, "created_at"
	}
	all := &top{Entries: []topEntry{}}
	err = s.QueryRowContext(ctx, "SELECT current_user, row_security_active($1::regclass), statement_timestamp()", s.schema+".cache").
		Scan(&all.Role, &all.Confined, &all.now)
	if err != nil {
		return err
	}
	if all.users, err = s.users(ctx, t, o.label, order, limit); err != nil {
		return err
	}
	rows, err := s.QueryContext(ctx, fmt.Sprintf(topSQL, s.schema, t.entryBytes(), entryOrder), o.label, limit)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var e topEntry
		if err := rows.Scan(&e.User, &e.Key, &e.Bytes, &e.Created, &e.Expires); err != nil {
			return err
		}
		all.Entries = append(all.Entries, e)
	}
	if err := rows.Err(); err != nil {
		return err
	}
	return o.tell(out, all)
}

func (all *top) print(out io.Writer) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	defer w.Flush()
	if len(all.Users) == 0 {
		fmt.Fprintf(w, "No entries%s.\n", seenBy(all.Confined, all.Role))
		return
	}
	fmt.Fprintf(w, "users%s\tlive\texpired\tbytes\tshare\toldest\n", seenBy(all.Confined, all.Role))
	for _, u := range all.Users {
		oldest := "-"
		if u.Oldest != nil {
			oldest = span(all.now.Sub(*u.Oldest))
		}
		fmt.Fprintf(w, "  %s\t%d\t%d\t%s\t%s\t%s\n", printable(u.User), u.Live, u.Expired, bytes(u.Bytes), share(u.Bytes, all.Stored), oldest)
	}
	fmt.Fprint(w, all.more())
	w.Flush() // the columns of the next table have widths of their own
	fmt.Fprintf(w, "\nentries\tage\texpires in\tuser\tkey\n")
	for _, e := range all.Entries {
		expires := "never"
		if e.Expires != nil {
			expires = span(e.Expires.Sub(all.now))
		}
		fmt.Fprintf(w, "  %s\t%s\t%s\t%s\t%s\n", bytes(e.Bytes), span(all.now.Sub(e.Created)), expires, printable(e.User), printable(e.Key))
	}
}

// seenBy tells whose entries a list is of, if not everybody's.
func seenBy(confined bool, role string) string {
	if !confined {
		return ""
	}
	return fmt.Sprintf(" (those that %s may see)", role)
}
