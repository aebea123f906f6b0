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

	"github.com/lib/pq"
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
	// database. Then Get, GetMany, Exists and TTL answer most misses from a filter of
	// the keys, in memory: such a miss was true at some moment within the last
	// MaxStaleness, and what this Cache itself has written is never missed. What
	// another process wrote a moment ago may be. Every connection of the pool must
	// have the same current_user. Defaults to 0: every answer asks the database.
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
	tx   *sql.Tx  // where every statement runs, if made by WithTx
	inTx sync.Map // of *statement: the *sql.Stmt that tx has of it
}

// core is what a Cache shares with those that its WithTx returns.
type core struct {
	db    *sql.DB
	owned bool // the pool is closed with the cache
	pgx   bool // the driver is pgx, which ends a call with its ctx, giving the connection up
	pq    bool // the driver is lib/pq
	cfg   Config
	stats counters

	stmt struct {
		get, set, del, exists               *statement
		ttl, expire, persist, cleanup       *statement
		getMany, setMany, delMany, haveMany *statement
		add, increment, take                *statement
		keys, clear, clearLeases            *statement
		acquire, renew, release             *statement
		look, store                         *statement
		since, page, beginEpoch             *statement
	}

	negative *negative // nil without MaxStaleness

	// The operations that merge concurrent calls.
	gets       coalescer[string, lookup]
	sets       coalescer[entry, struct{}]
	deletes    coalescer[string, bool]
	existences coalescer[string, bool]

	// Work that outlives the call that started it, until Close.
	ctx     context.Context
	stop    context.CancelFunc
	mu      sync.Mutex // guards closed against running.Add
	closed  atomic.Bool
	running sync.WaitGroup

	flights  flights[answer]
	leaseFor time.Duration // the constant, but in tests
}

// New returns a cache over db, which stays the caller's to close. It does no I/O;
// with a CleanupInterval it starts a goroutine, which ends with Close. The error
// matches ErrInvalidConfig.
func New(db *sql.DB, cfg Config) (*Cache, error) {
	if db == nil {
		return nil, prefixed("new", fmt.Errorf("%w: db is nil", ErrInvalidConfig))
	}
	if err := cfg.check(); err != nil {
		return nil, prefixed("new", err)
	}
	c := &Cache{core: &core{
		db:       db,
		pgx:      driverFrom(db.Driver(), "github.com/jackc/pgx"),
		pq:       driverFrom(db.Driver(), "github.com/lib/pq"),
		cfg:      cfg,
		leaseFor: leaseFor,
	}}
	c.ctx, c.stop = context.WithCancel(context.Background())
	c.flights = flights[answer]{ctx: c.ctx, run: c.background}
	sql := func(text string, args int) *statement {
		return newStatement(text, cfg.schema(), cfg.User, args)
	}
	one := func(text string, args int) *statement {
		s := sql(text, args)
		s.keys = 1
		return s
	}
	c.stmt.get = one(getSQL, 1)
	c.stmt.set = one(setSQL, 4)
	c.stmt.del = one(deleteSQL, 1)
	c.stmt.exists = one(existsSQL, 1)
	c.stmt.ttl = one(ttlSQL, 1)
	c.stmt.expire = one(expireSQL, 2)
	c.stmt.persist = one(persistSQL, 1)
	c.stmt.cleanup = sql(cleanupSQL, 2)
	c.stmt.getMany = sql(getManySQL, 1)
	c.stmt.setMany = sql(setManySQL, 4)
	c.stmt.delMany = sql(deleteManySQL, 1)
	c.stmt.haveMany = sql(existsManySQL, 1)
	c.stmt.add = one(addSQL, 4)
	c.stmt.increment = one(incrementSQL, 3)
	c.stmt.take = one(takeSQL, 1)
	c.stmt.keys = sql(keysSQL, 3)
	c.stmt.clear = sql(clearSQL, 2)
	c.stmt.clearLeases = sql(clearLeasesSQL, 0)
	c.stmt.acquire = sql(acquireSQL, 3)
	c.stmt.renew = sql(renewSQL, 3)
	c.stmt.release = sql(releaseSQL, 2)
	c.stmt.look = sql(lookSQL, 1)
	c.stmt.store = sql(storeSQL, 7)
	c.stmt.since = sql(sinceSQL, 3)
	c.stmt.page = sql(pageSQL, 1)
	c.stmt.beginEpoch = sql(beginEpochSQL, 0)
	if cfg.MaxStaleness > 0 {
		c.negative = newNegative(c)
	}

	keySize := func(key string) int { return len(key) }
	c.gets = coalescer[string, lookup]{one: c.getOne, many: c.getBatch, size: keySize, core: c.core}
	c.deletes = coalescer[string, bool]{one: c.deleteOne, many: c.deleteBatch, size: keySize, core: c.core}
	c.existences = coalescer[string, bool]{one: c.existsOne, many: c.existsBatch, size: keySize, core: c.core}
	c.sets = coalescer[entry, struct{}]{
		one:  func(ctx context.Context, e entry) (struct{}, error) { return struct{}{}, c.setOne(ctx, e) },
		many: c.setBatch,
		size: func(e entry) int { return len(e.key) + e.value.len() },
		core: c.core,
	}
	if cfg.CleanupInterval > 0 {
		c.background(c.cleanUp)
	}
	return c, nil
}

