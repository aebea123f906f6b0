package fastpgcache

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"github.com/lib/pq"

	"github.com/fastpgcache/fastpgcache/internal/conninfo"
)

// Config says how a Cache behaves. The zero value is ready for use.
type Config struct {
	// Schema holds the cache's table. Defaults to "public".
	Schema string

	// User is whose entries these are. A label other than the connection's own
	// role needs the rights of SetupConfig.Service or of the table's owner; the
	// server enforces that. Defaults to the connection's role (current_user).
	User string

	// MaxStaleness lets Get, GetMany, Exists, TTL, GetOrSet and its kin answer from
	// memory, hits and misses. Each such answer was true at some moment within the last
	// MaxStaleness. This Cache's own completed writes are visible to it at once; what
	// another process has just written may be missed. No value outlives its TTL. Every
	// connection of the pool must have the same current_user and lead to one primary
	// server. Defaults to 0: every answer asks the database.
	MaxStaleness time.Duration

	// LocalBytes bounds the memory of values that are kept for such answers. A value
	// over a 64th of it is not kept. If negative, none are kept, and only misses are
	// answered from memory. Defaults to 64 MiB.
	LocalBytes int

	// Citus says that Citus keeps the schema on one of its nodes (SetupConfig.Citus). What
	// writes is other statements there. MaxStaleness is ErrInvalidConfig: nothing proves how
	// old an answer from memory is. Defaults to false.
	Citus bool

	// CleanupInterval is how often expired entries are removed in the background, from
	// New to Close: those that Cleanup would remove. Processes of one user share the
	// work. Defaults to 0: never.
	CleanupInterval time.Duration

	// DisableCoalescing makes each call a statement of its own instead of merging
	// concurrent ones. Defaults to false.
	DisableCoalescing bool

	// DisablePrepare sends each statement as text instead of preparing it once per
	// connection, as poolers that do not track prepared statements need it.
	// Defaults to false.
	DisablePrepare bool

	// OnError is called with errors of background work, on the goroutine that
	// does it. It must not call Close. Defaults to dropping them.
	OnError func(error)
}

func (cfg Config) schema() string {
	if cfg.Schema == "" {
		return "public"
	}
	return cfg.Schema
}

func (cfg Config) localBytes() int {
	if cfg.LocalBytes == 0 {
		return 64 << 20
	}
	return cfg.LocalBytes
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
	if cfg.Citus && cfg.MaxStaleness > 0 {
		return fmt.Errorf("%w: MaxStaleness does not go with Citus, where nothing proves how old an answer from memory is", ErrInvalidConfig)
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

// Cache is a cache in one PostgreSQL database, or spread over several by NewSharded, seen
// as one user. It is safe for concurrent use.
type Cache struct {
	*core
	tx     *transaction // where every statement runs, if made by WithTx; else nil
	shards *shards      // what it is made of; nil where it is one
}

// core is what a Cache shares with those that its WithTx returns.
type core struct {
	*tasks
	db    *sql.DB
	owned bool // the pool is closed with the cache
	pgx   bool // the driver is pgx, which ends a call with its ctx, giving the connection up
	pq    bool // the driver is lib/pq
	cfg   Config
	stats counters
	name  atomic.Pointer[string] // as a shard; nil: it is none

	statements *statements
	health     *statement
	single     single
	batches    batches
	ttls       ttls
	atomics    atomics
	walks      walks
	loads      loads

	local *local // nil without MaxStaleness
	feed  *feed
	quota *quota
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
		tasks:      newTasks(),
		db:         db,
		pgx:        driverFrom(db.Driver(), "github.com/jackc/pgx"),
		pq:         driverFrom(db.Driver(), "github.com/lib/pq"),
		cfg:        cfg,
		statements: newStatements(cfg),
	}}
	c.health = c.statements.new(pingSQL)
	c.single = newSingle(c)
	c.batches = newBatches(c)
	c.ttls = newTTLs(c)
	c.atomics = newAtomics(c)
	c.walks = newWalks(c)
	c.loads = newLoads(c)
	if cfg.MaxStaleness > 0 {
		c.local = newLocal(cfg.MaxStaleness, cfg.localBytes())
	}
	c.feed = newFeed(c, c.local)
	c.quota = newQuota(c)
	if cfg.CleanupInterval > 0 {
		c.run(c.cleanUp)
	}
	return c, nil
}

