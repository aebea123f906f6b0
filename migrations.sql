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
-- Errors of its own: FPG01 something else bears one of the names; FPG02 another
-- role owns one of the objects; FPG03 this server or database will not do.
DO $setup$
DECLARE
  target    text := coalesce(nullif(current_setting('fastpgcache.schema', true), ''), current_schema());
  path      text := current_setting('search_path');
  grantee   text := coalesce(nullif(current_setting('fastpgcache.grantee', true), ''), 'public');
  service   text := nullif(current_setting('fastpgcache.service', true), '');
  force     boolean := coalesce(nullif(current_setting('fastpgcache.force', true), ''), 'off')::boolean;
  tables    constant text[] := ARRAY['cache', 'cache_epoch', 'cache_lease'];
  functions constant text[] := ARRAY['cache_set(text,text,text,integer)', 'cache_get(text,text)',
    'cache_delete(text,text)', 'cache_exists(text,text)', 'cache_ttl(text,text)', 'cache_cleanup()',
    'cache_cleanup_blocks(bigint,integer,interval)', 'cache_stamp()'];
  columns   text[];  -- of the table cache as it was found; NULL when there is none
  owner     regrole;
  name      text;
  role_name text;
  item      record;
BEGIN
  -- Concurrent set-ups go one after the other.
  PERFORM pg_advisory_xact_lock(7306010338411931507);

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

  -- From here on a name means the one in the target schema, also where the
  -- session has a temporary table of that name.
  PERFORM set_config('search_path', format('%I, pg_temp', target), true);
  IF current_setting('lock_timeout') = '0' THEN
    PERFORM set_config('lock_timeout', '10s', true);
  END IF;

  -- What bears our names must be ours, and its owner's rights ours to use:
  -- whoever owns the table is not confined by its policies.
  FOREACH name IN ARRAY tables LOOP
    SELECT c.oid, c.relkind, c.relowner::regrole AS owner, obj_description(c.oid, 'pg_class') AS comment,
           ARRAY(SELECT a.attname::text FROM pg_attribute a
                 WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY 1) AS columns,
           EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary
                   AND ARRAY(SELECT a.attname::text FROM unnest(i.indkey) WITH ORDINALITY k(num, ord)
                             JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.num ORDER BY k.ord)
                       = ARRAY['user_id', 'key']) AS keyed
      INTO item FROM pg_class c WHERE c.relname = name AND c.relnamespace = quote_ident(target)::regnamespace;
    CONTINUE WHEN NOT FOUND;
    IF item.relkind <> 'r' OR NOT coalesce(item.comment LIKE 'fastpgcache %', false)
       AND NOT (name = 'cache' AND item.keyed AND item.columns
                = ARRAY['accessed_at', 'created_at', 'expires_at', 'key', 'user_id', 'value']) THEN
      RAISE EXCEPTION '"%"."%" exists and is no table of fastpgcache', target, name USING ERRCODE = 'FPG01';
    END IF;
    IF NOT pg_has_role(item.owner, 'MEMBER') THEN
      RAISE EXCEPTION '"%"."%" belongs to role %, of which % is no member', target, name, item.owner, current_user
        USING ERRCODE = 'FPG02';
    END IF;
    IF name = 'cache' AND substring(item.comment FROM 'schema (\d+)')::integer > 1 THEN
      RAISE EXCEPTION '"%"."%" was set up by a newer version of fastpgcache', target, name USING ERRCODE = 'FPG03';
    END IF;
    IF force THEN
      EXECUTE format('DROP TABLE %I', name);
    ELSIF name = 'cache' THEN
      columns := item.columns;
    END IF;
  END LOOP;
  FOREACH name IN ARRAY functions LOOP
    SELECT p.proowner::regrole AS owner INTO item FROM pg_proc p WHERE p.oid = to_regprocedure(name);
    IF FOUND AND NOT pg_has_role(item.owner, 'MEMBER') THEN
      RAISE EXCEPTION 'function "%".% belongs to role %, of which % is no member', target, name, item.owner, current_user
        USING ERRCODE = 'FPG02';
    END IF;
  END LOOP;

  -- The entries. No index holds a column that a Set on an existing key changes,
  -- and pages keep room, so that refreshing a value or its TTL is a HOT update.
  IF columns IS NULL THEN
    CREATE UNLOGGED TABLE cache (
      user_id     text COLLATE "C" NOT NULL DEFAULT current_user,
      key         text COLLATE "C" NOT NULL,
      value       text,
      value_bytes bytea,
      expires_at  timestamptz,
      created_at  timestamptz NOT NULL DEFAULT now(),
      created_xid bigint NOT NULL DEFAULT txid_current(),
      PRIMARY KEY (user_id, key),
      CONSTRAINT cache_one_value CHECK ((value IS NULL) <> (value_bytes IS NULL))
    );
  ELSIF 'accessed_at' = ANY (columns) THEN  -- the Python library's
    UPDATE cache SET created_at = now() WHERE created_at IS NULL;
    ALTER TABLE cache
      ALTER user_id TYPE text COLLATE "C", ALTER user_id SET DEFAULT current_user,
      ALTER key TYPE text COLLATE "C",
      ALTER value DROP NOT NULL,
      ALTER created_at SET DEFAULT now(), ALTER created_at SET NOT NULL,
      ADD value_bytes bytea,
      ADD created_xid bigint NOT NULL DEFAULT txid_current(),
      ADD CONSTRAINT cache_one_value CHECK ((value IS NULL) <> (value_bytes IS NULL)),
      DROP accessed_at;
    DROP INDEX IF EXISTS idx_cache_expires_at, idx_cache_user_id;
  END IF;
  IF to_regclass('cache_user_id_created_xid_idx') IS NULL THEN
    CREATE INDEX cache_user_id_created_xid_idx ON cache (user_id, created_xid);
  END IF;

  -- The epoch is lost with the entries, and nobody can choose its id.
  IF to_regclass('cache_epoch') IS NULL THEN
    CREATE UNLOGGED TABLE cache_epoch (
      only_row   boolean PRIMARY KEY DEFAULT true CHECK (only_row),
      id         uuid NOT NULL DEFAULT gen_random_uuid(),
      cleaned_at timestamptz  -- when a shared cleanup last reached the table's end
    );
    COMMENT ON TABLE cache_epoch IS 'fastpgcache epoch';
    INSERT INTO cache_epoch DEFAULT VALUES;
  END IF;

  -- Who loads a missing key at the moment.
  IF to_regclass('cache_lease') IS NULL THEN
    CREATE UNLOGGED TABLE cache_lease (
      user_id    text COLLATE "C" NOT NULL DEFAULT current_user,
      key        text COLLATE "C" NOT NULL,
      holder     text NOT NULL,
      expires_at timestamptz NOT NULL,
      PRIMARY KEY (user_id, key)
    );
    COMMENT ON TABLE cache_lease IS 'fastpgcache lease';
  END IF;

  -- Statistics of keys and values would tell others' key ranges through EXPLAIN,
  -- and no plan needs them.
  FOREACH name IN ARRAY ARRAY['key', 'value', 'value_bytes'] LOOP
    IF EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'cache'::regclass AND attname = name
               AND coalesce(attstattarget, -1) <> 0) THEN
      EXECUTE format('ALTER TABLE cache ALTER %I SET STATISTICS 0', name);
    END IF;
    IF name <> 'key' AND EXISTS (SELECT FROM pg_settings WHERE pg_settings.name = 'default_toast_compression' AND 'lz4' = ANY (enumvals))
       AND EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'cache'::regclass AND attname = name AND attcompression <> 'l') THEN
      EXECUTE format('ALTER TABLE cache ALTER %I SET COMPRESSION lz4', name);
    END IF;
  END LOOP;
  IF EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'cache'::regclass AND attname = 'created_xid' AND attoptions IS NULL) THEN
    ALTER TABLE cache ALTER created_xid SET (n_distinct = -1);
  END IF;
  IF NOT coalesce((SELECT reloptions @> ARRAY['fillfactor=70', 'autovacuum_vacuum_scale_factor=0.05']
                   FROM pg_class WHERE oid = 'cache'::regclass), false) THEN
    ALTER TABLE cache SET (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.2,
      autovacuum_vacuum_cost_delay = 0, toast.autovacuum_vacuum_scale_factor = 0.05, toast.autovacuum_vacuum_cost_delay = 0);
  END IF;

  -- created_xid always is the transaction that made the row's key visible.
  EXECUTE format($function$
    CREATE OR REPLACE FUNCTION cache_stamp() RETURNS trigger LANGUAGE plpgsql SET search_path = %I, pg_temp AS $$
    BEGIN
      NEW.created_xid := txid_current();
      RETURN NEW;
    END $$ $function$, target);
  IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'cache'::regclass AND tgname = 'cache_stamp_insert') THEN
    CREATE TRIGGER cache_stamp_insert BEFORE INSERT ON cache FOR EACH ROW
      WHEN (NEW.created_xid IS DISTINCT FROM txid_current()) EXECUTE FUNCTION cache_stamp();
    ALTER TABLE cache ENABLE ALWAYS TRIGGER cache_stamp_insert;
  END IF;
  IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'cache'::regclass AND tgname = 'cache_stamp_update') THEN
    CREATE TRIGGER cache_stamp_update BEFORE UPDATE OF user_id, key, created_xid ON cache FOR EACH ROW
      EXECUTE FUNCTION cache_stamp();
    ALTER TABLE cache ENABLE ALWAYS TRIGGER cache_stamp_update;
  END IF;

  -- The functions have the Python library's names, parameters and results.
  EXECUTE format($function$
    CREATE OR REPLACE FUNCTION cache_set(p_user_id text, p_key text, p_value text, p_ttl_seconds integer DEFAULT NULL)
    RETURNS boolean LANGUAGE sql SET search_path = %I, pg_temp AS $$
      INSERT INTO cache (user_id, key, value, value_bytes, expires_at)
      VALUES (p_user_id, p_key, p_value, NULL, statement_timestamp() + make_interval(secs => p_ttl_seconds))
      ON CONFLICT (user_id, key) DO UPDATE
      SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at;
      SELECT true;
    $$ $function$, target);
  EXECUTE format($function$
    CREATE OR REPLACE FUNCTION cache_get(p_user_id text, p_key text)
    RETURNS text LANGUAGE sql SET search_path = %I, pg_temp AS $$
      SELECT value FROM cache
      WHERE user_id = p_user_id AND key = p_key AND (expires_at IS NULL OR expires_at > statement_timestamp());
    $$ $function$, target);
  EXECUTE format($function$
    CREATE OR REPLACE FUNCTION cache_delete(p_user_id text, p_key text)
    RETURNS boolean LANGUAGE sql SET search_path = %I, pg_temp AS $$
      -- First and apart: the next statement sees what a load has stored by then.
      DELETE FROM cache_lease WHERE user_id = p_user_id AND key = p_key;
      WITH deleted AS (
        DELETE FROM cache
        WHERE user_id = p_user_id AND key = p_key AND (expires_at IS NULL OR expires_at > statement_timestamp())
        RETURNING true)
      SELECT EXISTS (SELECT FROM deleted);
    $$ $function$, target);
  EXECUTE format($function$
    CREATE OR REPLACE FUNCTION cache_exists(p_user_id text, p_key text)
    RETURNS boolean LANGUAGE sql SET search_path = %I, pg_temp AS $$
      SELECT EXISTS (SELECT FROM cache
        WHERE user_id = p_user_id AND key = p_key AND (expires_at IS NULL OR expires_at > statement_timestamp()));
    $$ $function$, target);
  EXECUTE format($function$
    CREATE OR REPLACE FUNCTION cache_ttl(p_user_id text, p_key text)
    RETURNS integer LANGUAGE sql SET search_path = %I, pg_temp AS $$
      SELECT coalesce((
        SELECT CASE WHEN isfinite(expires_at)
          THEN least(ceil(extract(epoch FROM expires_at - statement_timestamp())), 2147483647)::integer ELSE -1 END
        FROM cache
        WHERE user_id = p_user_id AND key = p_key AND (expires_at IS NULL OR expires_at > statement_timestamp())), -2);
    $$ $function$, target);

  -- Removes the expired entries, of every user, in p_blocks pages of the table
  -- from page p_first on; the next page to do, or NULL at the end. With p_every
  -- it takes part in a shared cleanup: removed is NULL when another process is
  -- at it, or was through less than p_every ago.
  EXECUTE format($function$
    CREATE OR REPLACE FUNCTION cache_cleanup_blocks(p_first bigint, p_blocks integer, p_every interval DEFAULT NULL,
      OUT removed integer, OUT next_block bigint)
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = %I, pg_temp AS $$
    DECLARE
      ends bigint := pg_relation_size('cache') / current_setting('block_size')::bigint;
    BEGIN
      IF p_every IS NOT NULL AND (
        NOT pg_try_advisory_xact_lock('cache'::regclass::oid::bigint << 32 | 7306010)
        OR p_first = 0 AND EXISTS (SELECT FROM cache_epoch WHERE cleaned_at > statement_timestamp() - p_every)) THEN
        RETURN;
      END IF;
      DELETE FROM cache
      WHERE ctid = ANY (ARRAY(
          SELECT ctid FROM cache
          WHERE ctid >= concat('(', p_first, ',0)')::tid
            AND ctid < concat('(', least(p_first + p_blocks, 4294967295), ',0)')::tid
            AND expires_at <= statement_timestamp()
          FOR UPDATE SKIP LOCKED))
        AND expires_at <= statement_timestamp();
      GET DIAGNOSTICS removed = ROW_COUNT;
      IF p_first + p_blocks < ends THEN
        next_block := p_first + p_blocks;
        RETURN;
      END IF;
      DELETE FROM cache_lease
      WHERE (user_id, key) IN (
        SELECT user_id, key FROM cache_lease WHERE expires_at <= statement_timestamp() FOR UPDATE SKIP LOCKED);
      IF p_every IS NOT NULL THEN
        UPDATE cache_epoch SET cleaned_at = statement_timestamp();
      END IF;
    END $$ $function$, target);
  EXECUTE format($function$
    CREATE OR REPLACE FUNCTION cache_cleanup()
    RETURNS integer LANGUAGE plpgsql SECURITY DEFINER SET search_path = %I, pg_temp AS $$
    DECLARE
      bite  record;
      total integer := 0;
      block bigint := 0;
    BEGIN
      WHILE block IS NOT NULL LOOP
        SELECT * INTO bite FROM cache_cleanup_blocks(block, 1024);
        total := total + bite.removed;
        block := bite.next_block;
      END LOOP;
      RETURN total;
    END $$ $function$, target);

  -- Row-level security. IS TRUE makes the policy a mere filter: left bare, the
  -- planner takes it for an index condition and picks the wrong index.
  FOREACH name IN ARRAY ARRAY['cache', 'cache_lease'] LOOP
    IF NOT (SELECT relrowsecurity FROM pg_class WHERE oid = name::regclass) THEN
      EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', name);
    END IF;
    FOR item IN
      SELECT w.policy, w.role, w.rows, p.polname
      FROM (VALUES ('cache_own_rows', grantee, '((user_id = current_user) IS TRUE)'),
                   ('cache_any_rows', service, '(true)')) w(policy, role, rows)
      LEFT JOIN pg_policy p ON p.polrelid = name::regclass AND p.polname = w.policy
      WHERE p.polroles IS DISTINCT FROM ARRAY[CASE WHEN w.role = 'public' THEN 0::oid
                                                   ELSE (SELECT r.oid FROM pg_roles r WHERE r.rolname = w.role) END]
        AND (p.polname IS NOT NULL OR w.role IS NOT NULL)
    LOOP
      IF item.polname IS NOT NULL THEN
        EXECUTE format('DROP POLICY %I ON %I', item.policy, name);
      END IF;
      IF item.role IS NOT NULL THEN
        EXECUTE format('CREATE POLICY %I ON %I TO %s USING %s WITH CHECK %s', item.policy, name,
          CASE WHEN item.role = 'public' THEN 'PUBLIC' ELSE quote_ident(item.role) END, item.rows, item.rows);
      END IF;
    END LOOP;
  END LOOP;

  -- Grants: what the operations need and nothing else, whatever was granted before.
  owner := (SELECT relowner::regrole FROM pg_class WHERE oid = 'cache'::regclass);
  FOREACH name IN ARRAY tables LOOP
    IF owner <> (SELECT relowner::regrole FROM pg_class WHERE oid = name::regclass) THEN
      EXECUTE format('ALTER TABLE %I OWNER TO %s', name, owner);
    END IF;
    FOR item IN
      SELECT DISTINCT g.grantee FROM (
        SELECT relacl AS acl FROM pg_class WHERE oid = name::regclass
        UNION ALL SELECT attacl FROM pg_attribute WHERE attrelid = name::regclass) t, aclexplode(t.acl) g
      WHERE g.grantee <> owner
    LOOP
      EXECUTE format('REVOKE ALL ON %I FROM %s CASCADE', name,
        CASE WHEN item.grantee = 0 THEN 'PUBLIC' ELSE item.grantee::regrole::text END);
    END LOOP;
  END LOOP;
  FOREACH name IN ARRAY functions LOOP
    IF owner <> (SELECT proowner::regrole FROM pg_proc WHERE oid = name::regprocedure) THEN
      EXECUTE format('ALTER FUNCTION %s OWNER TO %s', name, owner);
    END IF;
    FOR item IN
      SELECT DISTINCT g.grantee FROM pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) g
      WHERE p.oid = name::regprocedure AND g.grantee <> owner
    LOOP
      EXECUTE format('REVOKE ALL ON FUNCTION %s FROM %s CASCADE', name,
        CASE WHEN item.grantee = 0 THEN 'PUBLIC' ELSE item.grantee::regrole::text END);
    END LOOP;
  END LOOP;
  FOREACH role_name IN ARRAY array_remove(ARRAY[grantee, service], NULL) LOOP
    name := CASE WHEN role_name = 'public' THEN 'PUBLIC' ELSE quote_ident(role_name) END;
    IF NOT has_schema_privilege(role_name, target, 'USAGE') THEN
      EXECUTE format('GRANT USAGE ON SCHEMA %I TO %s', target, name);
    END IF;
    EXECUTE format('GRANT SELECT, DELETE, INSERT (user_id, key, value, value_bytes, expires_at),
      UPDATE (value, value_bytes, expires_at) ON cache TO %s', name);
    EXECUTE format('GRANT SELECT, DELETE, INSERT, UPDATE (holder, expires_at) ON cache_lease TO %s', name);
    EXECUTE format('GRANT SELECT, INSERT (only_row) ON cache_epoch TO %s', name);
    EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', array_to_string(array_remove(functions, 'cache_stamp()'), ', '), name);
  END LOOP;

  IF obj_description('cache'::regclass, 'pg_class') IS DISTINCT FROM 'fastpgcache schema 1' THEN
    COMMENT ON TABLE cache IS 'fastpgcache schema 1';
  END IF;
  PERFORM set_config('search_path', path, true);
END $setup$;
