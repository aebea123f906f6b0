package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/lib/pq"
)

// rights is who may do what. Those of no cache, or of the Python library's, are nil.
type rights struct {
	Grantee []string `json:"grantee"` // who may use it, each login confined
	Service []string `json:"service"` // who may act for any user
	Limits  []limit  `json:"limits"`
}

// limit is what the entries of a user may take, or of each user without one of their own.
type limit struct {
	User     string `json:"user"`
	MaxBytes int64  `json:"max_bytes"`
}

const rolesSQL = `
SELECT CASE WHEN r = 0 THEN 'PUBLIC' ELSE r::regrole::text END
FROM pg_policy p, unnest(p.polroles) r WHERE p.polrelid = $1::regclass AND p.polname = $2`

const limitsSQL = `SELECT user_id, max_bytes FROM %s.cache_limit ORDER BY user_id LIMIT 1000`

// rights looks them up.
func (s *server) rights(ctx context.Context, t table) (r rights, err error) {
	if t.version == 0 {
		return rights{}, nil
	}
	r = rights{Grantee: []string{}, Service: []string{}, Limits: []limit{}}
	for policy, roles := range map[string]*[]string{"cache_own_rows": &r.Grantee, "cache_any_rows": &r.Service} {
		rows, err := s.QueryContext(ctx, rolesSQL, s.schema+".cache", policy)
		if err != nil {
			return rights{}, err
		}
		found, err := texts(rows)
		if err != nil {
			return rights{}, err
		}
		*roles = append(*roles, found...)
	}
	rows, err := s.QueryContext(ctx, fmt.Sprintf(limitsSQL, s.schema))
	if err != nil {
		return rights{}, err
	}
	defer rows.Close()
	for rows.Next() {
		var l limit
		if err := rows.Scan(&l.User, &l.MaxBytes); err != nil {
			return rights{}, err
		}
		r.Limits = append(r.Limits, l)
	}
	return r, rows.Err()
}

// sentences say them to people; they are empty where there are none.
func (r rights) sentences() (s [3]string) {
	if r.Grantee == nil {
		return s
	}
	who := func(roles []string) string {
		if len(roles) == 0 {
			return "nobody but the owner"
		}
		named := make([]string, len(roles))
		for i, role := range roles {
			if named[i] = "role " + role; role == "PUBLIC" {
				named[i] = "every role"
			}
		}
		return strings.Join(named, ", ")
	}
	return [3]string{
		"May use it, each login confined to its own entries: " + who(r.Grantee),
		"May act for any user: " + who(r.Service),
		"Limit: " + r.limitText(),
	}
}

// limitText says what the entries of a user may take.
func (r rights) limitText() string {
	text, others := "none", []string{}
	for _, l := range r.Limits {
		if l.User == "" {
			text = bytes(l.MaxBytes) + " a user"
		} else {
			others = append(others, fmt.Sprintf("%s %s", pq.QuoteIdentifier(l.User), bytes(l.MaxBytes)))
		}
	}
	if len(others) > 5 {
		others = append(others[:5], "…")
	}
	return strings.Join(append([]string{text}, others...), ", ")
}

func nameList(roles []string) string {
	if len(roles) == 0 {
		return "nobody"
	}
	return strings.Join(roles, ", ")
}