// Open returns a cache over a pool of its own, on lib/pq, with at most 10
// connections. dsn is a URL or a list of key=value settings as lib/pq takes them;
// binary_parameters defaults to yes. It does no I/O; the pool is closed with the
// cache.
func Open(dsn string, cfg Config) (*Cache, error) {
	server, err := conninfo.Parse(dsn, "binary_parameters=yes")
	if err != nil {
		return nil, prefixed("open", fmt.Errorf("%w: %w", ErrInvalidConfig, err))
	}
	if _, err := pq.NewConnectorConfig(server); err != nil {
		return nil, prefixed("open", fmt.Errorf("%w: %w", ErrInvalidConfig, err))
	}
	return OpenConnector(dsnConnector{server}, cfg)
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

// DB returns the pool that the cache runs on, nil for shards that are not all over one.
func (c *Cache) DB() *sql.DB { return c.db }

const pingSQL = `
SELECT {user} = current_role OR NOT row_security_active(to_regclass($1)::oid)
  OR EXISTS (SELECT FROM pg_policy, unnest(polroles) r(role)
    WHERE polrelid = to_regclass($1)::oid AND polname = 'cache_any_rows'::name AND pg_has_role(r.role, 'USAGE'::text))
FROM (SELECT FROM {schema}.cache WHERE user_id = {user} AND key = ''::text AND mark = 0::bigint) c
FULL JOIN (SELECT FROM {schema}.cache_lease WHERE user_id = {user} AND key = ''::text AND xid = 0::bigint) l ON true
FULL JOIN (SELECT FROM {schema}.cache_change WHERE user_id = {user} AND xid = 0::bigint) f ON true
RIGHT JOIN (SELECT) one ON true`

// Ping tells whether the cache is set up and this login may use it. The error matches
// ErrNotSetUp or ErrNotPermitted, or is the driver's. ErrNotPermitted is also for a login
// that may not act for Config.User.
func (c *Cache) Ping(ctx context.Context) error {
	_, err := everywhere(ctx, c, func(c *Cache) (struct{}, error) { return struct{}{}, c.ping(ctx) })
	return c.fail(ctx, "ping", err)
}

func (c *Cache) ping(ctx context.Context) error {
	may, _, err := first(query(ctx, c, c.health, c.args(pq.QuoteIdentifier(c.cfg.schema())+".cache"), func(rows *sql.Rows) (may bool, err error) {
		return may, rows.Scan(&may)
	}))
	if err == nil && !may {
		err = fmt.Errorf("%w: this login may not act for user %q", ErrNotPermitted, c.cfg.User)
	}
	return err
}

// Close stops background work and waits for it, for at most 5 seconds. Loaders of
// GetOrSet are such work: their ctx ends. It releases the prepared statements, and closes
// the pool if the cache owns it, and waits for at most 5 seconds for each of these. If
// something goes on for longer, Close returns an error. Operations after it fail with
// ErrClosed. Further calls do nothing, and so does Close on a cache that WithTx returned.
// Neither a loader nor Config.OnError may call it.
func (c *Cache) Close() error {
	if c.tx != nil || !c.close() {
		return nil
	}
	err := c.wait()
	if c.shards != nil {
		_, failed := everywhere(context.Background(), c, func(c *Cache) (struct{}, error) { return struct{}{}, c.Close() })
		err = errors.Join(err, failed)
	}
	steps := c.statements.closers()
	if c.owned {
		steps = append(steps, c.closePool)
	}
	// A driver may wait for the answer of a connection that is dead.
	err = errors.Join(err, inTime("a connection does not answer: it was not closed", steps...))
	if err != nil {
		return prefixed("close", err)
	}
	return nil
}

func (c *Cache) closePool() error {
	err := c.db.Close()
	if gone := new(net.OpError); errors.As(err, &gone) {
		return nil // nobody is there to say goodbye to
	}
	return err
}

// WithTx returns a cache whose operations run inside tx. Others see what they did when
// tx commits; it is gone when tx rolls back. tx may be of any pool on the same database.
// An error that the server reports aborts tx, as any statement's would. Like tx, the
// cache is for one goroutine at a time. It lives as long as tx and needs no Close. With
// a nil tx every operation is an error.
func (c *Cache) WithTx(tx *sql.Tx) *Cache {
	return c.in(newTransaction(tx, c.db))
}

// coalesces reports whether concurrent calls are merged.
func (c *Cache) coalesces() bool { return c.tx == nil && !c.cfg.DisableCoalescing }

// report gives an error of background work to the user.
func (c *core) report(op string, err error) {
	err = c.fail(context.Background(), op, err)
	if c.cfg.OnError != nil {
		c.cfg.OnError(err)
	}
}
