-- fastpgcache: the cache's table, row-level security and functions.
--
--   psql -v ON_ERROR_STOP=1 -f migrations.sql
--
-- It is a single DO statement, so every tool runs it whole or not at all. It
-- may be run again at any time: it creates what is missing, upgrades the table
-- of an earlier version or of the Python library with every entry kept, and
-- waits for nobody when there is nothing to do. PostgreSQL 14 or newer.
--
-- Four settings, each optional, steer it, for example by
-- PGOPTIONS='-c fastpgcache.grantee=app -c fastpgcache.service=worker':
--
--   fastpgcache.schema    where everything is created, the schema itself too if
--                         absent; defaults to the first of the search path
--   fastpgcache.grantee   the role that may use the cache, each login confined
--                         to its own entries; defaults to PUBLIC
--   fastpgcache.service   the role that may act for any user; defaults to none
--   fastpgcache.force     on: drop the cache with every entry, and create anew
--
-- Errors of its own: FPG01 something else bears one of the names; FPG02 an object
-- belongs to a role that is not to be trusted with it; FPG03 this server or
-- database will not do.
DO $setup$
DECLARE
  path      constant text := pg_catalog.current_setting('search_path');
  timeout   constant text := pg_catalog.current_setting('lock_timeout');
  target    text := pg_catalog.current_schema();
  grantee   text;
  service   text;
  force     boolean;
  tables    constant text[] := ARRAY['cache_lease', 'cache', 'cache_epoch'];  -- locked in this order, as a Delete does
  functions constant text[] := ARRAY[
    'cache_set(p_user_id text, p_key text, p_value text, p_ttl_seconds integer) boolean',
    'cache_get(p_user_id text, p_key text) text',
    'cache_delete(p_user_id text, p_key text) boolean',
    'cache_exists(p_user_id text, p_key text) boolean',
    'cache_ttl(p_user_id text, p_key text) integer',
    'cache_cleanup() integer',
    'cache_cleanup_blocks(p_first bigint, p_blocks integer, p_every interval, OUT removed integer, OUT next_block bigint) record',
    'cache_stamp() trigger'];
  cache     regclass;
  version   integer := 0;  -- of the table as it was found; 0 for the Python library's
  owner     oid;
  users     text;
  name      text;
  role_name text;
  item      record;
