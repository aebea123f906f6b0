package main

import "context"

const (
	hasCitusSQL    = `SELECT to_regclass('pg_catalog.pg_dist_schema') IS NOT NULL`
	distributedSQL = `
SELECT EXISTS (SELECT FROM pg_catalog.pg_dist_schema d JOIN pg_catalog.pg_namespace n ON n.oid = d.schemaid WHERE n.nspname = $1)`
)

// distributed reports whether Citus keeps a schema on one of its nodes.
func (s *server) distributed(ctx context.Context, schema string) (yes bool, err error) {
	if err = s.QueryRowContext(ctx, hasCitusSQL).Scan(&yes); err == nil && yes {
		err = s.QueryRowContext(ctx, distributedSQL, schema).Scan(&yes)
	}
	return yes, err
}

// PostgreSQL's own functions know nothing of what is on another node.
const citusSizesSQL = `
SELECT citus_total_relation_size(cache), citus_relation_size(cache), citus_total_relation_size(cache) - citus_table_size(cache),
  citus_total_relation_size(change)
FROM (SELECT $1::regclass AS cache, $2::regclass AS change) c`

// citusSizes looks up what the tables take on their node.
func (s *server) citusSizes(ctx context.Context, st *status) error {
	return s.QueryRowContext(ctx, citusSizesSQL, s.schema+".cache", s.schema+".cache_change").
		Scan(&st.Bytes, &st.TableBytes, &st.IndexBytes, &st.FeedBytes)
}
