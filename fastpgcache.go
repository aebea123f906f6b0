package fastpgcache

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// Errors that callers can tell apart with errors.Is. Every error of this
// package wraps its cause, too, so that errors.As finds the driver's own.
var (
	ErrClosed        = errors.New("the cache is closed")
	ErrInvalidKey    = errors.New("invalid key")
	ErrInvalidTTL    = errors.New("invalid TTL")
	ErrInvalidConfig = errors.New("invalid configuration")
	ErrValueTooLarge = errors.New("value too large")
	ErrNotSetUp      = errors.New("the cache is not set up in this database")
	ErrNotPermitted  = errors.New("not permitted")
	ErrNotInteger    = errors.New("value is not a 64-bit integer, or the result would not be")
	ErrForeignTable  = errors.New("a table that is not the cache's has its name")
)

// Config says how a Cache behaves. The zero value is ready for use.
type Config struct {
	// Schema holds the cache's table. Defaults to "public".
	Schema string

	// User is whose entries these are. A label other than the connection's own
	// role needs the rights of SetupConfig.Service or of the table's owner; the
	// server enforces that. Defaults to the connection's role (current_user).
	User string

	// MaxStaleness is how old an answer may be that is given without asking the
	// database, as a miss may be. Every connection of the pool must then have the
	// same current_user. Defaults to 0: every answer asks the database.
	MaxStaleness time.Duration

	// CleanupInterval is how often expired entries, of every user, are removed in
	// the background, from New to Close. Processes with the same interval share
	// the work. Defaults to 0: never.
	CleanupInterval time.Duration

	// DisableCoalescing makes each call a statement of its own instead of merging
	// concurrent ones. Defaults to false.
	DisableCoalescing bool

	// DisablePrepare sends each statement as text instead of preparing it once per
	// connection, as poolers that do not track prepared statements need it.
	// Defaults to false.
	DisablePrepare bool

	// OnError is called with errors of background work, on the goroutine that
	// does it. Defaults to dropping them.
	OnError func(error)
}

func (cfg Config) schema() string {
	if cfg.Schema == "" {
		return "public"
	}
	return cfg.Schema
}

func (cfg Config) check() error {
	if err := checkIdentifier("Schema", cfg.schema()); err != nil {
		return err
	}
	if cfg.User != "" {
		if err := checkKey(cfg.User); err != nil {
			return fmt.Errorf("%w: User: %w", ErrInvalidConfig, err)
		}
	}
	if cfg.MaxStaleness < 0 || cfg.CleanupInterval < 0 {
		return fmt.Errorf("%w: MaxStaleness and CleanupInterval cannot be negative", ErrInvalidConfig)
	}
	return nil
}

// checkIdentifier refuses what PostgreSQL would refuse, or cut short, as the name
// of a schema or role.
func checkIdentifier(field, name string) error {
	const maxBytes = 63 // NAMEDATALEN - 1
	if len(name) > maxBytes || !isText(name) {
		return fmt.Errorf("%w: %s %q: want at most %d bytes of UTF-8 without NUL", ErrInvalidConfig, field, name, maxBytes)
	}
	return nil
}

// Cache is a cache in one PostgreSQL database, seen as one user. It is safe for
// concurrent use.
type Cache struct {
	*core
	tx *sql.Tx // where every statement runs, if made by WithTx
}

// core is what a Cache shares with those that its WithTx returns.
type core struct {
	db     *sql.DB
	owned  bool // the pool is closed with the cache
	cfg    Config
	closed atomic.Bool
	stats  counters

	stmt struct {
		get, set, del, exists, ttl, expire, persist, cleanup *statement
		add, increment, take, keys, clear, clearLeases       *statement
		acquire, renew, release, look, store                 *statement
	}

	mu         sync.Mutex      // guards the start of workers against Close
	background context.Context // of the workers; ended by Close
	stop       context.CancelFunc
	workers    sync.WaitGroup // background work, which Close awaits

	flights  flights
	leaseFor time.Duration // a constant but for tests
}