BEGIN
  -- Whoever may create in a schema of the search path could put functions and
  -- operators there that fit a call better than PostgreSQL's own: nothing here, and
  -- nothing in the functions below, is looked up but in pg_catalog.
  PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);

  -- Concurrent set-ups go one after the other.
  PERFORM pg_advisory_xact_lock(7306010338411931507);

  target  := coalesce(nullif(current_setting('fastpgcache.schema', true), ''), target);
  grantee := coalesce(nullif(current_setting('fastpgcache.grantee', true), ''), 'public');
  service := nullif(current_setting('fastpgcache.service', true), '');
  force   := coalesce(nullif(current_setting('fastpgcache.force', true), ''), 'off')::boolean;

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
  FOREACH role_name IN ARRAY ARRAY[grantee, service] LOOP
    IF role_name <> 'public' AND NOT EXISTS (SELECT FROM pg_roles WHERE rolname = role_name) THEN
      RAISE EXCEPTION 'role "%" does not exist', role_name USING ERRCODE = 'undefined_object';
    END IF;
  END LOOP;

  IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = target) THEN
    EXECUTE format('CREATE SCHEMA %I', target);
  END IF;
  IF timeout = '0' THEN
    PERFORM set_config('lock_timeout', '10s', true);
  END IF;

  -- What bears our names must be ours, and its owner to be trusted with it: the
  -- owner is not confined. That is a role whose rights the installer has. A
  -- superuser has everyone's, and trusts only itself and those who have the rights
  -- of the schema's owner, since any role may have put a table in public.
  FOR item IN
    SELECT format('table %I.%I', target, c.relname) AS object, c.relowner AS owner,
           c.relkind = 'r' AND (obj_description(c.oid, 'pg_class') LIKE 'fastpgcache %'
             OR (c.relname, ARRAY(
                 SELECT concat(a.attname, ' ', t.typname) FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
                 WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attname))
               IN (('cache', '{created_at timestamptz,created_xid int8,expires_at timestamptz,key text,user_id text,value text,value_bytes bytea}'),
                   ('cache', '{accessed_at timestamptz,created_at timestamptz,expires_at timestamptz,key text,user_id text,value text}'),
                   ('cache_epoch', '{cleaned_at timestamptz,cleanup_block int8,id uuid,only_row bool}'),
                   ('cache_lease', '{expires_at timestamptz,holder text,key text,user_id text}'))) AS ours
    FROM pg_class c WHERE c.relnamespace = quote_ident(target)::regnamespace AND c.relname = ANY (tables)
    UNION ALL
    SELECT 'function ' || p.oid::regprocedure, p.proowner,
           format('%s(%s) %s', p.proname, pg_get_function_identity_arguments(p.oid), pg_get_function_result(p.oid)) = ANY (functions)
    FROM unnest(functions) f
    JOIN pg_proc p ON p.oid = to_regprocedure(format('%I.%s', target, regexp_replace(f, 'p_[a-z_]+ |, OUT [^)]*|[^)]*$', '', 'g')))
  LOOP
    IF NOT coalesce(item.ours, false) THEN
      RAISE EXCEPTION '% exists and is not fastpgcache''s', item.object USING ERRCODE = 'FPG01';
    END IF;
    IF NOT (SELECT pg_has_role(item.owner, 'MEMBER')
                   AND (NOT r.rolsuper OR r.oid = item.owner OR pg_has_role(item.owner, n.nspowner, 'MEMBER'))
            FROM pg_roles r, pg_namespace n WHERE r.rolname = current_user AND n.nspname = target) THEN
      RAISE EXCEPTION '% belongs to role %', item.object, item.owner::regrole USING ERRCODE = 'FPG02',
        HINT = 'Set up as that role if it is the cache''s administrator; otherwise drop the object or change its owner.';
    END IF;
  END LOOP;

  cache := to_regclass(format('%I.cache', target));
  version := coalesce(substring(obj_description(cache, 'pg_class') FROM '^fastpgcache schema ([0-9]+)')::integer, 0);
  IF version > 1 THEN
    RAISE EXCEPTION 'table % was set up by a newer version of fastpgcache', cache USING ERRCODE = 'FPG03';
  END IF;
  IF force THEN
    FOREACH name IN ARRAY tables LOOP
      EXECUTE format('DROP TABLE IF EXISTS %I.%I', target, name);
    END LOOP;
    cache := NULL;
    version := 0;
  END IF;

  -- The entries. No index holds a column that a Set on an existing key changes,
  -- and pages keep room, so that refreshing a value or its TTL is a HOT update.
  IF cache IS NULL THEN
    EXECUTE format($$
      CREATE UNLOGGED TABLE %I.cache (
        user_id     text COLLATE "C" NOT NULL DEFAULT current_user,
        key         text COLLATE "C" NOT NULL,
        value       text,
        value_bytes bytea,
        expires_at  timestamptz,
        created_at  timestamptz NOT NULL DEFAULT now(),
        created_xid bigint NOT NULL DEFAULT txid_current(),
        PRIMARY KEY (user_id, key),
        CONSTRAINT cache_one_value CHECK ((value IS NULL) <> (value_bytes IS NULL))
      ) $$, target);
    cache := format('%I.cache', target);
  ELSIF EXISTS (SELECT FROM pg_attribute WHERE attrelid = cache AND attname = 'accessed_at' AND NOT attisdropped) THEN
    -- The Python library's. What others attached to it would run with our rights.
    EXECUTE format('LOCK TABLE %s', cache);
    IF EXISTS (SELECT FROM pg_class WHERE oid = cache
               AND (relhastriggers OR relhasrules OR relchecks > 0 OR relrowsecurity OR relispartition OR relhassubclass))
       OR NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = cache AND i.indisprimary
                      AND pg_get_indexdef(i.indexrelid) LIKE '%(user_id, key)') THEN
      RAISE EXCEPTION 'table % is not as the Python library makes it', cache USING ERRCODE = 'FPG01';
    END IF;
    FOR item IN SELECT i.indexrelid::regclass AS index FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
                WHERE i.indrelid = cache AND c.relname IN ('idx_cache_expires_at', 'idx_cache_user_id') LOOP
      EXECUTE format('DROP INDEX %s', item.index);
    END LOOP;
    EXECUTE format('SELECT EXISTS (SELECT FROM %s WHERE created_at IS NULL) AS missing', cache) INTO item;
    IF item.missing THEN
      EXECUTE format('ALTER TABLE %s ALTER created_at DROP DEFAULT, ALTER created_at TYPE timestamptz USING coalesce(created_at, now())', cache);
    END IF;
    EXECUTE format($$
      ALTER TABLE %s
        ALTER user_id TYPE text COLLATE "C", ALTER user_id SET DEFAULT current_user,
        ALTER key TYPE text COLLATE "C",
        ALTER value TYPE text, ALTER value DROP NOT NULL,  -- TYPE drops the statistics
        ALTER created_at SET DEFAULT now(), ALTER created_at SET NOT NULL,
        ADD value_bytes bytea,
        ADD created_xid bigint NOT NULL DEFAULT txid_current(),
        ADD CONSTRAINT cache_one_value CHECK ((value IS NULL) <> (value_bytes IS NULL)),
        DROP accessed_at $$, cache);
  END IF;
  IF NOT EXISTS (SELECT FROM pg_index WHERE indrelid = cache AND indisvalid AND pg_get_indexdef(indexrelid) LIKE '%(user_id, created_xid)') THEN
    EXECUTE format('CREATE INDEX ON %s (user_id, created_xid)', cache);
  END IF;

  -- The epoch is lost with the entries, and nobody can choose its id.
  IF to_regclass(format('%I.cache_epoch', target)) IS NULL THEN
    EXECUTE format($$
      CREATE UNLOGGED TABLE %1$I.cache_epoch (
        only_row      boolean PRIMARY KEY DEFAULT true CHECK (only_row),
        id            uuid NOT NULL DEFAULT gen_random_uuid(),
        cleanup_block bigint NOT NULL DEFAULT 0,  -- where the shared cleanup goes on
        cleaned_at    timestamptz                 -- and when it last reached the table's end
      );
      COMMENT ON TABLE %1$I.cache_epoch IS 'fastpgcache epoch';
      INSERT INTO %1$I.cache_epoch DEFAULT VALUES $$, target);
  END IF;

  -- Who loads a missing key at the moment.
  IF to_regclass(format('%I.cache_lease', target)) IS NULL THEN
    EXECUTE format($$
      CREATE UNLOGGED TABLE %1$I.cache_lease (
        user_id    text COLLATE "C" NOT NULL DEFAULT current_user,
        key        text COLLATE "C" NOT NULL,
        holder     text NOT NULL,
        expires_at timestamptz NOT NULL,
        PRIMARY KEY (user_id, key)
      );
      COMMENT ON TABLE %1$I.cache_lease IS 'fastpgcache lease' $$, target);
  END IF;

  -- Statistics of keys and values would tell others' key ranges through EXPLAIN,
  -- and no plan needs them.
  FOR item IN SELECT attname FROM pg_attribute WHERE attrelid = cache AND attname IN ('key', 'value', 'value_bytes')
              AND coalesce(attstattarget, -1) <> 0 LOOP
    EXECUTE format('ALTER TABLE %s ALTER %I SET STATISTICS 0', cache, item.attname);
  END LOOP;
  IF version < 1 THEN
    EXECUTE format('ALTER TABLE %s ALTER created_xid SET (n_distinct = -1)', cache);
    IF EXISTS (SELECT FROM pg_settings s WHERE s.name = 'default_toast_compression' AND 'lz4' = ANY (s.enumvals)) THEN
      EXECUTE format('ALTER TABLE %s ALTER value SET COMPRESSION lz4, ALTER value_bytes SET COMPRESSION lz4', cache);
    END IF;
    EXECUTE format($$
      ALTER TABLE %s SET (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.2,
        autovacuum_vacuum_cost_delay = 0, toast.autovacuum_vacuum_scale_factor = 0.05, toast.autovacuum_vacuum_cost_delay = 0) $$, cache);
    EXECUTE format('COMMENT ON TABLE %s IS %L', cache, 'fastpgcache schema 1');
  END IF;

  -- The functions. Six have the Python library's names, parameters and results.
  FOR item IN SELECT * FROM (VALUES
    ($$cache_set(p_user_id text, p_key text, p_value text, p_ttl_seconds integer DEFAULT NULL) RETURNS boolean LANGUAGE sql$$, $$
      INSERT INTO %1$I.cache (user_id, key, value, value_bytes, expires_at)
      VALUES (p_user_id, p_key, p_value, NULL, statement_timestamp() + make_interval(secs => p_ttl_seconds))
      ON CONFLICT (user_id, key) DO UPDATE
      SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at;
      SELECT true;
    $$),
    ($$cache_get(p_user_id text, p_key text) RETURNS text LANGUAGE sql$$, $$
      SELECT value FROM %1$I.cache
      WHERE user_id = p_user_id AND key = p_key AND (expires_at IS NULL OR expires_at > statement_timestamp());
    $$),
    ($$cache_delete(p_user_id text, p_key text) RETURNS boolean LANGUAGE sql$$, $$
      -- First and apart: the next statement sees what a load has stored by then.
      DELETE FROM %1$I.cache_lease WHERE user_id = p_user_id AND key = p_key;
      WITH deleted AS (
        DELETE FROM %1$I.cache
        WHERE user_id = p_user_id AND key = p_key AND (expires_at IS NULL OR expires_at > statement_timestamp())
        RETURNING true)
      SELECT EXISTS (SELECT FROM deleted);
    $$),
    ($$cache_exists(p_user_id text, p_key text) RETURNS boolean LANGUAGE sql$$, $$
      SELECT EXISTS (SELECT FROM %1$I.cache
        WHERE user_id = p_user_id AND key = p_key AND (expires_at IS NULL OR expires_at > statement_timestamp()));
    $$),
    ($$cache_ttl(p_user_id text, p_key text) RETURNS integer LANGUAGE sql$$, $$
      SELECT coalesce((
        SELECT CASE WHEN isfinite(expires_at)
          THEN least(ceil(extract(epoch FROM expires_at - statement_timestamp())), 2147483647)::integer ELSE -1 END
        FROM %1$I.cache
        WHERE user_id = p_user_id AND key = p_key AND (expires_at IS NULL OR expires_at > statement_timestamp())), -2);
    $$),
    -- Removes the expired entries, of every user, in p_blocks pages of the table
    -- from page p_first on; the next page to do, or NULL at the end. With p_every
    -- it does the next bite of a cleanup that all processes share, which knows
    -- itself where it is: removed is NULL when another process is at it, or it
    -- reached the end less than p_every ago.
    ($$cache_cleanup_blocks(p_first bigint, p_blocks integer, p_every interval DEFAULT NULL,
      OUT removed integer, OUT next_block bigint) LANGUAGE plpgsql SECURITY DEFINER$$, $$
    DECLARE
      ends bigint := pg_relation_size(%2$L) / current_setting('block_size')::bigint;
    BEGIN
      IF p_every IS NOT NULL THEN
        IF NOT EXISTS (SELECT FROM %1$I.cache_epoch) THEN  -- ON CONFLICT alone would wait for who is at it
          INSERT INTO %1$I.cache_epoch DEFAULT VALUES ON CONFLICT DO NOTHING;
        END IF;
        SELECT cleanup_block INTO p_first FROM %1$I.cache_epoch
        WHERE cleanup_block > 0 OR cleaned_at IS NULL OR cleaned_at <= statement_timestamp() - p_every
        FOR UPDATE SKIP LOCKED;
        IF NOT FOUND THEN
          RETURN;
        END IF;
      END IF;
      next_block := p_first + greatest(p_blocks, 1);
      DELETE FROM %1$I.cache
      WHERE ctid = ANY (ARRAY(
          SELECT ctid FROM %1$I.cache
          WHERE ctid >= concat('(', p_first, ',0)')::tid AND ctid < concat('(', least(next_block, 4294967295), ',0)')::tid
            AND expires_at <= statement_timestamp()
          FOR UPDATE SKIP LOCKED))
        AND expires_at <= statement_timestamp();
      GET DIAGNOSTICS removed = ROW_COUNT;
      IF next_block >= ends THEN
        next_block := NULL;
        DELETE FROM %1$I.cache_lease
        WHERE (user_id, key) IN (
          SELECT user_id, key FROM %1$I.cache_lease WHERE expires_at <= statement_timestamp() FOR UPDATE SKIP LOCKED);
      END IF;
      IF p_every IS NOT NULL THEN
        UPDATE %1$I.cache_epoch SET cleanup_block = coalesce(next_block, 0),
          cleaned_at = CASE WHEN next_block IS NULL THEN statement_timestamp() ELSE cleaned_at END;
      END IF;
    END
    $$),
    ($$cache_cleanup() RETURNS integer LANGUAGE plpgsql SECURITY DEFINER$$, $$
    DECLARE
      bite  record;
      total integer := 0;
      block bigint := 0;
    BEGIN
      WHILE block IS NOT NULL LOOP
        SELECT * INTO bite FROM %1$I.cache_cleanup_blocks(block, 1024, NULL::interval);
        total := total + bite.removed;
        block := bite.next_block;
      END LOOP;
      RETURN total;
    END
    $$),
    ($$cache_stamp() RETURNS trigger LANGUAGE plpgsql$$, $$
    BEGIN
      NEW.created_xid := txid_current();
      RETURN NEW;
    END
    $$)) f(head, body)
  LOOP
    EXECUTE format('CREATE OR REPLACE FUNCTION %I.%s SET search_path = pg_catalog, pg_temp AS %L',
      target, item.head, format(item.body, target, cache));
  END LOOP;

  -- created_xid always is the transaction that made the row's key visible.
  FOR item IN
    SELECT w.name, w.event, t.tgname FROM (VALUES
      ('cache_stamp_insert', 'INSERT ON %s FOR EACH ROW WHEN (NEW.created_xid IS DISTINCT FROM txid_current())'),
      ('cache_stamp_update', 'UPDATE OF user_id, key, created_xid ON %s FOR EACH ROW')) w(name, event)
    LEFT JOIN pg_trigger t ON t.tgrelid = cache AND t.tgname = w.name
    WHERE t.tgenabled IS DISTINCT FROM 'A'
  LOOP
    IF item.tgname IS NULL THEN
      EXECUTE format('CREATE TRIGGER %I BEFORE ' || item.event || ' EXECUTE FUNCTION %I.cache_stamp()', item.name, cache, target);
    END IF;
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', cache, item.name);
  END LOOP;

  -- Row-level security. IS TRUE makes the policy a mere filter: left bare, the
  -- planner takes it for an index condition and picks the wrong index.
  FOREACH name IN ARRAY ARRAY['cache_lease', 'cache'] LOOP
    IF NOT (SELECT relrowsecurity FROM pg_class WHERE oid = format('%I.%I', target, name)::regclass) THEN
      EXECUTE format('ALTER TABLE %I.%I ENABLE ROW LEVEL SECURITY', target, name);
    END IF;
    FOR item IN
      SELECT w.policy, w.role, w.rows, p.polname
      FROM (VALUES ('cache_own_rows', grantee, '((user_id = current_user) IS TRUE)'),
                   ('cache_any_rows', service, '(true)')) w(policy, role, rows)
      LEFT JOIN pg_policy p ON p.polrelid = format('%I.%I', target, name)::regclass AND p.polname = w.policy
      WHERE p.polroles IS DISTINCT FROM ARRAY[CASE WHEN w.role = 'public' THEN 0::oid
                                                   ELSE (SELECT r.oid FROM pg_roles r WHERE r.rolname = w.role) END]
        AND (p.polname IS NOT NULL OR w.role IS NOT NULL)
    LOOP
      IF item.polname IS NOT NULL THEN
        EXECUTE format('DROP POLICY %I ON %I.%I', item.policy, target, name);
      END IF;
      IF item.role IS NOT NULL THEN
        EXECUTE format('CREATE POLICY %I ON %I.%I TO %s USING %s WITH CHECK %s', item.policy, target, name,
          CASE WHEN item.role = 'public' THEN 'PUBLIC' ELSE quote_ident(item.role) END, item.rows, item.rows);
      END IF;
    END LOOP;
  END LOOP;

  -- Grants: what the operations need and nothing else, whatever was granted before.
  FOREACH role_name IN ARRAY array_remove(ARRAY[grantee, service], NULL) LOOP
    name := CASE WHEN role_name = 'public' THEN 'PUBLIC' ELSE quote_ident(role_name) END;
    users := concat_ws(', ', users, name);
    IF NOT has_schema_privilege(role_name, target, 'USAGE') THEN
      EXECUTE format('GRANT USAGE ON SCHEMA %I TO %s', target, name);
    END IF;
  END LOOP;
  owner := (SELECT relowner FROM pg_class WHERE oid = cache);
  FOR item IN
    SELECT 'TABLE ' || c.oid::regclass AS object, c.relowner AS owner, acl.grantees, false AS callable
    FROM pg_class c, LATERAL (
      SELECT array_agg(DISTINCT g.grantee) AS grantees FROM (
        SELECT c.relacl AS acl UNION ALL SELECT a.attacl FROM pg_attribute a WHERE a.attrelid = c.oid) t, aclexplode(t.acl) g) acl
    WHERE c.relnamespace = quote_ident(target)::regnamespace AND c.relname = ANY (tables)
    UNION ALL
    SELECT 'FUNCTION ' || p.oid::regprocedure, p.proowner,
           ARRAY(SELECT DISTINCT g.grantee FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) g), p.proname <> 'cache_stamp'
    FROM pg_proc p WHERE p.pronamespace = quote_ident(target)::regnamespace
      AND format('%s(%s) %s', p.proname, pg_get_function_identity_arguments(p.oid), pg_get_function_result(p.oid)) = ANY (functions)
  LOOP
    IF item.owner <> owner THEN
      EXECUTE format('ALTER %s OWNER TO %s', item.object, owner::regrole);
    END IF;
    FOR name IN SELECT CASE WHEN g = 0 THEN 'PUBLIC' ELSE g::regrole::text END
                FROM unnest(item.grantees) g WHERE g NOT IN (owner, item.owner) LOOP
      EXECUTE format('REVOKE ALL ON %s FROM %s CASCADE', item.object, name);
    END LOOP;
    IF item.callable THEN
      EXECUTE format('GRANT EXECUTE ON %s TO %s', item.object, users);
    END IF;
  END LOOP;
  EXECUTE format($$
    GRANT SELECT, DELETE, INSERT (user_id, key, value, value_bytes, expires_at),
      UPDATE (value, value_bytes, expires_at) ON %1$I.cache TO %2$s;
    GRANT SELECT, DELETE, INSERT, UPDATE (holder, expires_at) ON %1$I.cache_lease TO %2$s;
    GRANT SELECT, INSERT (only_row) ON %1$I.cache_epoch TO %2$s $$, target, users);

  PERFORM set_config('lock_timeout', timeout, true);
  PERFORM set_config('search_path', path, true);
END $setup$;