func (c *core) statements() []*statement {
	s := &c.stmt
	return []*statement{s.get, s.set, s.del, s.exists, s.ttl, s.expire, s.persist, s.cleanup,
		s.getMany, s.setMany, s.delMany, s.haveMany, s.add, s.increment, s.take, s.keys, s.clear, s.clearLeases,
		s.acquire, s.renew, s.release, s.look, s.store, s.since, s.page, s.beginEpoch}
}

// Open returns a cache over a pool of its own, on lib/pq, with at most 10
// connections. dsn is a URL or a list of key=value settings as lib/pq takes them;
// binary_parameters defaults to yes. It does no I/O; the pool is closed with the
// cache.
func Open(dsn string, cfg Config) (*Cache, error) {
	dsn, err := withDefaults(dsn, "binary_parameters=yes")
	if err != nil {
		return nil, prefixed("open", fmt.Errorf("%w: %w", ErrInvalidConfig, err))
	}
	connector, err := pq.NewConnector(dsn)
	if err != nil {
		return nil, prefixed("open", fmt.Errorf("%w: %w", ErrInvalidConfig, err))
	}
	return OpenConnector(connector, cfg)
}

// OpenConnector returns a cache over a pool of its own, with at most 10
// connections made by connector; those of a *Connector live for 45 minutes. It
// does no I/O; the pool is closed with the cache. Use DB to change its limits.
func OpenConnector(connector driver.Connector, cfg Config) (*Cache, error) {
	if connector == nil {
		return nil, prefixed("open", fmt.Errorf("%w: the connector is nil", ErrInvalidConfig))
	}
	const maxConns = 10
	db := sql.OpenDB(connector)
	db.SetMaxOpenConns(maxConns)
	db.SetMaxIdleConns(maxConns)
	if _, ok := connector.(*Connector); ok {
		db.SetConnMaxLifetime(tokenConnLifetime)
	}
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
	if c.tx != nil {
		return nil
	}
	c.mu.Lock()
	closed := c.closed.Swap(true)
	c.mu.Unlock()
	if closed {
		return nil
	}
	c.stop()
	c.running.Wait()
	for _, s := range c.statements() {
		s.close()
	}
	if !c.owned {
		return nil
	}
	if err := c.db.Close(); err != nil {
		return prefixed("close", err)
	}
	return nil
}

// WithTx returns a cache whose operations run inside tx, seen by others when tx
// commits and gone when it rolls back. An error that the server reports aborts tx,
// as any statement's would. Like tx it is for one goroutine at a time; it lives as
// long as tx and needs no Close.
func (c *Cache) WithTx(tx *sql.Tx) *Cache {
	return &Cache{core: c.core, tx: tx}
}

// coalesces reports whether concurrent calls are merged.
func (c *Cache) coalesces() bool { return c.tx == nil && !c.cfg.DisableCoalescing }

// background runs f on a goroutine that Close waits for, or, once the cache is
// closed, at once: then every statement fails.
func (c *core) background(f func()) {
	c.mu.Lock()
	if c.closed.Load() {
		c.mu.Unlock()
		f()
		return
	}
	c.running.Add(1)
	c.mu.Unlock()
	go func() {
		defer c.running.Done()
		f()
	}()
}

// report gives an error of background work to the user.
func (c *core) report(op string, err error) {
	err = c.fail(context.Background(), op, err)
	if c.cfg.OnError != nil {
		c.cfg.OnError(err)
	}
}

// Set stores value under key, replacing what is there, for ttl; 0 or NoExpiry
// keeps it until it is deleted. A string, []byte, json.RawMessage or Value is
// stored byte for byte, anything else as JSON. Errors match ErrInvalidKey,
// ErrInvalidTTL, ErrValueTooLarge (over 256 MiB) or ErrNotPermitted; after any
// other error, that of ctx included, it is unknown whether the value was stored.
func (c *Cache) Set(ctx context.Context, key string, value any, ttl time.Duration) error {
	e, err := newEntry(key, value, ttl)
	if err == nil {
		err = c.set(ctx, e)
	}
	if err == nil {
		c.stats.sets.Add(1)
	}
	return c.fail(ctx, "set", err)
}

// entry is what a write stores.
type entry struct {
	key    string
	value  stored
	micros int64 // the TTL, or noTTL
}

// newEntry checks and encodes what a caller wants stored.
func newEntry(key string, value any, ttl time.Duration) (entry, error) {
	if err := checkKey(key); err != nil {
		return entry{}, err
	}
	micros, err := storeTTL(ttl)
	if err != nil {
		return entry{}, err
	}
	v, err := encode(value)
	return entry{key, v, micros}, err
}

const setSQL = `
INSERT INTO {schema}.cache (user_id, key, value, value_bytes, expires_at)
VALUES ({user}, $1, $2, $3, statement_timestamp() + $4::float8 * interval '1 microsecond')
ON CONFLICT (user_id, key) DO UPDATE
SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at`

