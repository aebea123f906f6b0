-- +goose Up
-- fastpgcache: the cache's tables, row-level security, triggers and functions.
--
--   psql -v ON_ERROR_STOP=1 -f migrations.sql
--
-- It is a single DO statement, so every tool runs it whole or not at all, and goose,
-- golang-migrate and Flyway take this file as it is. It may be run again at any time:
-- it creates what is missing, upgrades the table of the Python library with every
-- entry kept, and waits for no user of the cache when there is nothing to do.
-- PostgreSQL 14 or newer.
--
-- Settings, each optional, steer it, for example by
-- PGOPTIONS='-c fastpgcache.grantee=app -c fastpgcache.service=worker'. What the
-- command "fastpgcache-admin sql" prints is this file with the settings in it.
--
--   fastpgcache.schema     where everything is created, the schema itself too if
--                          absent. Defaults to the first of the search path
--   fastpgcache.grantee    the role that may use the cache, each login confined to
--                          its own entries. Or public, or none. Defaults to who may
--                          already, on the first set-up to public
--   fastpgcache.service    the role that may act for any user, or none. Defaults to
--                          who may already, on the first set-up to none
--   fastpgcache.max_bytes  what each user's entries may take. Negative is no limit.
--                          Defaults to the limit that there is
--   fastpgcache.citus      on: where the database has the extension citus, have it keep
--                          the schema on one of its nodes. What it has stays there
--   fastpgcache.force      on: delete every entry
--
-- Errors of its own: FPG01 something else bears one of the names, or was attached to
-- the cache, FPG02 an object belongs to a role that is not to be trusted with it,
-- FPG03 this server or database will not do.
--
-- +goose StatementBegin
DO $setup$
-- A type is looked up before the first statement runs, hence the schema before each.
DECLARE
  path       constant pg_catalog.text := pg_catalog.current_setting('search_path');
  timeout    constant pg_catalog.text := pg_catalog.current_setting('lock_timeout');
  quoted     constant pg_catalog.text := pg_catalog.current_setting('quote_all_identifiers');
  target     pg_catalog.text := pg_catalog.current_schema();
  space      pg_catalog.oid;    -- of the schema
  me         pg_catalog.oid;    -- whose rights everything here has
  force      boolean;
  max_bytes  bigint;            -- NULL: as it is
  limit_was  bigint;
  citus      boolean;           -- to be distributed
  remote     boolean := false;  -- it is: the tables are on one of Citus' nodes
  first      boolean;           -- whether this is no cache yet
  there      pg_catalog.text[]; -- names of the functions that were there
  own        pg_catalog.oid[];  -- who may use it, confined; 0 is PUBLIC
  own_was    pg_catalog.oid[];
  whole      pg_catalog.oid[];  -- who may act for any user
  whole_was  pg_catalog.oid[];
  tables     constant pg_catalog.text[] := ARRAY['cache_limit', 'cache_lease', 'cache', 'cache_change', 'cache_epoch'];
  shared     constant pg_catalog.text[] := ARRAY['cache_lease', 'cache', 'cache_change', 'cache_epoch'];  -- by rows
  functions  constant pg_catalog.text[] := ARRAY[
    'cache_set(p_user_id text, p_key text, p_value text, p_ttl_seconds integer) boolean',
    'cache_get(p_user_id text, p_key text) text',
    'cache_delete(p_user_id text, p_key text) boolean',
    'cache_exists(p_user_id text, p_key text) boolean',
    'cache_ttl(p_user_id text, p_key text) integer',
    'cache_cleanup() integer',
    'cache_walk(p_position text, p_every interval, OUT removed integer, OUT evicted integer, OUT next_position text) record',
    'cache_fit(p_user_id text, p_bite integer, OUT removed integer, OUT evicted integer, OUT next_bite integer) record',
    'cache_trim(p_user_id text, p_rows integer) integer',
    'cache_begin(p_user_id text) void',
    'cache_changed() trigger',
    'cache_moved() trigger',
    'cache_deleted() trigger'];
  cache      pg_catalog.regclass;
  version    integer := 0;  -- of the table as it was found; 0 for the Python library's
  owner      pg_catalog.oid;
  users      pg_catalog.text;
  name       pg_catalog.text;
  item       pg_catalog.record;
