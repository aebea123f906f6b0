// Package fastpgcache gives a Go service Redis-style caching inside the PostgreSQL
// it already runs: entries with a TTL in an UNLOGGED table, through standard
// database/sql and any driver.
//
// Set the cache up once, as the role that shall own it: with the command
// fastpgcache-admin, with [Setup], or by applying migrations.sql. Then open it
// where it is used:
//
//	cache, err := fastpgcache.Open("host=db.example.com user=app dbname=shop", fastpgcache.Config{})
//	if err != nil {
//		return err
//	}
//	defer cache.Close()
//
//	sessions := fastpgcache.NewTyped[Session](cache, "session:")
//	err = sessions.Set(ctx, "42", session, 30*time.Minute)
//
//	s, found, err := sessions.Get(ctx, "42")
//
// [New] takes the *sql.DB that a service has, [OpenConnector] any
// [database/sql/driver.Connector], such as a [Connector], whose password is a
// token. [NewSharded] makes one cache of several. Package lakebase opens a cache
// in Databricks Lakebase by its name. Package cachetest gives tests a cache on a
// throwaway PostgreSQL.
//
// # Guarantees
//
// A login sees and writes only its own entries: row-level security enforces it.
// The server's clock alone decides when an entry expires; from then on no operation
// sees it. Reads change nothing. Whatever is stored comes back byte for byte. Each
// operation is one statement and, prepared, one round trip. Concurrent calls are
// merged into fewer statements, without waiting.
//
// The table is UNLOGGED. A clean restart of PostgreSQL keeps the entries; a crash,
// or a failover to a standby, loses all of them at once.
//
// # Local answers
//
// With [Config.MaxStaleness], Get, GetMany, Exists, TTL, GetOrSet and its kin answer
// hits and misses from the process' own memory where they can, in some 0.1 µs:
//
// An answer given without a query, hit or miss, was true at some moment within the last
// MaxStaleness. This Cache's own completed writes are visible to it at once; what it wrote
// through WithTx, from MaxStaleness after the commit. No value outlives its TTL. When that
// cannot be promised, the lookup goes to the database.
//
// docs/local.md tells what that costs, and how to choose the number.
//
// # Errors
//
// Errors match the sentinels of this package by [errors.Is] and wrap the driver's
// own. A miss is never an error. When the caller's ctx has ended, the error matches
// ctx.Err().
package fastpgcache