func (c *Cache) set(ctx context.Context, e entry) error {
	if c.coalesces() {
		_, err := c.sets.do(ctx, e)
		return err
	}
	return c.setOne(ctx, e)
}

func (c *Cache) setOne(ctx context.Context, e entry) error {
	c.enter(e.key)
	defer c.enter(e.key)
	value, valueBytes := e.value.arguments()
	_, err := c.exec(ctx, c.stmt.set, c.args(e.key, value, valueBytes, ttlArgument(e.micros))...)
	return err
}

// Get looks key up and, when it is there, fills dest: a *string, *[]byte,
// *json.RawMessage or *Value with the stored bytes, an *any with the parsed JSON
// or, where they are no JSON, the text, and any other pointer by json.Unmarshal.
// With a nil dest it only tells whether the key is there. A miss is not an error
// and leaves dest alone; found with an error means a value that does not decode.
func (c *Cache) Get(ctx context.Context, key string, dest any) (found bool, err error) {
	if err = checkKey(key); err == nil {
		err = checkDest(dest)
	}
	var v stored
	if err == nil {
		if c.absent(key) {
			return false, nil
		}
		v, found, err = c.get(ctx, key)
		c.answered(key, found, err)
	}
	if err == nil {
		c.stats.lookup(found)
	}
	if found && err == nil {
		err = v.decode(dest)
	}
	return found, c.fail(ctx, "get", err)
}

// LIMIT 1 tells the planner what the primary key would, if user_id, a text, were
// compared with anything but current_user, a name.
const getSQL = `
SELECT value, value_bytes FROM {schema}.cache
WHERE user_id = {user} AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp())
LIMIT 1`

func (c *Cache) get(ctx context.Context, key string) (v stored, found bool, err error) {
	if c.coalesces() {
		hit, err := c.gets.do(ctx, key)
		if err != nil || !hit.large {
			return hit.value, hit.found, err
		}
	}
	hit, err := c.getOne(ctx, key)
	return hit.value, hit.found, err
}

func (c *Cache) getOne(ctx context.Context, key string) (lookup, error) {
	var value, valueBytes any
	found, err := c.row(ctx, c.stmt.get, c.args(key), &value, &valueBytes)
	v, _ := fromColumns(value, valueBytes)
	return lookup{value: v, found: found}, err
}

// Delete removes key and reports whether it was there.
func (c *Cache) Delete(ctx context.Context, key string) (deleted bool, err error) {
	if err = checkKey(key); err == nil {
		deleted, err = c.delete(ctx, key)
	}
	if deleted {
		c.stats.deletes.Add(1)
	}
	return deleted, c.fail(ctx, "delete", err)
}

// What GetOrSet is loading must not be stored behind a Delete, and is not once its
// lease is gone. A lease that the statement sees, but no longer finds, has ended with
// the storing of an entry that it may not see: it has to run again.
const deleteSQL = `
WITH lease AS (DELETE FROM {schema}.cache_lease WHERE user_id = {user} AND key = $1 RETURNING key),
deleted AS (
  DELETE FROM {schema}.cache
  WHERE user_id = {user} AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp()) RETURNING key)
SELECT EXISTS (SELECT FROM {schema}.cache_lease WHERE user_id = {user} AND key = $1)
    AND NOT EXISTS (SELECT FROM lease) AS again,
  EXISTS (SELECT FROM deleted) AS deleted`

func (c *Cache) delete(ctx context.Context, key string) (bool, error) {
	if c.coalesces() {
		return c.deletes.do(ctx, key)
	}
	return c.deleteOne(ctx, key)
}

func (c *Cache) deleteOne(ctx context.Context, key string) (deleted bool, err error) {
	var again, more bool
	_, err = c.row(ctx, c.stmt.del, c.args(key), &again, &deleted)
	if err == nil && again {
		_, err = c.row(ctx, c.stmt.del, c.args(key), &again, &more)
	}
	return deleted || more, err
}

// Exists reports whether key is there.
func (c *Cache) Exists(ctx context.Context, key string) (exists bool, err error) {
	if err = checkKey(key); err == nil {
		if c.absent(key) {
			return false, nil
		}
		exists, err = c.exists(ctx, key)
		c.answered(key, exists, err)
	}
	if err == nil {
		c.stats.lookup(exists)
	}
	return exists, c.fail(ctx, "exists", err)
}

const existsSQL = `
SELECT EXISTS (SELECT FROM {schema}.cache
WHERE user_id = {user} AND key = $1 AND (expires_at IS NULL OR expires_at > statement_timestamp()))`

func (c *Cache) exists(ctx context.Context, key string) (bool, error) {
	if c.coalesces() {
		return c.existences.do(ctx, key)
	}
	return c.existsOne(ctx, key)
}

func (c *Cache) existsOne(ctx context.Context, key string) (exists bool, err error) {
	_, err = c.row(ctx, c.stmt.exists, c.args(key), &exists)
	return exists, err
}