BEGIN
  -- Whoever may create in a schema of the search path could put functions and
  -- operators there that fit a call better than PostgreSQL's own: nothing here, and
  -- nothing in the functions below, is looked up but in pg_catalog.
  PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
  PERFORM set_config('quote_all_identifiers', 'off', true);  -- what is printed is compared below

  -- fastpgcache-admin sql puts settings here.

  target    := coalesce(nullif(current_setting('fastpgcache.schema', true), ''), target);
  force     := coalesce(nullif(current_setting('fastpgcache.force', true), ''), 'off')::boolean;
  max_bytes := nullif(nullif(current_setting('fastpgcache.max_bytes', true), ''), '0')::bigint;
  citus     := coalesce(nullif(current_setting('fastpgcache.citus', true), ''), 'off')::boolean AND to_regclass('pg_catalog.pg_dist_schema') IS NOT NULL;

  IF current_setting('server_version_num')::integer < 140000 THEN
    RAISE EXCEPTION 'fastpgcache needs PostgreSQL 14 or newer' USING ERRCODE = 'FPG03';
  END IF;
  IF current_setting('server_encoding') NOT IN ('UTF8', 'SQL_ASCII') THEN
    RAISE EXCEPTION 'fastpgcache needs a database whose encoding is UTF8, not %', current_setting('server_encoding')
      USING ERRCODE = 'FPG03';
  END IF;
  IF target IS NULL THEN
    RAISE EXCEPTION 'no schema of the search path exists' USING ERRCODE = 'invalid_schema_name';
  END IF;
  FOR item IN SELECT role FROM (VALUES (current_setting('fastpgcache.grantee', true)), (current_setting('fastpgcache.service', true))) r(role)
              WHERE role <> '' AND role NOT IN ('public', 'none') AND NOT EXISTS (SELECT FROM pg_roles WHERE rolname = role) LOOP
    RAISE EXCEPTION 'role "%" does not exist', item.role USING ERRCODE = 'undefined_object';
  END LOOP;

  IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = target) THEN
    EXECUTE format('CREATE SCHEMA %I', target);
  END IF;
  space := quote_ident(target)::regnamespace;

  -- Who owns the schema, or something in it, can put something else in its place, and
  -- have it run with the rights of whoever comes to set up or to clean up. So each
  -- owner must have those rights already. Then concurrent set-ups go one after the
  -- other: cache_limit is what they wait for, which confined logins may only read, so
  -- that none can hold this lock. What was looked at before is looked at again.
  me := (SELECT oid FROM pg_roles WHERE rolname = current_user);
  FOREACH name IN ARRAY ARRAY['before', 'behind the lock'] LOOP
    FOR item IN
      SELECT format('schema %I', target) AS object, CASE WHEN n.nspowner::regrole::text = 'pg_database_owner'
        THEN (SELECT datdba FROM pg_database WHERE datname = current_database()) ELSE n.nspowner END AS owner, false AS altered
      FROM pg_namespace n WHERE n.oid = space
      UNION ALL
      SELECT format('table %I.%I', target, c.relname), c.relowner, true
      FROM pg_class c WHERE c.relnamespace = space AND c.relname = ANY (tables)
      UNION ALL
      SELECT 'type ' || t.oid::regtype, t.typowner, true FROM pg_type t WHERE t.typnamespace = space AND t.typname = 'cache_keys'
      UNION ALL
      SELECT 'function ' || p.oid::regprocedure, p.proowner, true
      FROM unnest(functions) f
      JOIN pg_proc p ON p.oid = to_regprocedure(format('%I.%s', target, regexp_replace(f, 'p_[a-z_]+ |, OUT [^)]*|[^)]*$', '', 'g')))
    LOOP
      IF NOT pg_has_role(item.owner, me, 'MEMBER') OR item.altered AND NOT pg_has_role(me, item.owner, 'MEMBER') THEN
        RAISE EXCEPTION '% belongs to role %: set up as that role, or in a schema of your own', item.object, item.owner::regrole
          USING ERRCODE = 'FPG02';
      END IF;
    END LOOP;
    EXIT WHEN name <> 'before';

    IF timeout = '0' THEN
      PERFORM set_config('lock_timeout', '10s', true);
    END IF;
    IF to_regclass(format('%I.cache_limit', target)) IS NULL THEN
      EXECUTE format($$
        CREATE TABLE %1$I.cache_limit (
          user_id   text COLLATE "C" PRIMARY KEY,  -- empty: everybody who has no row of their own
          max_bytes bigint NOT NULL CONSTRAINT cache_limit_positive CHECK (max_bytes > 0)
        );
        COMMENT ON TABLE %1$I.cache_limit IS 'fastpgcache limit' $$, target);
    ELSIF EXISTS (SELECT FROM pg_class WHERE relnamespace = space AND relname = 'cache_limit' AND relkind = 'r') THEN
      EXECUTE format('LOCK TABLE %I.cache_limit IN SHARE UPDATE EXCLUSIVE MODE', target);
    END IF;
    -- From here on a lock of ours may hold up users of the cache: better give up soon,
    -- and be run again.
    IF timeout = '0' THEN
      PERFORM set_config('lock_timeout', '300ms', true);
    END IF;
  END LOOP;

  -- What bears our names must be exactly ours, or the Python library's, to the last
  -- index: whatever else was attached to it would run with our rights. Types,
  -- functions and operators that are not PostgreSQL's own are printed with their schema.
  FOR item IN
    WITH relation AS (
      SELECT c.*, format('%I.%I', target, c.relname) AS name FROM pg_class c WHERE c.relnamespace = space AND c.relname = ANY (tables)),
    line AS (
      SELECT r.oid, concat(CASE WHEN r.relkind = 'r' THEN 'table' ELSE concat('relation of kind ', r.relkind) END,
        CASE WHEN r.relispartition OR r.reloftype <> 0 THEN ' of another' END) AS text FROM relation r
      UNION ALL
      SELECT r.oid, concat(a.attname, ' ', format_type(a.atttypid, a.atttypmod),
          CASE WHEN a.attcollation NOT IN (0, 'pg_catalog."default"'::regcollation) THEN ' COLLATE ' || a.attcollation::regcollation END,
          CASE WHEN a.attnotnull THEN ' NOT NULL' END, CASE WHEN a.attidentity <> '' THEN ' IDENTITY' END,
          CASE WHEN a.attgenerated <> '' THEN ' GENERATED' END, ' DEFAULT ' || pg_get_expr(d.adbin, d.adrelid))
      FROM relation r JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped
      LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
      UNION ALL
      SELECT r.oid, replace(pg_get_constraintdef(c.oid), ' NOT VALID', '')
      FROM relation r JOIN pg_constraint c ON c.conrelid = r.oid WHERE c.contype NOT IN ('n', 't')
      UNION ALL
      SELECT r.oid, replace(pg_get_indexdef(i.indexrelid), format(' INDEX %I ON %s USING ', c.relname, r.oid::regclass), ' INDEX ')
      FROM relation r JOIN pg_index i ON i.indrelid = r.oid JOIN pg_class c ON c.oid = i.indexrelid
      UNION ALL
      SELECT r.oid, 'trigger ' || t.tgname FROM relation r JOIN pg_trigger t ON t.tgrelid = r.oid AND NOT t.tgisinternal
      UNION ALL
      SELECT r.oid, 'foreign key ' || c.conname FROM relation r JOIN pg_constraint c ON c.confrelid = r.oid
      UNION ALL
      SELECT r.oid, 'rule ' || w.rulename FROM relation r JOIN pg_rewrite w ON w.ev_class = r.oid
      UNION ALL
      SELECT r.oid, 'policy ' || p.polname FROM relation r JOIN pg_policy p ON p.polrelid = r.oid
      UNION ALL
      SELECT r.oid, 'statistics ' || s.stxname FROM relation r JOIN pg_statistic_ext s ON s.stxrelid = r.oid
      UNION ALL
      SELECT r.oid, 'row-level security' FROM relation r WHERE r.relrowsecurity
      UNION ALL
      SELECT r.oid, 'forced row-level security' FROM relation r WHERE r.relforcerowsecurity
      UNION ALL
      SELECT r.oid, 'inheritance' FROM relation r JOIN pg_inherits h ON r.oid IN (h.inhparent, h.inhrelid)),
    known(relname, lines, others) AS (VALUES
      ('cache', ARRAY['table', 'user_id text COLLATE "C" NOT NULL DEFAULT CURRENT_USER', 'key text COLLATE "C" NOT NULL', 'value text', 'value_bytes bytea',
          'expires_at timestamp with time zone', 'created_at timestamp with time zone NOT NULL DEFAULT now()', 'mark bigint',
          'PRIMARY KEY (user_id, key)', 'CREATE UNIQUE INDEX btree (user_id, key)'],
        ARRAY['row-level security', 'policy cache_own_rows', 'policy cache_any_rows', 'trigger cache_changed_insert', 'trigger cache_changed_update', 'trigger cache_moved', 'trigger cache_deleted']),
      ('cache', ARRAY['table', 'user_id text NOT NULL', 'key text NOT NULL', 'value text NOT NULL',
          'expires_at timestamp with time zone', 'created_at timestamp with time zone DEFAULT now()', 'accessed_at timestamp with time zone DEFAULT now()',
          'PRIMARY KEY (user_id, key)', 'CREATE UNIQUE INDEX btree (user_id, key)'],
        ARRAY['CREATE INDEX btree (expires_at) WHERE (expires_at IS NOT NULL)', 'CREATE INDEX btree (user_id)']),
      ('cache_change', ARRAY['table', 'user_id text COLLATE "C" NOT NULL DEFAULT CURRENT_USER', 'xid bigint NOT NULL DEFAULT txid_current()', concat('keys ', quote_ident(target), '.cache_keys'),
          'CREATE INDEX btree (user_id, xid)'],
        ARRAY['row-level security', 'policy cache_own_rows', 'policy cache_any_rows']),
      ('cache_epoch', ARRAY['table', 'user_id text COLLATE "C" NOT NULL DEFAULT CURRENT_USER', 'id uuid NOT NULL DEFAULT gen_random_uuid()',
          'trimmed txid_snapshot', 'low bigint NOT NULL DEFAULT 0', 'waiting bigint[]', 'snapshots txid_snapshot[]', 'taken timestamp with time zone[]',
          'walk_position text', 'walked_at timestamp with time zone', 'sizing text', 'sized_at timestamp with time zone', 'bites integer',
          'since bigint', 'cut double precision[]', 'sums real[]', 'counted bigint', 'entries bigint', 'bytes bigint', 'half bigint', 'written bigint NOT NULL DEFAULT 0',
          'begun bigint', 'growth real',
          'evicted bigint NOT NULL DEFAULT 0', 'PRIMARY KEY (user_id)', 'CREATE UNIQUE INDEX btree (user_id)'],
        ARRAY['row-level security', 'policy cache_own_rows', 'policy cache_any_rows']),
      ('cache_lease', ARRAY['table', 'user_id text COLLATE "C" NOT NULL DEFAULT CURRENT_USER', 'key text COLLATE "C" NOT NULL', 'holder text NOT NULL',
          'expires_at timestamp with time zone NOT NULL', 'xid bigint NOT NULL DEFAULT txid_current()',
          'PRIMARY KEY (user_id, key)', 'CREATE UNIQUE INDEX btree (user_id, key)'],
        ARRAY['row-level security', 'policy cache_own_rows', 'policy cache_any_rows']),
      ('cache_limit', ARRAY['table', 'user_id text COLLATE "C" NOT NULL', 'max_bytes bigint NOT NULL',
          'PRIMARY KEY (user_id)', 'CREATE UNIQUE INDEX btree (user_id)', 'CHECK ((max_bytes > 0))'], '{}'))
    SELECT DISTINCT ON (r.name) r.name,
      ARRAY(SELECT text FROM line WHERE line.oid = r.oid AND text <> ALL (k.lines || k.others)) AS foreign,
      ARRAY(SELECT l FROM unnest(k.lines) l WHERE l NOT IN (SELECT text FROM line WHERE line.oid = r.oid)) AS lacks
    FROM relation r JOIN known k ON k.relname = r.relname
    ORDER BY r.name, cardinality(ARRAY(SELECT l FROM unnest(k.lines) l WHERE l IN (SELECT text FROM line WHERE line.oid = r.oid))) DESC
  LOOP
    IF item.lacks <> '{}' THEN
      RAISE EXCEPTION 'table % exists and is not fastpgcache''s', item.name
        USING ERRCODE = 'FPG01', DETAIL = 'It lacks: ' || array_to_string(item.lacks, '; ');
    ELSIF item.foreign <> '{}' THEN
      RAISE EXCEPTION 'table % exists and is not as fastpgcache makes it: %', item.name, array_to_string(item.foreign, '; ') USING ERRCODE = 'FPG01';
    END IF;
  END LOOP;
  FOR item IN
    SELECT t.oid::regtype AS name FROM pg_type t
    WHERE t.typnamespace = space AND t.typname = 'cache_keys'
      AND NOT (t.typtype = 'd' AND t.typbasetype = 'text[]'::regtype AND NOT t.typnotnull AND t.typdefault IS NULL
        AND ARRAY(SELECT pg_get_constraintdef(c.oid) FROM pg_constraint c WHERE c.contypid = t.oid)
          = ARRAY['CHECK (((cardinality(VALUE) <= 2000) AND (octet_length(array_to_string(VALUE, ''''::text)) <= 2200000)))'])
  LOOP
    RAISE EXCEPTION 'type % exists and is not fastpgcache''s', item.name USING ERRCODE = 'FPG01';
  END LOOP;
  FOR item IN
    SELECT p.oid::regprocedure AS name, p.proname, p.prokind = 'f'
      AND format('%s(%s) %s', p.proname, pg_get_function_identity_arguments(p.oid), pg_get_function_result(p.oid)) = ANY (functions) AS ours
    FROM unnest(functions) f
    JOIN pg_proc p ON p.oid = to_regprocedure(format('%I.%s', target, regexp_replace(f, 'p_[a-z_]+ |, OUT [^)]*|[^)]*$', '', 'g')))
  LOOP
    IF NOT item.ours THEN
      RAISE EXCEPTION 'function % exists and is not fastpgcache''s', item.name USING ERRCODE = 'FPG01';
    END IF;
    there := there || item.proname::text;
  END LOOP;

  cache := to_regclass(format('%I.cache', target));
  version := coalesce(substring(obj_description(cache, 'pg_class') FROM '^fastpgcache schema ([0-9]+)')::integer, 0);
  IF version > 1 THEN
    RAISE EXCEPTION 'table % was set up by a newer version of fastpgcache', cache USING ERRCODE = 'FPG03';
  END IF;

  -- Who may use it: who is named, else who may already, else everybody.
  first := NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = cache AND attname = 'mark' AND NOT attisdropped);
  SELECT coalesce(max(p.polroles) FILTER (WHERE p.polname = 'cache_own_rows'), '{}'),
         coalesce(max(p.polroles) FILTER (WHERE p.polname = 'cache_any_rows'), '{}')
  INTO own_was, whole_was FROM pg_policy p WHERE p.polrelid = cache;
  own := CASE WHEN nullif(current_setting('fastpgcache.grantee', true), '') IS NULL
    THEN CASE WHEN first THEN '{0}' ELSE own_was END
    ELSE (SELECT coalesce(array_agg(r.oid), '{}') FROM (SELECT oid, rolname FROM pg_roles UNION ALL SELECT 0, 'public') r
          WHERE r.rolname = current_setting('fastpgcache.grantee', true)) END;
  whole := CASE WHEN nullif(current_setting('fastpgcache.service', true), '') IS NULL THEN whole_was
    ELSE (SELECT coalesce(array_agg(r.oid), '{}') FROM (SELECT oid, rolname FROM pg_roles UNION ALL SELECT 0, 'public') r
          WHERE r.rolname = current_setting('fastpgcache.service', true)) END;
  owner := coalesce((SELECT relowner FROM pg_class WHERE oid = cache), (SELECT oid FROM pg_roles WHERE rolname = current_user));
  IF owner = ANY (own) OR 0 = ANY (whole) OR own && whole THEN
    RAISE EXCEPTION 'nobody would be confined: the grantee is the owner, or the service is the grantee or public'
      USING ERRCODE = 'invalid_parameter_value';
  END IF;

  -- A view, or somebody's temporary table with a column of the table's type, would keep
  -- it from being dropped.
  IF force AND first THEN
    EXECUTE format('DROP TABLE IF EXISTS %I.cache', target);
    cache := NULL;
    version := 0;
  END IF;
  IF force THEN
    FOR item IN SELECT string_agg(format('%I.%I', target, relname), ', ') AS list FROM pg_class
                WHERE relnamespace = space AND relname = ANY (shared) HAVING count(*) > 0 LOOP
      EXECUTE 'TRUNCATE ' || item.list;
    END LOOP;
  END IF;

  -- The entries. No index holds a column that a Set on an existing key changes,
  -- and pages keep room, so that refreshing a value or its TTL is a HOT update.
  -- There is no CHECK: PostgreSQL parses one anew for each statement, 8 % of a Set's
  -- time. Our statements send what is right, and cache_changed looks at all others'.
  IF cache IS NULL THEN
    EXECUTE format($$
      CREATE UNLOGGED TABLE %I.cache (
        user_id     text COLLATE "C" NOT NULL DEFAULT current_user,
        key         text COLLATE "C" NOT NULL,
        value       text,
        value_bytes bytea,
        expires_at  timestamptz,
        created_at  timestamptz NOT NULL DEFAULT now(),
        mark        bigint,  -- of the transaction whose statement has fed this change itself
        PRIMARY KEY (user_id, key)
      ) $$, target);
    cache := format('%I.cache', target);
  ELSIF first THEN
    -- The Python library's.
    EXECUTE format('LOCK TABLE %s', cache);
    FOR item IN SELECT indexrelid::regclass AS index FROM pg_index WHERE indrelid = cache AND NOT indisprimary LOOP
      EXECUTE format('DROP INDEX %s', item.index);
    END LOOP;
    EXECUTE format('SELECT EXISTS (SELECT FROM %s WHERE created_at IS NULL) AS undated', cache) INTO item;
    IF item.undated THEN
      EXECUTE format('ALTER TABLE %s ALTER created_at DROP DEFAULT, ALTER created_at TYPE timestamptz USING coalesce(created_at, now())', cache);
    END IF;
    EXECUTE format($$
      ALTER TABLE %s
        ALTER user_id TYPE text COLLATE "C", ALTER user_id SET DEFAULT current_user,
        ALTER key TYPE text COLLATE "C",
        ALTER value TYPE text, ALTER value DROP NOT NULL,  -- TYPE drops the statistics
        ALTER created_at SET DEFAULT now(), ALTER created_at SET NOT NULL,
        ADD value_bytes bytea,
        ADD mark bigint,
        DROP accessed_at $$, cache);
  END IF;

  -- The feed: whoever changes what a key answers leaves it here, in the same
  -- transaction. Its rows are few and large, or many and small; they live a minute.
  -- A domain's CHECK is parsed once in a session.
  IF to_regtype(format('%I.cache_keys', target)) IS NULL THEN
    EXECUTE format($$
      CREATE DOMAIN %I.cache_keys AS text[]
        CONSTRAINT cache_keys_bounded CHECK (cardinality(VALUE) <= 2000 AND octet_length(array_to_string(VALUE, ''::text)) <= 2200000)
    $$, target);
  END IF;
  IF to_regclass(format('%I.cache_change', target)) IS NULL THEN
    EXECUTE format($$
      CREATE UNLOGGED TABLE %1$I.cache_change (
        user_id text COLLATE "C" NOT NULL DEFAULT current_user,
        xid     bigint NOT NULL DEFAULT txid_current(),
        keys    %1$I.cache_keys  -- NULL: all of the user's
      ) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0,
        toast.autovacuum_vacuum_scale_factor = 0.05, toast.autovacuum_vacuum_cost_delay = 0);
      CREATE INDEX ON %1$I.cache_change (user_id, xid);
      COMMENT ON TABLE %1$I.cache_change IS 'fastpgcache change' $$, target);
  END IF;

  -- One row for each user. It is lost with the entries, and nobody can choose its id.
  IF to_regclass(format('%I.cache_epoch', target)) IS NULL THEN
    EXECUTE format($$
      CREATE UNLOGGED TABLE %1$I.cache_epoch (
        user_id       text COLLATE "C" PRIMARY KEY DEFAULT current_user,
        id            uuid NOT NULL DEFAULT gen_random_uuid(),
        trimmed       txid_snapshot,        -- feed rows visible in it may be gone
        low           bigint NOT NULL DEFAULT 0,
        waiting       bigint[],             -- feed rows below low are of these transactions
        snapshots     txid_snapshot[],      -- candidates for trimmed, oldest first
        taken         timestamptz[],        -- when each was taken
        walk_position text,                 -- where the user's cleanup goes on
        walked_at     timestamptz,          -- and when it last came to its end
        -- Of cache_fit, where the user has a limit.
        sizing        text,                 -- where it goes on; NULL: it is at its end
        sized_at      timestamptz,          -- when it last did a bite
        bites         integer,              -- how many it has done
        since         bigint,               -- the transaction that began it: ages are from there on
        cut           double precision[],   -- what goes: of each queue all up to a transaction, and of those up to a later one a share; the hash's seed
        sums          real[],               -- bytes so far that stay, by queue and age
        counted       bigint,               -- and entries
        entries       bigint,               -- at its last end
        bytes         bigint,
        half          bigint,               -- the older half of those that were read is from before this transaction
        written       bigint NOT NULL DEFAULT 0,  -- bytes, as processes have told since it began
        begun         bigint,               -- bytes written before it began, of which it sees all
        growth        real,                 -- the part of that which did not replace what was there
        evicted       bigint NOT NULL DEFAULT 0   -- entries, ever
      ) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0);
      COMMENT ON TABLE %1$I.cache_epoch IS 'fastpgcache epoch' $$, target);
  END IF;

  -- Who loads a missing key at the moment.
  IF to_regclass(format('%I.cache_lease', target)) IS NULL THEN
    EXECUTE format($$
      CREATE UNLOGGED TABLE %1$I.cache_lease (
        user_id    text COLLATE "C" NOT NULL DEFAULT current_user,
        key        text COLLATE "C" NOT NULL,
        holder     text NOT NULL,
        expires_at timestamptz NOT NULL,
        xid        bigint NOT NULL DEFAULT txid_current(),  -- that took it
        PRIMARY KEY (user_id, key)
      );
      COMMENT ON TABLE %1$I.cache_lease IS 'fastpgcache lease' $$, target);
  END IF;

  -- Statistics of users, keys and values would tell others' through EXPLAIN, and make
  -- plans for the user that was there when they were made. No plan needs them.
  FOR item IN SELECT a.attrelid::regclass AS relation, a.attname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
              WHERE c.relnamespace = space AND c.relname = ANY (shared) AND a.attnum > 0 AND NOT a.attisdropped
              AND (a.atttypid IN ('text'::regtype, 'bytea'::regtype) OR a.attname = 'keys') AND coalesce(a.attstattarget, -1) <> 0 LOOP
    EXECUTE format('ALTER TABLE %s ALTER %I SET STATISTICS 0', item.relation, item.attname);
  END LOOP;
  IF version < 1 THEN
    IF EXISTS (SELECT FROM pg_settings s WHERE s.name = 'default_toast_compression' AND 'lz4' = ANY (s.enumvals)) THEN
      EXECUTE format('ALTER TABLE %s ALTER value SET COMPRESSION lz4, ALTER value_bytes SET COMPRESSION lz4', cache);
    END IF;
    EXECUTE format($$
      ALTER TABLE %s SET (fillfactor = 90, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.2,
        autovacuum_vacuum_cost_delay = 0, toast.autovacuum_vacuum_scale_factor = 0.05, toast.autovacuum_vacuum_cost_delay = 0) $$, cache);
    EXECUTE format('COMMENT ON TABLE %s IS %L', cache, 'fastpgcache schema 1');
  END IF;

  -- Citus takes no table that has a trigger, nor runs one.
  IF to_regclass('pg_catalog.pg_dist_schema') IS NOT NULL THEN
    EXECUTE 'SELECT EXISTS (SELECT FROM pg_catalog.pg_dist_schema WHERE schemaid = $1)' INTO remote USING space;
  END IF;
  IF citus AND NOT remote THEN
    IF quote_ident(target) <> target THEN
      RAISE EXCEPTION 'Citus does not quote names: % cannot be distributed', quote_ident(target) USING ERRCODE = 'FPG03';
    END IF;
    FOR item IN SELECT tgname FROM pg_trigger WHERE tgrelid = cache AND NOT tgisinternal LOOP
      EXECUTE format('DROP TRIGGER %I ON %s', item.tgname, cache);
    END LOOP;
    EXECUTE format('SELECT pg_catalog.citus_schema_distribute(%L::pg_catalog.regnamespace)', quote_ident(target));
    remote := true;
  END IF;

  -- The functions. Six have the Python library's names, parameters and results. None
  -- has other rights than its caller's. plpgsql keeps plans, which sql does not.
  FOR item IN SELECT * FROM (VALUES
    ($$cache_set(p_user_id text, p_key text, p_value text, p_ttl_seconds integer DEFAULT NULL) RETURNS boolean LANGUAGE plpgsql$$, $$
    BEGIN
      IF octet_length(p_key) NOT BETWEEN 1 AND 1024 OR p_value IS NULL THEN
        RAISE EXCEPTION 'a key has 1 to 1024 bytes, and a value is not NULL' USING ERRCODE = 'check_violation';
      END IF;
      WITH change AS (INSERT INTO %1$I.cache_change (user_id, keys) VALUES (p_user_id, ARRAY[p_key]))
      INSERT INTO %1$I.cache (user_id, key, value, value_bytes, expires_at, mark)
      VALUES (p_user_id, p_key, p_value, NULL, statement_timestamp() + make_interval(secs => p_ttl_seconds::double precision), txid_current())
      ON CONFLICT (user_id, key) DO UPDATE
      SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at, mark = excluded.mark;
      IF random() < 0.005::double precision AND current_setting('transaction_isolation') = 'read committed' THEN
        PERFORM %1$I.cache_trim(p_user_id, 1000);
      END IF;
      RETURN true;
    END
    $$),
    ($$cache_get(p_user_id text, p_key text) RETURNS text LANGUAGE sql$$, $$
      SELECT value FROM %1$I.cache
      WHERE user_id = p_user_id AND key = p_key AND (expires_at IS NULL OR expires_at > statement_timestamp());
    $$),
    ($$cache_delete(p_user_id text, p_key text) RETURNS boolean LANGUAGE plpgsql$$, $$
    DECLARE
      live boolean;
    BEGIN
      -- First and apart: the next statement sees what a load has stored by then.
      DELETE FROM %1$I.cache_lease WHERE user_id = p_user_id AND key = p_key;
      DELETE FROM %1$I.cache WHERE user_id = p_user_id AND key = p_key
      RETURNING expires_at IS NULL OR expires_at > statement_timestamp() INTO live;
      RETURN coalesce(live, false);
    END
    $$),
    ($$cache_exists(p_user_id text, p_key text) RETURNS boolean LANGUAGE sql$$, $$
      SELECT EXISTS (SELECT FROM %1$I.cache
        WHERE user_id = p_user_id AND key = p_key AND (expires_at IS NULL OR expires_at > statement_timestamp()));
    $$),
    ($$cache_ttl(p_user_id text, p_key text) RETURNS integer LANGUAGE sql$$, $$
      SELECT coalesce((
        SELECT CASE WHEN isfinite(expires_at)
          THEN least(ceil(extract(epoch FROM expires_at - statement_timestamp())), 2147483647::numeric)::integer ELSE -1 END
        FROM %1$I.cache
        WHERE user_id = p_user_id AND key = p_key AND (expires_at IS NULL OR expires_at > statement_timestamp())), -2);
    $$),
    -- Makes the user's epoch if there is none, but waits for nobody whose transaction
    -- has made it and goes on.
    ($$cache_begin(p_user_id text) RETURNS void LANGUAGE plpgsql SET lock_timeout = '10ms'$$, $$
    BEGIN
      INSERT INTO %1$I.cache_epoch (user_id) VALUES (p_user_id) ON CONFLICT DO NOTHING;
    EXCEPTION WHEN lock_not_available THEN
      NULL;
    END
    $$),
    -- One bite of trimming a user's feed: removes at most p_rows of the rows that were
    -- visible a minute ago, so that each process has had the time to read them. How
    -- many; NULL when there is nothing to do now. The rows left below low are of
    -- transactions that were still running.
    ($$cache_trim(p_user_id text, p_rows integer) RETURNS integer LANGUAGE plpgsql$$, $$
    DECLARE
      epoch   record;
      due     integer;
      removed integer := 0;
      n       integer;
      upto    bigint;
      rows    tid[];
      present txid_snapshot := txid_current_snapshot();
      moment  timestamptz := clock_timestamp();
    BEGIN
      IF NOT EXISTS (SELECT FROM %1$I.cache_epoch WHERE user_id = p_user_id) THEN
        PERFORM %1$I.cache_begin(p_user_id);
      END IF;
      SELECT * INTO epoch FROM %1$I.cache_epoch WHERE user_id = p_user_id FOR UPDATE SKIP LOCKED;
      IF NOT FOUND THEN
        RETURN NULL;
      END IF;
      IF txid_snapshot_xmax(epoch.trimmed) > txid_snapshot_xmax(present) OR epoch.low > txid_snapshot_xmax(present) THEN
        -- Restored from another server: whoever has read it starts anew.
        UPDATE %1$I.cache_epoch SET trimmed = present, low = 0::bigint, waiting = NULL, snapshots = NULL, taken = NULL WHERE user_id = p_user_id;
        RETURN 0;
      END IF;
      -- A candidate each 15 s; a time in the future is due, as is one that is past.
      IF NOT coalesce(epoch.taken[cardinality(epoch.taken)] BETWEEN moment - interval '15 s' AND moment, false) THEN
        epoch.snapshots := epoch.snapshots || present;
        epoch.taken := epoch.taken || moment;
        UPDATE %1$I.cache_epoch SET snapshots = epoch.snapshots, taken = epoch.taken WHERE user_id = p_user_id;
      END IF;
      IF epoch.trimmed IS NULL OR epoch.low >= txid_snapshot_xmax(epoch.trimmed) THEN
        due := (SELECT max(i) FROM generate_subscripts(epoch.taken, 1) i
          WHERE epoch.taken[i] NOT BETWEEN moment - interval '1 minute' AND moment
            AND txid_snapshot_xmax(epoch.snapshots[i]) <= txid_snapshot_xmax(present));
        IF due IS NULL THEN
          RETURN NULL;
        END IF;
        epoch.trimmed := epoch.snapshots[due];
        UPDATE %1$I.cache_epoch SET trimmed = epoch.trimmed, snapshots = epoch.snapshots[due + 1 :], taken = epoch.taken[due + 1 :]
        WHERE user_id = p_user_id;
      END IF;
      IF epoch.waiting <> '{}'::bigint[] THEN
        rows := ARRAY(SELECT ctid FROM %1$I.cache_change
          WHERE user_id = p_user_id AND xid = ANY (epoch.waiting) AND txid_visible_in_snapshot(xid, epoch.trimmed) LIMIT p_rows);
        WITH held AS MATERIALIZED (
          SELECT c.ctid AS tid FROM (SELECT u.tid FROM unnest(rows) u(tid) LIMIT (SELECT 100000)) r JOIN %1$I.cache_change c ON c.ctid = r.tid
          FOR UPDATE OF c SKIP LOCKED)
        DELETE FROM %1$I.cache_change c USING held WHERE c.ctid = held.tid;
        GET DIAGNOSTICS removed = ROW_COUNT;
        IF removed < cardinality(rows) OR removed >= p_rows THEN
          RETURN removed;
        END IF;
        UPDATE %1$I.cache_epoch SET waiting = NULL WHERE user_id = p_user_id;
      END IF;
      SELECT array_agg(c.ctid), max(c.xid) INTO rows, upto FROM (
        SELECT ctid, xid FROM %1$I.cache_change
        WHERE user_id = p_user_id AND xid >= epoch.low AND xid < txid_snapshot_xmax(epoch.trimmed)
          AND txid_visible_in_snapshot(xid, epoch.trimmed)
        ORDER BY user_id, xid LIMIT (SELECT p_rows - removed)) c;
      WITH held AS MATERIALIZED (
        SELECT c.ctid AS tid FROM (SELECT u.tid FROM unnest(rows) u(tid) LIMIT (SELECT 100000)) r JOIN %1$I.cache_change c ON c.ctid = r.tid
        FOR UPDATE OF c SKIP LOCKED)
      DELETE FROM %1$I.cache_change c USING held WHERE c.ctid = held.tid;
      GET DIAGNOSTICS n = ROW_COUNT;
      removed := removed + n;
      IF n < cardinality(rows) THEN  -- somebody holds one
        RETURN removed;
      ELSIF removed >= p_rows THEN
        UPDATE %1$I.cache_epoch SET low = upto WHERE user_id = p_user_id;
      ELSE
        UPDATE %1$I.cache_epoch SET low = txid_snapshot_xmax(epoch.trimmed), waiting = ARRAY(SELECT txid_snapshot_xip(epoch.trimmed))
        WHERE user_id = p_user_id;
      END IF;
      RETURN removed;
    END
    $$),
    -- One bite of a cleanup: removes expired entries, of every user that the caller may
    -- act for, from p_position on, NULL for the start. How many, and the position to go
    -- on from, NULL at the end. With p_every it does the next bite of a walk that all
    -- processes of the caller's share, which knows itself where it is: removed is NULL
    -- when another process is at it, or it came to its end less than p_every ago.
    --
    -- A login that is confined walks its own keys, until they turn out to be more than
    -- the table has pages; everybody else, and then it, walks the pages. At the end it
    -- brings each user's entries within their limit, which for a confined login does all.
    -- An entry stays while its key is being loaded: the load looks whether it is the one
    -- that it found. What is remembered as absent expired at -infinity, and stays until
    -- the time in its value.
    ($$cache_walk(p_position text, p_every interval, OUT removed integer, OUT evicted integer, OUT next_position text) LANGUAGE plpgsql$$, $$
    DECLARE
      pages    constant bigint := pg_relation_size(%2$L::regclass, 'main'::text) / current_setting('block_size')::bigint;
      confined constant boolean := row_security_active(%2$L::text) AND NOT EXISTS (
        SELECT FROM pg_policy p, unnest(p.polroles) r
        WHERE p.polrelid = %2$L::regclass::oid AND p.polname = 'cache_any_rows'::name AND pg_has_role(r, 'USAGE'::text));
      limited  constant boolean := EXISTS (SELECT FROM %1$I.cache_limit WHERE NOT confined OR user_id IN (current_user::text, ''::text));
      here     text := p_position;
      mine     boolean := false;
      block    bigint;
      seen     bigint;
      n        integer;
      rows     tid[];
      label    text;
      fit      record;
    BEGIN
      IF p_every IS NOT NULL THEN
        IF NOT EXISTS (SELECT FROM %1$I.cache_epoch WHERE user_id = current_user) THEN
          PERFORM %1$I.cache_begin(current_user::text);
        END IF;
        FOR try IN 1 .. 3 LOOP  -- who trims the feed holds the row for a moment
          PERFORM FROM %1$I.cache_epoch WHERE user_id = current_user AND walk_position IS NULL
            AND walked_at BETWEEN statement_timestamp() - p_every AND statement_timestamp();
          IF FOUND THEN
            RETURN;
          END IF;
          SELECT walk_position, true INTO here, mine FROM %1$I.cache_epoch WHERE user_id = current_user
            AND NOT coalesce(walk_position IS NULL AND walked_at BETWEEN statement_timestamp() - p_every AND statement_timestamp(), false)
          FOR UPDATE SKIP LOCKED;
          EXIT WHEN mine;
          PERFORM pg_sleep(0.005::double precision);
        END LOOP;
        IF mine IS NOT TRUE THEN
          RETURN;
        END IF;
      END IF;
      IF here IS NULL OR here !~ '^(k[0-9]{1,15}:|b[0-9]{1,10}$|l$|u[0-9]{1,9}:)' THEN
        here := CASE WHEN NOT confined THEN 'b0' WHEN limited THEN 'l' ELSE 'k0:' END;
      END IF;

      -- Rows are joined by ctid, and the planner is told that they are few: a plan that is
      -- made while a user has few must not read all of the user's once there are many.
      removed := 0;
      evicted := 0;
      IF here ~ '^k' THEN
        SELECT array_agg(c.ctid) FILTER (WHERE c.expires_at <= statement_timestamp()), count(*), max(c.key)
        INTO rows, n, next_position FROM (
          SELECT ctid, key, expires_at FROM %1$I.cache
          WHERE user_id = current_user AND key > substr(here, strpos(here, ':'::text) + 1)
          ORDER BY user_id, key LIMIT (SELECT 1000)) c;
        seen := split_part(substr(here, 2), ':'::text, 1)::bigint + n;
        here := CASE WHEN n < 1000 THEN 'l' WHEN seen > pages THEN 'b0' ELSE concat('k', seen, ':', next_position) END;
      ELSIF here ~ '^b' THEN
        block := substr(here, 2)::bigint;
        rows := ARRAY(SELECT ctid FROM %1$I.cache
          WHERE ctid >= concat('(', least(block, 4294967295), ',0)')::tid AND ctid < concat('(', least(block + 256, 4294967295), ',0)')::tid
            AND expires_at <= statement_timestamp());
        here := CASE WHEN block + 256 < pages THEN concat('b', block + 256) ELSE 'l' END;
      ELSIF here ~ '^u' THEN
        n := substr(split_part(here, ':'::text, 1), 2)::integer;
        label := substr(here, strpos(here, ':'::text) + 1);
        IF n = 0 THEN  -- the next user
          label := CASE WHEN confined THEN CASE WHEN label = '' THEN current_user::text END
            WHEN EXISTS (SELECT FROM %1$I.cache_limit WHERE user_id = '')
              THEN (SELECT user_id FROM %1$I.cache WHERE user_id > label ORDER BY user_id, key LIMIT 1)
            ELSE (SELECT min(user_id) FROM %1$I.cache_limit WHERE user_id > label) END;
        END IF;
        here := NULL;
        IF label IS NOT NULL THEN
          SELECT f.removed, f.evicted, f.next_bite INTO fit FROM %1$I.cache_fit(label, n) f;
          removed := coalesce(fit.removed, 0);
          evicted := coalesce(fit.evicted, 0);
          here := concat('u', coalesce(fit.next_bite, 0), ':', label);
        END IF;
      END IF;
      IF rows IS NOT NULL THEN
        WITH due AS MATERIALIZED (
          SELECT c.ctid AS tid FROM (SELECT u.tid FROM unnest(rows) u(tid) LIMIT (SELECT 100000)) r JOIN %1$I.cache c ON c.ctid = r.tid
          WHERE c.expires_at <= statement_timestamp()
            AND CASE WHEN c.expires_at = '-infinity'::timestamptz AND c.value ~ '^[0-9]{1,12}([.][0-9]{1,9})?$'
              THEN c.value::numeric <= extract(epoch FROM statement_timestamp()) ELSE true END
            AND NOT EXISTS (SELECT FROM %1$I.cache_lease l WHERE l.user_id = c.user_id AND l.key = c.key
              AND l.expires_at BETWEEN statement_timestamp() AND statement_timestamp() + interval '1 minute')
          FOR UPDATE OF c SKIP LOCKED),
        gone AS (
          DELETE FROM %1$I.cache c USING due WHERE c.ctid = due.tid AND c.expires_at <= statement_timestamp() RETURNING c.expires_at)
        SELECT count(*) FILTER (WHERE expires_at > '-infinity'::timestamptz) INTO removed FROM gone;
      END IF;
      next_position := here;
      IF here = 'l' THEN
        -- No lease lasts for a minute: such a one is of a clock that was set back.
        DELETE FROM %1$I.cache_lease
        WHERE ctid = ANY (ARRAY(
          SELECT ctid FROM %1$I.cache_lease
          WHERE expires_at NOT BETWEEN statement_timestamp() AND statement_timestamp() + interval '1 minute'
          LIMIT 10000 FOR UPDATE SKIP LOCKED));
        GET DIAGNOSTICS n = ROW_COUNT;
        next_position := CASE WHEN n = 10000 THEN 'l' WHEN limited THEN 'u0:' END;
      END IF;
      IF mine THEN
        UPDATE %1$I.cache_epoch SET walk_position = next_position,
          walked_at = CASE WHEN next_position IS NULL THEN clock_timestamp() ELSE walked_at END
        WHERE user_id = current_user;
      END IF;
    END
    $$),
    -- One bite of bringing a user's entries within their limit: it removes what expired,
    -- sums up the rest by age and, where that is too much, goes over it again and removes
    -- the oldest. p_bite is 0, or the next_bite of the last one, which is NULL at the end.
    -- removed is NULL, and nothing was done, when another process is at it. One that died
    -- in the middle leaves the rest to the next.
    --
    -- There are two queues. An entry is on probation until it is read; then it is touched,
    -- which sets its mark to 0. Probation may take 30 percent: what it has more goes first.
    -- An entry's age is that of its xmin, in transactions: writes and touches renew it, and
    -- it survives freezing. Sums are by half powers of two of it, 64 for each queue. Of the
    -- youngest that have to go only a share does, chosen by a hash.
    ($$cache_fit(p_user_id text, p_bite integer, OUT removed integer, OUT evicted integer, OUT next_bite integer) LANGUAGE plpgsql
      SET enable_bitmapscan = off SET enable_sort = off SET jit = off$$, $$
    DECLARE
      pages  constant bigint := pg_relation_size(%2$L::regclass, 'main'::text) / current_setting('block_size')::bigint;
      most   constant bigint := (SELECT max_bytes FROM %1$I.cache_limit WHERE user_id IN (p_user_id, ''::text) ORDER BY user_id DESC LIMIT 1);
      moment timestamptz;
      e      record;
      here   text;
      xid    bigint;
      from_age bigint;   -- of this transaction, as ages go
      width  integer;    -- pages
      block  bigint := 0;
      after  text := '';
      seen   bigint := 0;
      last   text;
      ages   double precision[];  -- cut, in ages
      unread double precision;    -- the shares
      read   double precision;
      n      bigint := 0;
      part   record;
      rows   tid[] := '{}';
      xids   xid[] := '{}';
      excess double precision;
      goal   double precision;
      total  double precision;
      slot   integer;
    BEGIN
      IF NOT EXISTS (SELECT FROM %1$I.cache_epoch WHERE user_id = p_user_id) THEN
        PERFORM %1$I.cache_begin(p_user_id);
      END IF;
      FOR try IN 1 .. CASE WHEN p_bite = 0 THEN 3 ELSE 100 END LOOP  -- who trims the feed holds the row for a moment
        SELECT * INTO e FROM %1$I.cache_epoch WHERE user_id = p_user_id FOR UPDATE SKIP LOCKED;
        EXIT WHEN FOUND;
        PERFORM pg_sleep(0.005::double precision);
      END LOOP;
      IF e.user_id IS NULL THEN
        RETURN;
      END IF;
      xid := txid_current();
      moment := clock_timestamp();  -- after the last bite, with the lock

      -- What is there is the user's to write, or of another server, or of another time.
      here := e.sizing;
      IF (e.sized_at BETWEEN moment - interval '10 minutes' AND moment AND here ~ '^(k[0-9]{1,15}:|b[0-9]{1,10}$)'
          AND e.bites BETWEEN 1 AND 1000000000 AND e.since BETWEEN 1 AND xid AND e.counted BETWEEN 0 AND 1000000000000000
          AND array_dims(e.sums) = '[1:128]' AND array_position(e.sums, NULL::real) IS NULL AND 0::real <= ALL (e.sums) AND '1e16'::real >= ALL (e.sums)
          AND (e.cut IS NULL OR array_dims(e.cut) = '[1:7]' AND array_position(e.cut, NULL::double precision) IS NULL AND 0 <= e.cut[7] AND e.cut[7] < 1000000)) IS NOT TRUE THEN
        here := NULL;
      END IF;
      IF p_bite <> 0 AND (here IS NULL OR p_bite <> e.bites) OR p_bite = 0 AND here IS NOT NULL AND e.sized_at > moment - interval '1 s' THEN
        RETURN;
      END IF;
      removed := 0;
      evicted := 0;
      IF here IS NULL THEN
        IF most IS NULL THEN
          UPDATE %1$I.cache_epoch SET sizing = NULL, entries = NULL, bytes = NULL, half = NULL, written = 0::bigint WHERE user_id = p_user_id;
          RETURN;
        END IF;
        here := CASE WHEN e.entries > pages THEN 'b0' ELSE 'k0:' END;
        e.bites := 0;
        e.since := xid;
        e.cut := NULL;
        e.sums := array_fill(0::real, ARRAY[128]);
        e.counted := 0;
        e.begun := e.written;
        e.written := 0;
      END IF;

      from_age := xid - e.since;
      ages := ARRAY[xid - e.cut[1], xid - e.cut[2], xid - e.cut[4], xid - e.cut[5]];
      unread := e.cut[3];
      read := e.cut[6];
      width := CASE WHEN e.cut IS NULL THEN 256 ELSE 64 END;
      IF here ~ '^k' THEN
        after := substr(here, strpos(here, ':'::text) + 1);
        seen := split_part(substr(here, 2), ':'::text, 1)::bigint;
      ELSE
        block := least(substr(here, 2)::bigint, 4294967295);
      END IF;
      FOR part IN
        SELECT r.slot, r.gone, count(*) AS rows, max(r.key) AS last, sum(r.bytes) AS bytes,
          array_agg(r.tid) FILTER (WHERE r.gone) AS tids, array_agg(r.version) FILTER (WHERE r.gone) AS xids
        FROM (
          SELECT a.tid, a.key, a.version, a.bytes, a.slot, a.due OR e.cut IS NOT NULL AND CASE WHEN a.queue = 0
            THEN a.age >= ages[1] OR a.age >= ages[2] AND (hashtextextended(a.key, e.cut[7]::bigint) & 65535)::double precision < unread
            ELSE a.age >= ages[3] OR a.age >= ages[4] AND (hashtextextended(a.key, e.cut[7]::bigint) & 65535)::double precision < read END AS gone
          FROM (
            SELECT c.tid, c.key, c.version, c.bytes, c.queue, c.age,
              c.expires_at IS NOT NULL AND c.expires_at <= statement_timestamp()
                AND CASE WHEN c.expires_at = '-infinity'::timestamptz AND c.value ~ '^[0-9]{1,12}([.][0-9]{1,9})?$'
                  THEN c.value::numeric <= extract(epoch FROM statement_timestamp()) ELSE true END AS due,
              c.queue + CASE WHEN c.age <= from_age THEN 1
                ELSE least(64, 2 + floor(ln((c.age - from_age)::double precision) * 2.885390081777927::double precision)::integer) END AS slot
            FROM (
              (SELECT ctid AS tid, key, xmin AS version, CASE WHEN age(xmin) < 0 THEN 2147483647 ELSE age(xmin) END AS age, expires_at, CASE WHEN expires_at = '-infinity'::timestamptz THEN value END AS value,
                octet_length(key) + coalesce(pg_column_size(value), 0) + coalesce(pg_column_size(value_bytes), 0) + 128 AS bytes,
                CASE WHEN mark = 0 THEN 64 ELSE 0 END AS queue
              FROM %1$I.cache WHERE here ~ '^k' AND user_id = p_user_id AND key > after
              ORDER BY user_id, key LIMIT (SELECT 1000))
              UNION ALL
              SELECT b.tid, b.key, b.version, b.age, b.expires_at, b.value, b.bytes, b.queue FROM (
                SELECT user_id, ctid AS tid, key, xmin AS version, CASE WHEN age(xmin) < 0 THEN 2147483647 ELSE age(xmin) END AS age, expires_at, CASE WHEN expires_at = '-infinity'::timestamptz THEN value END AS value,
                  octet_length(key) + coalesce(pg_column_size(value), 0) + coalesce(pg_column_size(value_bytes), 0) + 128 AS bytes,
                  CASE WHEN mark = 0 THEN 64 ELSE 0 END AS queue
                FROM %1$I.cache WHERE here ~ '^b' AND ctid >= concat('(', block, ',0)')::tid AND ctid < concat('(', least(block + width, 4294967295), ',0)')::tid
                OFFSET 0) b
              WHERE b.user_id = p_user_id) c OFFSET 0) a) r
        GROUP BY r.slot, r.gone
      LOOP
        n := n + part.rows;
        last := greatest(last, part.last);
        IF part.gone THEN
          rows := rows || part.tids;
          xids := xids || part.xids;
        ELSE
          e.counted := e.counted + part.rows;
          e.sums[part.slot] := e.sums[part.slot] + part.bytes::real;
        END IF;
      END LOOP;
      IF rows <> '{}' THEN
        WITH held AS MATERIALIZED (
          SELECT c.ctid AS tid FROM (SELECT u.tid, u.version FROM unnest(rows, xids) u(tid, version) LIMIT (SELECT 100000)) r
          JOIN %1$I.cache c ON c.ctid = r.tid
          WHERE c.xmin = r.version AND NOT EXISTS (SELECT FROM %1$I.cache_lease l WHERE l.user_id = c.user_id AND l.key = c.key
            AND l.expires_at BETWEEN statement_timestamp() AND statement_timestamp() + interval '1 minute')
          FOR UPDATE OF c SKIP LOCKED),
        gone AS (
          DELETE FROM %1$I.cache c USING held WHERE c.ctid = held.tid RETURNING c.expires_at)
        SELECT count(*) FILTER (WHERE expires_at <= statement_timestamp() AND expires_at > '-infinity'::timestamptz),
          count(*) FILTER (WHERE expires_at IS NULL OR expires_at > statement_timestamp())
        INTO removed, evicted FROM gone;
      END IF;
      e.bites := e.bites + 1;
      IF here ~ '^k' THEN
        here := CASE WHEN n = 1000 THEN concat('k', seen + n, ':', last) END;
        IF seen + n > pages AND here IS NOT NULL AND e.cut IS NULL THEN  -- by pages it is faster, from the start
          here := 'b0';
          e.sums := array_fill(0::real, ARRAY[128]);
          e.counted := 0;
        END IF;
      ELSE
        here := CASE WHEN block + width < pages THEN concat('b', block + width) END;
      END IF;

      IF here IS NULL THEN
        total := (SELECT sum(s::double precision) FROM unnest(e.sums) s);
        IF e.cut IS NULL AND e.begun > most / 32 AND e.bytes IS NOT NULL THEN
          e.growth := greatest(least((total - e.bytes) / e.begun, 1), 0)::real;
        END IF;
        IF total > most AND e.cut IS NULL OR total > most::double precision * 19 / 16 THEN
          -- A sixteenth more goes, so that the next time is not at once. Where writers are
          -- faster than that, it goes on.
          e.cut := ARRAY[-1e18, -1e18, 0, -1e18, -1e18, 0, floor(random() * 1000000)];
          excess := total - most::double precision * 15 / 16;
          FOR queue IN 0 .. 1 LOOP
            goal := excess;
            IF queue = 0 THEN
              goal := least(goal, (SELECT sum(s::double precision) FROM unnest(e.sums[1 : 64]) s) - most::double precision * 3 / 10);
            END IF;
            FOR age IN REVERSE 63 .. 0 LOOP
              EXIT WHEN goal <= 0;
              slot := queue * 64 + age + 1;
              IF age < 63 THEN
                e.cut[queue * 3 + 1] := e.since - ceil(exp(age / 2.885390081777927::double precision));
              END IF;
              e.cut[queue * 3 + 2] := CASE WHEN age = 0 THEN 1e18 ELSE e.since - ceil(exp((age - 1) / 2.885390081777927::double precision)) END;
              e.cut[queue * 3 + 3] := least(goal / greatest(e.sums[slot]::double precision, 1::double precision), 1::double precision) * 65536;
              excess := excess - least(goal, e.sums[slot]::double precision);
              goal := goal - e.sums[slot]::double precision;
            END LOOP;
          END LOOP;
          e.since := xid;  -- it counts anew
          e.bytes := total::bigint;
          e.begun := e.written / 2;  -- of what came meanwhile about half is in the sum
          e.written := 0;
          here := CASE WHEN e.counted > pages THEN 'b0' ELSE 'k0:' END;
          e.sums := array_fill(0::real, ARRAY[128]);
          e.counted := 0;
        ELSE
          e.entries := e.counted;
          e.bytes := total::bigint;
          e.written := e.written / 2;
          e.half := NULL;
          goal := (SELECT sum(s::double precision) FROM unnest(e.sums[65 :]) s) / 2;
          FOR age IN REVERSE 63 .. 1 LOOP
            goal := goal - e.sums[65 + age]::double precision;
            IF goal <= 0 AND e.sums[65 + age] > 0 THEN
              e.half := e.since - floor(exp((age - 1) / 2.885390081777927::double precision))::bigint;
              EXIT;
            END IF;
          END LOOP;
        END IF;
      END IF;
      next_bite := CASE WHEN here IS NOT NULL THEN e.bites END;
      UPDATE %1$I.cache_epoch SET sizing = here, sized_at = clock_timestamp(), bites = e.bites, since = e.since, cut = e.cut, sums = e.sums, counted = e.counted,
        entries = e.entries, bytes = e.bytes, half = e.half, written = e.written, begun = e.begun, growth = e.growth,
        evicted = CASE WHEN e.evicted BETWEEN 0 AND 9000000000000000000 THEN e.evicted ELSE 0 END + cache_fit.evicted
      WHERE user_id = p_user_id;
    END
    $$),
    ($$cache_cleanup() RETURNS integer LANGUAGE plpgsql$$, $$
    DECLARE
      bite  record;
      total integer := 0;
      here  text;
    BEGIN
      LOOP
        SELECT w.removed, w.next_position INTO bite FROM %1$I.cache_walk(here, NULL::interval) w;
        total := total + bite.removed;
        here := bite.next_position;
        EXIT WHEN here IS NULL;
      END LOOP;
      IF current_setting('transaction_isolation') = 'read committed' THEN
        PERFORM %1$I.cache_trim(current_user::text, 10000);
      END IF;
      RETURN total;
    END
    $$),
    -- Other people's SQL leaves its keys in the feed by triggers. Our statements feed
    -- themselves, one row for all their keys, and tell by mark, or by how they begin.
    ($$cache_changed() RETURNS trigger LANGUAGE plpgsql$$, $$
    BEGIN
      IF octet_length(NEW.key) NOT BETWEEN 1 AND 1024 OR (NEW.value IS NULL) = (NEW.value_bytes IS NULL) THEN
        RAISE EXCEPTION 'an entry has a key of 1 to 1024 bytes, and either value or value_bytes' USING ERRCODE = 'check_violation';
      END IF;
      INSERT INTO %1$I.cache_change (user_id, keys) VALUES (NEW.user_id, ARRAY[NEW.key]);
      IF random() < 0.005::double precision AND current_setting('transaction_isolation') = 'read committed' THEN
        PERFORM %1$I.cache_trim(NEW.user_id, 1000);
      END IF;
      RETURN NULL;
    END
    $$),
    ($$cache_moved() RETURNS trigger LANGUAGE plpgsql$$, $$
    BEGIN
      IF octet_length(NEW.key) NOT BETWEEN 1 AND 1024 THEN
        RAISE EXCEPTION 'a key has 1 to 1024 bytes' USING ERRCODE = 'check_violation';
      END IF;
      INSERT INTO %1$I.cache_change (user_id, keys) VALUES (OLD.user_id, ARRAY[OLD.key]), (NEW.user_id, ARRAY[NEW.key]);
      RETURN NULL;
    END
    $$),
    ($$cache_deleted() RETURNS trigger LANGUAGE plpgsql$$, $$
    DECLARE
      label text;
      stack text;
    BEGIN
      INSERT INTO %1$I.cache_change (user_id, keys)
      SELECT d.user_id, array_agg(d.key) FROM (
        SELECT user_id, key, (row_number() OVER (PARTITION BY user_id) - 1) / 1000 AS part FROM deleted
        WHERE expires_at IS NULL OR expires_at > statement_timestamp()) d
      GROUP BY d.user_id, d.part;
      -- What is being loaded must not be stored behind it. Not so where a walk removes: it
      -- leaves alone what is being loaded, and a load that has begun since may be stored. Its
      -- lease is held by who stores, and waits for the walk's rows: to wait for it is a deadlock.
      GET DIAGNOSTICS stack = PG_CONTEXT;
      IF stack !~ 'cache_(walk|fit)[(]' THEN
        DELETE FROM %1$I.cache_lease
        WHERE ctid = ANY (ARRAY(
          SELECT l.ctid FROM %1$I.cache_lease l
          WHERE l.expires_at > statement_timestamp() AND (l.user_id, l.key) IN (SELECT user_id, key FROM deleted)
          ORDER BY l.user_id, l.key FOR UPDATE OF l));
      END IF;
      IF random() < 0.005::double precision AND current_setting('transaction_isolation') = 'read committed' THEN
        SELECT user_id INTO label FROM deleted LIMIT 1;
        IF FOUND THEN
          PERFORM %1$I.cache_trim(label, 1000);
        END IF;
      END IF;
      RETURN NULL;
    END
    $$)) f(head, body)
    WHERE NOT (remote AND split_part(f.head, '(', 1) IN ('cache_set', 'cache_delete', 'cache_trim', 'cache_walk', 'cache_fit'))
    UNION ALL
    SELECT * FROM (VALUES
    -- The same where Citus keeps the tables: there is no feed, and no limit on size. A
    -- clock is read into a variable, for Citus takes none in RETURNING. Rows are found by key.
    ($$cache_set(p_user_id text, p_key text, p_value text, p_ttl_seconds integer DEFAULT NULL) RETURNS boolean LANGUAGE plpgsql$$, $$
    BEGIN
      IF octet_length(p_key) NOT BETWEEN 1 AND 1024 OR p_value IS NULL THEN
        RAISE EXCEPTION 'a key has 1 to 1024 bytes, and a value is not NULL' USING ERRCODE = 'check_violation';
      END IF;
      INSERT INTO %1$I.cache (user_id, key, value, value_bytes, expires_at)
      VALUES (p_user_id, p_key, p_value, NULL, statement_timestamp() + make_interval(secs => p_ttl_seconds::double precision))
      ON CONFLICT (user_id, key) DO UPDATE
      SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at;
      RETURN true;
    END
    $$),
    ($$cache_delete(p_user_id text, p_key text) RETURNS boolean LANGUAGE plpgsql$$, $$
    DECLARE
      gone record;
    BEGIN
      DELETE FROM %1$I.cache_lease WHERE user_id = p_user_id AND key = p_key;
      DELETE FROM %1$I.cache WHERE user_id = p_user_id AND key = p_key RETURNING expires_at INTO gone;
      RETURN FOUND AND (gone.expires_at IS NULL OR gone.expires_at > statement_timestamp());
    END
    $$),
    ($$cache_trim(p_user_id text, p_rows integer) RETURNS integer LANGUAGE plpgsql$$, $$
    BEGIN
      RETURN NULL;
    END
    $$),
    ($$cache_fit(p_user_id text, p_bite integer, OUT removed integer, OUT evicted integer, OUT next_bite integer) LANGUAGE plpgsql
      SET enable_bitmapscan = off SET enable_sort = off SET jit = off$$, $$
    BEGIN
      RETURN;
    END
    $$),
    -- It walks by primary key, over the rows that row-level security lets the caller see.
    -- A position is u, the length of a user's name, a colon, the name, and a key.
    ($$cache_walk(p_position text, p_every interval, OUT removed integer, OUT evicted integer, OUT next_position text) LANGUAGE plpgsql$$, $$
    DECLARE
      moment constant timestamptz := statement_timestamp();
      here   text := p_position;
      mine   boolean := false;
      label  text := '';
      after  text := '';
      n      integer;
      users  text[];
      keys   text[];
      part   record;
    BEGIN
      IF p_every IS NOT NULL THEN
        IF NOT EXISTS (SELECT FROM %1$I.cache_epoch WHERE user_id = current_user) THEN
          PERFORM %1$I.cache_begin(current_user::text);
        END IF;
        SELECT walk_position, walked_at, true AS mine INTO part FROM %1$I.cache_epoch WHERE user_id = current_user FOR UPDATE SKIP LOCKED;
        IF part.mine IS NOT TRUE OR part.walk_position IS NULL AND part.walked_at BETWEEN moment - p_every AND moment THEN
          RETURN;
        END IF;
        here := part.walk_position;
        mine := true;
      END IF;
      IF here ~ '^u[0-9]{1,5}:' THEN
        n := substr(split_part(here, ':'::text, 1), 2)::integer;
        label := substr(here, strpos(here, ':'::text) + 1, n);
        after := substr(here, strpos(here, ':'::text) + 1 + n);
      END IF;
      evicted := 0;
      SELECT count(*), array_agg(p.user_id ORDER BY p.user_id, p.key), array_agg(p.key ORDER BY p.user_id, p.key) INTO n, users, keys FROM (
        SELECT user_id, key FROM %1$I.cache WHERE (user_id, key) > (label, after) ORDER BY user_id, key LIMIT 1000) p;
      IF n = 1000 THEN
        next_position := concat('u', length(users[n]), ':', users[n], keys[n]);
      END IF;
      SELECT array_agg(d.user_id) AS users, array_agg(d.key) AS keys, count(*) FILTER (WHERE d.expires_at > '-infinity'::timestamptz) AS counted
      INTO part FROM (
        SELECT c.user_id, c.key, c.expires_at FROM %1$I.cache c
        WHERE c.user_id = ANY (users) AND (c.user_id, c.key) IN (SELECT u.user_id, u.key FROM unnest(users, keys) u(user_id, key))
          AND c.expires_at <= moment
          AND CASE WHEN c.expires_at = '-infinity'::timestamptz AND c.value ~ '^[0-9]{1,12}([.][0-9]{1,9})?$'
            THEN c.value::numeric <= extract(epoch FROM moment) ELSE true END
          AND NOT EXISTS (SELECT FROM %1$I.cache_lease l WHERE l.user_id = c.user_id AND l.key = c.key
            AND l.expires_at BETWEEN moment AND moment + interval '1 minute')
        ORDER BY c.user_id, c.key FOR UPDATE OF c SKIP LOCKED) d;
      removed := part.counted;
      IF part.keys IS NOT NULL THEN
        DELETE FROM %1$I.cache WHERE (user_id, key) IN (SELECT u.user_id, u.key FROM unnest(part.users, part.keys) u(user_id, key));
      END IF;
      IF n < 1000 THEN
        SELECT array_agg(d.user_id) AS users, array_agg(d.key) AS keys INTO part FROM (
          SELECT user_id, key FROM %1$I.cache_lease WHERE expires_at NOT BETWEEN moment AND moment + interval '1 minute'
          LIMIT 10000 FOR UPDATE SKIP LOCKED) d;
        IF part.keys IS NOT NULL THEN
          DELETE FROM %1$I.cache_lease WHERE (user_id, key) IN (SELECT u.user_id, u.key FROM unnest(part.users, part.keys) u(user_id, key));
        END IF;
      END IF;
      IF mine THEN
        here := next_position;
        UPDATE %1$I.cache_epoch SET walk_position = here, walked_at = CASE WHEN here IS NULL THEN moment ELSE walked_at END WHERE user_id = current_user;
      END IF;
    END
    $$)) f(head, body)
    WHERE remote
  LOOP
    -- REPLACE only what was looked at above: a stranger's would stay the stranger's.
    EXECUTE format('CREATE %s FUNCTION %I.%s SET search_path = pg_catalog, pg_temp AS %L',
      CASE WHEN split_part(item.head, '(', 1) = ANY (there) THEN 'OR REPLACE' END, target, item.head, format(item.body, target, cache));
  END LOOP;

  FOR item IN
    SELECT w.name, w.event, w.function, t.tgname, coalesce(pg_get_triggerdef(t.oid) = format('CREATE TRIGGER %I ' || w.event || ' EXECUTE FUNCTION %I.%I()',
      w.name, cache, target, w.function), false) AS ours
    FROM (VALUES
      ('cache_changed_insert', 'AFTER INSERT ON %s FOR EACH ROW WHEN ((new.mark IS DISTINCT FROM txid_current()))', 'cache_changed'),
      ('cache_changed_update', 'AFTER UPDATE OF value, value_bytes, expires_at ON %s FOR EACH ROW WHEN ((new.mark IS DISTINCT FROM txid_current()))', 'cache_changed'),
      ('cache_moved', 'AFTER UPDATE OF user_id, key ON %s FOR EACH ROW', 'cache_moved'),
      ('cache_deleted', 'AFTER DELETE ON %s REFERENCING OLD TABLE AS deleted FOR EACH STATEMENT WHEN ((starts_with(current_query(), ''/*fastpgcache*/''::text) IS NOT TRUE))', 'cache_deleted')
      ) w(name, event, function)
    LEFT JOIN pg_trigger t ON t.tgrelid = cache AND t.tgname = w.name
    WHERE NOT remote
  LOOP
    IF item.tgname IS NOT NULL AND NOT item.ours THEN
      EXECUTE format('DROP TRIGGER %I ON %s', item.name, cache);
    END IF;
    IF NOT item.ours THEN
      EXECUTE format('CREATE TRIGGER %I ' || item.event || ' EXECUTE FUNCTION %I.%I()', item.name, cache, target, item.function);
    END IF;
    IF (SELECT tgenabled <> 'A' FROM pg_trigger WHERE tgrelid = cache AND tgname = item.name) THEN
      EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', cache, item.name);
    END IF;
  END LOOP;

  -- Row-level security. The policies are bare, so that they are index conditions:
  -- a filter would count others' rows for whoever asks EXPLAIN.
  FOREACH name IN ARRAY shared LOOP
    IF NOT (SELECT relrowsecurity FROM pg_class WHERE oid = format('%I.%I', target, name)::regclass) THEN
      EXECUTE format('ALTER TABLE %I.%I ENABLE ROW LEVEL SECURITY', target, name);
    END IF;
    FOR item IN
      SELECT w.policy, w.roles, w.rows, p.polname
      FROM (VALUES ('cache_own_rows', own, '(user_id = CURRENT_USER)'), ('cache_any_rows', whole, 'true')) w(policy, roles, rows)
      LEFT JOIN pg_policy p ON p.polrelid = format('%I.%I', target, name)::regclass AND p.polname = w.policy
      WHERE (coalesce(p.polroles, '{}') <> w.roles
        OR (p.polcmd, p.polpermissive, pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid))
           IS DISTINCT FROM ('*'::"char", true, w.rows, w.rows))
        AND (p.polname IS NOT NULL OR w.roles <> '{}')
    LOOP
      IF item.polname IS NOT NULL THEN
        EXECUTE format('DROP POLICY %I ON %I.%I', item.policy, target, name);
      END IF;
      IF item.roles <> '{}' THEN
        EXECUTE format('CREATE POLICY %I ON %I.%I TO %s USING (%s) WITH CHECK (%s)', item.policy, target, name,
          (SELECT string_agg(CASE WHEN r = 0 THEN 'PUBLIC' ELSE r::regrole::text END, ', ') FROM unnest(item.roles) r), item.rows, item.rows);
      END IF;
    END LOOP;
  END LOOP;

  -- Grants: what the operations need and nothing else, whatever was granted before.
  FOR item IN SELECT CASE WHEN r = 0 THEN 'PUBLIC' ELSE r::regrole::text END AS role,
                     CASE WHEN r = 0 THEN 'public' ELSE (SELECT rolname FROM pg_roles WHERE oid = r) END AS rolname
              FROM unnest(own || whole) r LOOP
    users := concat_ws(', ', users, item.role);
    IF NOT has_schema_privilege(item.rolname, target, 'USAGE') THEN
      EXECUTE format('GRANT USAGE ON SCHEMA %I TO %s', target, item.role);
    END IF;
  END LOOP;
  owner := (SELECT relowner FROM pg_class WHERE oid = cache);
  FOR item IN
    SELECT 'TABLE ' || c.oid::regclass AS object, c.relowner AS owner, acl.grantees, false AS callable
    FROM pg_class c, LATERAL (
      SELECT array_agg(DISTINCT g.grantee) AS grantees FROM (
        SELECT c.relacl AS acl UNION ALL SELECT a.attacl FROM pg_attribute a WHERE a.attrelid = c.oid) t, aclexplode(t.acl) g) acl
    WHERE c.relnamespace = space AND c.relname = ANY (tables)
    UNION ALL
    SELECT 'TYPE ' || t.oid::regtype, t.typowner,
           ARRAY(SELECT DISTINCT g.grantee FROM aclexplode(coalesce(t.typacl, acldefault('T', t.typowner))) g), false
    FROM pg_type t WHERE t.typnamespace = space AND t.typname = 'cache_keys'
    UNION ALL
    SELECT 'FUNCTION ' || p.oid::regprocedure, p.proowner,
           ARRAY(SELECT DISTINCT g.grantee FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) g), p.prorettype <> 'trigger'::regtype
    FROM pg_proc p WHERE p.pronamespace = space
      AND format('%s(%s) %s', p.proname, pg_get_function_identity_arguments(p.oid), pg_get_function_result(p.oid)) = ANY (functions)
  LOOP
    IF item.owner <> owner THEN
      EXECUTE format('ALTER %s OWNER TO %s', item.object, owner::regrole);
    END IF;
    FOR name IN SELECT CASE WHEN g = 0 THEN 'PUBLIC' ELSE g::regrole::text END
                FROM unnest(item.grantees) g WHERE g NOT IN (owner, item.owner) LOOP
      EXECUTE format('REVOKE ALL ON %s FROM %s CASCADE', item.object, name);
    END LOOP;
    IF item.callable AND users IS NOT NULL THEN
      EXECUTE format('GRANT EXECUTE ON %s TO %s', item.object, users);
    END IF;
  END LOOP;
  IF users IS NOT NULL AND remote THEN  -- Citus does not carry grants on columns to the node
    EXECUTE format($$
      GRANT SELECT, INSERT, UPDATE, DELETE ON %1$I.cache, %1$I.cache_change, %1$I.cache_lease, %1$I.cache_epoch TO %2$s;
      GRANT SELECT ON %1$I.cache_limit TO %2$s $$, target, users);
  ELSIF users IS NOT NULL THEN
    EXECUTE format($$
      GRANT SELECT, DELETE, INSERT (user_id, key, value, value_bytes, expires_at, mark),
        UPDATE (value, value_bytes, expires_at, mark) ON %1$I.cache TO %2$s;
      GRANT SELECT, DELETE, INSERT (user_id, keys), UPDATE (keys) ON %1$I.cache_change TO %2$s;
      GRANT SELECT, DELETE, INSERT (user_id, key, holder, expires_at, xid), UPDATE (holder, expires_at, xid) ON %1$I.cache_lease TO %2$s;
      GRANT SELECT, INSERT (user_id), UPDATE (trimmed, low, waiting, snapshots, taken, walk_position, walked_at,
        sizing, sized_at, bites, since, cut, sums, counted, entries, bytes, half, written, begun, growth, evicted) ON %1$I.cache_epoch TO %2$s;
      GRANT SELECT ON %1$I.cache_limit TO %2$s $$, target, users);
  END IF;

  IF max_bytes IS NOT NULL THEN
    EXECUTE format('SELECT (SELECT max_bytes FROM %I.cache_limit WHERE user_id = %L)', target, '') INTO limit_was;
    max_bytes := CASE WHEN max_bytes > 0 THEN max_bytes END;
    IF max_bytes IS DISTINCT FROM limit_was THEN
      EXECUTE format('DELETE FROM %I.cache_limit WHERE user_id = %L', target, '');
      EXECUTE format('INSERT INTO %I.cache_limit SELECT %L, $1 WHERE $1 IS NOT NULL', target, '') USING max_bytes;
      RAISE NOTICE 'fastpgcache: each user''s entries may take % bytes (before: %)', coalesce(max_bytes::text, 'any number of'), coalesce(limit_was::text, 'no limit');
    END IF;
  END IF;
  IF remote THEN
    EXECUTE format('SELECT EXISTS (SELECT FROM %I.cache_limit) AS limited', target) INTO item;
    IF item.limited THEN
      RAISE EXCEPTION 'fastpgcache keeps no limit on size in a schema that Citus distributes' USING ERRCODE = 'FPG03';
    END IF;
  END IF;
  FOR item IN
    SELECT what, ARRAY(SELECT CASE WHEN r = 0 THEN 'PUBLIC' ELSE r::regrole::text END FROM unnest(now) r) AS now,
      ARRAY(SELECT CASE WHEN r = 0 THEN 'PUBLIC' ELSE r::regrole::text END FROM unnest(was) r) AS was
    FROM (VALUES ('may use the cache, each login confined to its own entries', own, own_was), ('may act for any user', whole, whole_was)) v(what, now, was)
    WHERE now <> was
  LOOP
    RAISE NOTICE 'fastpgcache: % % (before: %)', coalesce(nullif(array_to_string(item.now, ', '), ''), 'nobody'), item.what,
      coalesce(nullif(array_to_string(item.was, ', '), ''), 'nobody');
  END LOOP;

  PERFORM set_config('quote_all_identifiers', quoted, true);
  PERFORM set_config('lock_timeout', timeout, true);
  PERFORM set_config('search_path', path, true);
END $setup$;
-- +goose StatementEnd