// New returns a cache over db, which stays the caller's to close. It does no I/O;
// with a CleanupInterval it starts a goroutine, which Close ends. The error matches
// ErrInvalidConfig.
func New(db *sql.DB, cfg Config) (*Cache, error) {
	if db == nil {
		return nil, fmt.Errorf("fastpgcache: new: %w: db is nil", ErrInvalidConfig)
	}
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("fastpgcache: new: %w", err)
	}
	c := &Cache{core: &core{db: db, cfg: cfg, leaseFor: leaseFor}}
	c.background, c.stop = context.WithCancel(context.Background())
	sql := func(op, text string, args int) *statement {
		return newStatement(op, text, cfg.schema(), cfg.User, args)
	}
	c.stmt.get = sql("get", getSQL, 1)
	c.stmt.set = sql("set", setSQL, 4)
	c.stmt.del = sql("delete", deleteSQL, 1)
	c.stmt.exists = sql("exists", existsSQL, 1)
	c.stmt.ttl = sql("ttl", ttlSQL, 1)
	c.stmt.expire = sql("expire", expireSQL, 2)
	c.stmt.persist = sql("persist", persistSQL, 1)
	c.stmt.cleanup = sql("cleanup", cleanupSQL, 3)
	c.stmt.add = sql("add", addSQL, 4)
	c.stmt.increment = sql("increment", incrementSQL, 3)
	c.stmt.take = sql("take", takeSQL, 1)
	c.stmt.keys = sql("keys", keysSQL, 3)
	c.stmt.clear = sql("clear", clearSQL, 1)
	c.stmt.clearLeases = sql("clear", clearLeasesSQL, 0)
	c.stmt.acquire = sql("get or set", acquireSQL, 3)
	c.stmt.renew = sql("get or set", renewSQL, 3)
	c.stmt.release = sql("get or set", releaseSQL, 2)
	c.stmt.look = sql("get or set", lookSQL, 1)
	c.stmt.store = sql("get or set", storeSQL, 6)
	for _, s := range []*statement{c.stmt.cleanup, c.stmt.keys, c.stmt.clear, c.stmt.clearLeases} {
		s.keyless = true
	}
	if cfg.CleanupInterval > 0 {
		c.start(c.cleanUp)
	}
	return c, nil
}

func (c *core) statements() []*statement {
	s := &c.stmt
	return []*statement{s.get, s.set, s.del, s.exists, s.ttl, s.expire, s.persist, s.cleanup,
		s.add, s.increment, s.take, s.keys, s.clear, s.clearLeases,
		s.acquire, s.renew, s.release, s.look, s.store}
}

// Open returns a cache over a pool of its own, on lib/pq, with at most 10
// connections. dsn is a URL or a list of key=value settings as lib/pq takes them;
// binary_parameters defaults to yes. It does no I/O; the pool is closed with the
// cache.
func Open(dsn string, cfg Config) (*Cache, error) {
	connector, err := newPQConnector(dsn)
	if err != nil {
		return nil, fmt.Errorf("fastpgcache: open: %w: %w", ErrInvalidConfig, err)
	}
	return OpenConnector(connector, cfg)
}

// OpenConnector returns a cache over a pool of its own, with at most 10
// connections made by connector. It does no I/O; the pool is closed with the
// cache. Use DB to change the pool's limits.
func OpenConnector(connector driver.Connector, cfg Config) (*Cache, error) {
	if connector == nil {
		return nil, fmt.Errorf("fastpgcache: open: %w: the connector is nil", ErrInvalidConfig)
	}
	const maxConns = 10
	db := sql.OpenDB(connector)
	db.SetMaxOpenConns(maxConns)
	db.SetMaxIdleConns(maxConns)
	c, err := New(db, cfg)
	if err != nil {
		db.Close()
		return nil, err
	}
	c.owned = true
	return c, nil
}

// DB returns the pool that the cache runs on.
func (c *Cache) DB() *sql.DB { return c.db }

// Close stops background work and waits for it, the loaders of GetOrSet included,
// whose ctx it ends; releases the prepared statements; and closes the pool if the
// cache owns it. Operations after it fail with ErrClosed; further calls do nothing,
// as on a cache that WithTx returned.
func (c *Cache) Close() error {
	if c.tx != nil || !c.stopWorkers() {
		return nil
	}
	c.closed.Store(true)
	for _, s := range c.statements() {
		s.close()
	}
	if !c.owned {
		return nil
	}
	if err := c.db.Close(); err != nil {
		return fmt.Errorf("fastpgcache: close: %w", err)
	}
	return nil
}

// start runs work on a goroutine that Close stops, by ctx, and awaits. It reports
// false, and runs nothing, once Close was called.
func (c *core) start(work func(ctx context.Context)) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.background.Err() != nil {
		return false
	}
	c.workers.Go(func() { work(c.background) })
	return true
}

// stopWorkers reports false to all but its first caller.
func (c *core) stopWorkers() bool {
	c.mu.Lock()
	stopped := c.background.Err() != nil
	c.stop()
	c.mu.Unlock()
	c.workers.Wait()
	return !stopped
}

// report hands an error of background work to the user.
func (c *core) report(err error) {
	if c.cfg.OnError != nil {
		c.cfg.OnError(err)
	}
}

// WithTx returns a cache whose operations run inside tx, seen by others when tx
// commits and gone when it rolls back. An error that the server reports aborts tx,
// as any statement's would. Like tx it is for one goroutine at a time; it lives as
// long as tx and needs no Close.
func (c *Cache) WithTx(tx *sql.Tx) *Cache {
	return &Cache{core: c.core, tx: tx}
}

// args completes a statement's arguments by the user label, if there is one.
func (c *core) args(args ...any) []any {
	if c.cfg.User == "" {
		return args
	}
	return append(args, c.cfg.User)
}

