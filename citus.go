package fastpgcache

import "regexp"

// citusText is what text becomes where Citus keeps the schema on one of its nodes. It plans
// each run anew, so nothing is gained by hiding from the planner how long an array is.
func citusText(text string) string {
	if other, ok := citusSQL[text]; ok {
		text = other
	}
	return arrayQuery.ReplaceAllString(text, "$1")
}

var arrayQuery = regexp.MustCompile(`\(SELECT (\$[0-9]+::[a-z]+\[\])\)`)

// citusSQL is what other texts become where Citus keeps the schema on one of its nodes.
// They take the same arguments and give the same columns. Citus sends each part of a WITH
// that writes to the node by itself, one after the other, so that each sees what those
// before it did. It does not
//
//   - join rows by ctid: rows are locked in the order of their keys, and then found by key
//   - run a trigger, so there is no feed, and no mark
//   - send a node the types of arguments that a part leaves out: a WITH that writes ends with
//     a SELECT
//   - take a clock in RETURNING, or after ON CONFLICT: created_at has the time there
var citusSQL = map[string]string{
	pingSQL: `
WITH entry AS MATERIALIZED (SELECT key FROM {schema}.cache WHERE user_id = {user} AND key = ''::text),
lease AS MATERIALIZED (SELECT key FROM {schema}.cache_lease WHERE user_id = {user} AND key = ''::text),
may AS MATERIALIZED (
  SELECT {user} = current_role OR NOT row_security_active(to_regclass($1)::oid)
    OR EXISTS (SELECT FROM pg_policy, unnest(polroles) r(role)
      WHERE polrelid = to_regclass($1)::oid AND polname = 'cache_any_rows'::name AND pg_has_role(r.role, 'USAGE'::text)) AS may)
SELECT may FROM may WHERE (SELECT count(*) FROM entry) = 0::bigint AND (SELECT count(*) FROM lease) = 0::bigint`,

	setSQL: `
INSERT INTO {schema}.cache (user_id, key, value, value_bytes, expires_at)
VALUES ({user}, $1, $2, $3, statement_timestamp() + $4::float8 * interval '1 microsecond')
ON CONFLICT (user_id, key) DO UPDATE
SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at`,

	setManySQL: `
INSERT INTO {schema}.cache (user_id, key, value, value_bytes, expires_at)
SELECT {user}, e.key, e.value, e.value_bytes, statement_timestamp() + e.ttl::float8 * interval '1 microsecond'
FROM unnest($1::text[], $2::text[], $3::bytea[], $4::bigint[]) e(key, value, value_bytes, ttl)
ON CONFLICT (user_id, key) DO UPDATE
SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at`,

	deleteSQL: `
WITH lease AS (DELETE FROM {schema}.cache_lease WHERE user_id = {user} AND key = $1 RETURNING key),
deleted AS (
  DELETE FROM {schema}.cache
  WHERE user_id = {user} AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp() OR expires_at = '-infinity'::timestamptz)
  RETURNING expires_at)
SELECT false, EXISTS (SELECT FROM deleted WHERE expires_at IS DISTINCT FROM '-infinity'::timestamptz)`,

	deleteManySQL: `
WITH held AS (
  SELECT key FROM {schema}.cache_lease WHERE user_id = {user} AND key = ANY ($1::text[]) ORDER BY user_id, key FOR UPDATE),
lease AS (
  DELETE FROM {schema}.cache_lease WHERE user_id = {user} AND key IN (SELECT key FROM held) RETURNING key),
locked AS (
  SELECT key FROM {schema}.cache
  WHERE user_id = {user} AND key = ANY ($1::text[])
    AND (expires_at IS NULL OR expires_at > statement_timestamp() OR expires_at = '-infinity'::timestamptz)
  ORDER BY user_id, key FOR UPDATE),
deleted AS (
  DELETE FROM {schema}.cache WHERE user_id = {user} AND key IN (SELECT key FROM locked) RETURNING key, expires_at)
SELECT key, expires_at IS DISTINCT FROM '-infinity'::timestamptz FROM deleted`,

	addSQL: `
INSERT INTO {schema}.cache AS c (user_id, key, value, value_bytes, expires_at, created_at)
VALUES ({user}, $1, $2, $3, statement_timestamp() + $4::float8 * interval '1 microsecond', statement_timestamp())
ON CONFLICT (user_id, key) DO UPDATE
SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at
WHERE c.expires_at <= excluded.created_at
RETURNING 0::bigint, 0::float8`,

	incrementSQL: `
INSERT INTO {schema}.cache AS c (user_id, key, value, expires_at, created_at)
VALUES ({user}, $1, $2::bigint::text, statement_timestamp() + $3::float8 * interval '1 microsecond', statement_timestamp())
ON CONFLICT (user_id, key) DO UPDATE
SET value = CASE WHEN c.expires_at <= excluded.created_at THEN excluded.value
    ELSE (c.value::numeric + excluded.value::numeric)::text END,
  value_bytes = NULL,
  expires_at = CASE WHEN c.expires_at <= excluded.created_at THEN excluded.expires_at ELSE c.expires_at END
WHERE c.expires_at <= excluded.created_at
  OR CASE WHEN c.value ~ '^(0|-?[1-9][0-9]{0,18})$' THEN
    c.value::numeric BETWEEN '-9223372036854775808'::numeric AND '9223372036854775807'::numeric
    AND c.value::numeric + excluded.value::numeric BETWEEN '-9223372036854775808'::numeric AND '9223372036854775807'::numeric END
RETURNING value`,

	takeSQL: `
WITH lease AS (DELETE FROM {schema}.cache_lease WHERE user_id = {user} AND key = $1 RETURNING key),
taken AS (
  DELETE FROM {schema}.cache
  WHERE user_id = {user} AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp() OR expires_at = '-infinity'::timestamptz)
  RETURNING value, value_bytes, expires_at)
SELECT value, value_bytes FROM taken WHERE expires_at IS DISTINCT FROM '-infinity'::timestamptz`,

	expireSQL: `
UPDATE {schema}.cache SET expires_at = statement_timestamp() + $2::float8 * interval '1 microsecond'
WHERE user_id = {user} AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp())`,

	persistSQL: `
UPDATE {schema}.cache SET expires_at = NULL
WHERE user_id = {user} AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp())`,

	clearLeasesSQL: `
WITH lease AS (
  SELECT key FROM {schema}.cache_lease WHERE user_id = {user} AND key >= $1 AND key < $2 ORDER BY user_id, key FOR UPDATE)
DELETE FROM {schema}.cache_lease WHERE user_id = {user} AND key IN (SELECT key FROM lease)`,

	clearSQL: `
WITH page AS (
  SELECT key FROM {schema}.cache WHERE user_id = {user} AND key >= $1 AND key > $2 AND key < $3
  ORDER BY user_id, key LIMIT (SELECT 2000) FOR UPDATE),
removed AS (
  DELETE FROM {schema}.cache WHERE user_id = {user} AND key IN (SELECT key FROM page) RETURNING expires_at)
SELECT (SELECT count(*) FROM removed WHERE (expires_at <= statement_timestamp()) IS NOT TRUE), (SELECT max(key) FROM page), false`,

	// A lease that is there ends by the time of this statement: the difference of two ends
	// is that of two times. One that ends more than half a minute later than ours was given
	// before a clock was set back.
	acquireSQL: `
WITH free AS MATERIALIZED (
  SELECT k.key FROM unnest($1::text[]) k(key)
  WHERE k.key NOT IN (SELECT key FROM {schema}.cache WHERE user_id = {user} AND key = ANY ($1::text[]) AND ` + absentSQL + `)),
taken AS (
  INSERT INTO {schema}.cache_lease AS l (user_id, key, holder, expires_at, xid)
  SELECT {user}, key, $2, statement_timestamp() + $3::float8 * interval '1 microsecond', 0::bigint
  FROM free ORDER BY key
  ON CONFLICT (user_id, key) DO UPDATE SET holder = excluded.holder, expires_at = excluded.expires_at
  WHERE excluded.expires_at - l.expires_at NOT BETWEEN interval '-30 seconds' AND $3::float8 * interval '1 microsecond'
  RETURNING key)
SELECT key FROM taken`,

	renewSQL: `
WITH locked AS (
  SELECT key FROM {schema}.cache_lease WHERE user_id = {user} AND key = ANY ($1::text[]) AND holder = $2 ORDER BY user_id, key FOR UPDATE)
UPDATE {schema}.cache_lease SET expires_at = statement_timestamp() + $3::float8 * interval '1 microsecond'
WHERE user_id = {user} AND key IN (SELECT key FROM locked)`,

	releaseSQL: `
WITH locked AS (
  SELECT key FROM {schema}.cache_lease WHERE user_id = {user} AND key = ANY ($1::text[]) AND holder = $2 ORDER BY user_id, key FOR UPDATE)
DELETE FROM {schema}.cache_lease WHERE user_id = {user} AND key IN (SELECT key FROM locked)`,

	storeSQL: `
WITH locked AS (
  SELECT key FROM {schema}.cache_lease WHERE user_id = {user} AND key = ANY ($1::text[]) AND holder = $2 ORDER BY user_id, key FOR UPDATE),
lease AS (
  DELETE FROM {schema}.cache_lease WHERE user_id = {user} AND key IN (SELECT key FROM locked) RETURNING key),
loaded AS MATERIALIZED (
  SELECT e.key,
    CASE WHEN e.ttl < 0 THEN (date_part('epoch'::text, statement_timestamp()) - e.ttl::float8 / '1000000'::float8)::text
      ELSE e.value END AS value,
    e.value_bytes,
    CASE WHEN e.ttl < 0 THEN '-infinity'::timestamptz
      ELSE statement_timestamp() + e.ttl::float8 * interval '1 microsecond' END AS expires_at
  FROM unnest($3::text[], $4::text[], $5::bytea[], $6::bigint[]) e(key, value, value_bytes, ttl)
  WHERE (e.key IN (SELECT key FROM lease)) IS TRUE),
stored AS (
  INSERT INTO {schema}.cache AS c (user_id, key, value, value_bytes, expires_at)
  SELECT {user}, key, value, value_bytes, expires_at FROM loaded ORDER BY key
  ON CONFLICT (user_id, key) DO UPDATE
  SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at
  WHERE c.xmin::text = ANY ($7::text[])
  RETURNING key)
SELECT lease.key, stored.key IS NOT NULL, 0::bigint, 0::float8
FROM lease LEFT JOIN stored ON stored.key = lease.key`,

	rememberSQL: `
INSERT INTO {schema}.cache (user_id, key, value, value_bytes, expires_at)
SELECT {user}, k.key, (date_part('epoch'::text, statement_timestamp()) + k.ttl::float8 / '1000000'::float8)::text, NULL::bytea,
  '-infinity'::timestamptz
FROM unnest($1::text[], $2::bigint[]) k(key, ttl)
ON CONFLICT (user_id, key) DO UPDATE
SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at`,

	// Only Sweep asks, and for nothing but the epoch.
	newsSQL: `
SELECT NULL::text, NULL::bigint, e.id, '1:1:'::text, 0::float8, NULL::text
FROM (SELECT $1::bigint, $2::text, $3::text, $4::text) one
LEFT JOIN (SELECT id::text AS id FROM {schema}.cache_epoch WHERE user_id = {user}) e ON true`,
}