// Set stores value under key, replacing what is there, for ttl; 0 or NoExpiry
// keeps it until it is deleted. A string, []byte, json.RawMessage or Value is
// stored byte for byte, anything else as JSON. Errors match ErrInvalidKey,
// ErrInvalidTTL, ErrValueTooLarge (over 256 MiB) or ErrNotPermitted; after any
// other error, that of ctx included, it is unknown whether the value was stored.
func (c *Cache) Set(ctx context.Context, key string, value any, ttl time.Duration) error {
	const op = "set"
	if err := checkKey(key); err != nil {
		return c.fail(ctx, op, err)
	}
	micros, err := storeTTL(ttl)
	if err != nil {
		return c.fail(ctx, op, err)
	}
	v, err := encode(value)
	if err != nil {
		return c.fail(ctx, op, err)
	}
	if err := c.set(ctx, key, v, micros); err != nil {
		return err
	}
	c.stats.sets.Add(1)
	return nil
}

const setSQL = `
INSERT INTO {schema}.cache (user_id, key, value, value_bytes, expires_at)
VALUES ({user}, $1, $2, $3, statement_timestamp() + $4::bigint * interval '1 microsecond')
ON CONFLICT (user_id, key) DO UPDATE
SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at`

func (c *Cache) set(ctx context.Context, key string, v encoded, micros any) error {
	value, valueBytes := v.columns()
	_, err := c.exec(ctx, c.stmt.set, c.args(key, value, valueBytes, micros)...)
	return err
}

// Get looks key up and, when it is there, fills dest: a *string, *[]byte,
// *json.RawMessage or *Value with the stored bytes, an *any with the parsed JSON
// or, where they are no JSON, the text, and any other pointer by json.Unmarshal.
// With a nil dest it only tells whether the key is there. A miss is not an error
// and leaves dest alone; found with an error means a value that does not decode.
func (c *Cache) Get(ctx context.Context, key string, dest any) (found bool, err error) {
	const op = "get"
	if err := checkKey(key); err != nil {
		return false, c.fail(ctx, op, err)
	}
	if err := checkDest(dest); err != nil {
		return false, c.fail(ctx, op, err)
	}
	v, found, err := c.get(ctx, key)
	if err != nil {
		return false, err
	}
	c.stats.lookup(found)
	if !found {
		return false, nil
	}
	if err := decode(v, dest); err != nil {
		return true, c.fail(ctx, op, err)
	}
	return true, nil
}

const getSQL = `
SELECT value, value_bytes FROM {schema}.cache
WHERE user_id = {user} AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp())`

func (c *Cache) get(ctx context.Context, key string) (v Value, found bool, err error) {
	var value, valueBytes []byte
	found, err = c.row(ctx, c.stmt.get, c.args(key), &value, &valueBytes)
	if value == nil {
		value = valueBytes
	}
	return value, found, err
}

// Delete removes key and reports whether it was there.
func (c *Cache) Delete(ctx context.Context, key string) (deleted bool, err error) {
	if err := checkKey(key); err != nil {
		return false, c.fail(ctx, "delete", err)
	}
	deleted, err = c.delete(ctx, key)
	if deleted {
		c.stats.deletes.Add(1)
	}
	return deleted, err
}

// A load that is under way must not be stored behind a Delete: with its lease gone
// it cannot be. The lease that this statement sees and no longer finds ended with
// storing, maybe an entry that this statement does not see; then it runs again.
const deleteSQL = `
WITH lease AS (DELETE FROM {schema}.cache_lease WHERE user_id = {user} AND key = $1 RETURNING key),
entry AS (
  DELETE FROM {schema}.cache
  WHERE user_id = {user} AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp()) RETURNING key)
SELECT EXISTS (SELECT FROM {schema}.cache_lease WHERE user_id = {user} AND key = $1) AND NOT EXISTS (SELECT FROM lease) AS again,
  EXISTS (SELECT FROM entry) AS deleted`

func (c *Cache) delete(ctx context.Context, key string) (deleted bool, err error) {
	var again bool
	_, err = c.row(ctx, c.stmt.del, c.args(key), &again, &deleted)
	if err == nil && again {
		var deletedNow bool
		_, err = c.row(ctx, c.stmt.del, c.args(key), &again, &deletedNow)
		deleted = deleted || deletedNow
	}
	return deleted, err
}

// Exists reports whether key is there.
func (c *Cache) Exists(ctx context.Context, key string) (bool, error) {
	if err := checkKey(key); err != nil {
		return false, c.fail(ctx, "exists", err)
	}
	exists, err := c.exists(ctx, key)
	if err == nil {
		c.stats.lookup(exists)
	}
	return exists, err
}

const existsSQL = `
SELECT EXISTS (SELECT FROM {schema}.cache
WHERE user_id = {user} AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp()))`

func (c *Cache) exists(ctx context.Context, key string) (exists bool, err error) {
	_, err = c.row(ctx, c.stmt.exists, c.args(key), &exists)
	return exists, err
}
