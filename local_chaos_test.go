package fastpgcache

import (
	"context"
	"database/sql"

	"github.com/fastpgcache/fastpgcache/internal/history"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// chaos is what an administrator does.
type chaos struct {
	actor
	server *pgtest.Server
	user   string
}

// restore brings entries of which nobody hears, as a dump does that is restored.
func (c *chaos) restore(ctx context.Context) error {
	start := history.Now()
	tx, err := c.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	exec := func(statement string, args ...any) {
		if err == nil {
			_, err = tx.ExecContext(ctx, statement, args...)
		}
	}
	exec(`ALTER TABLE cache DISABLE TRIGGER ALL`)
	stored := map[int]int64{}
	for key := window() + modelKeys/4; len(stored) < 8; key++ {
		value, text := c.Value()
		stored[key] = value
		exec(`INSERT INTO cache (user_id, key, value) VALUES ($1, $2, $3)
			ON CONFLICT (user_id, key) DO UPDATE SET value = excluded.value, value_bytes = NULL, expires_at = NULL`, c.user, name(key), text)
	}
	for _, trigger := range []string{"cache_changed_insert", "cache_changed_update", "cache_moved", "cache_deleted"} {
		exec(`ALTER TABLE cache ENABLE ALWAYS TRIGGER ` + trigger)
	}
	if err == nil {
		err = tx.Commit()
	}
	for key, value := range stored {
		c.Stored(key, value, start, 0, err)
	}
	return err
}

func (c *chaos) truncate(ctx context.Context) error {
	start := history.Now()
	_, err := c.db.ExecContext(ctx, `TRUNCATE cache`)
	c.Removed(history.AllKeys, start, err)
	return err
}

// fill inserts many keys that nobody asks for, so that catching up, and loading after the
// others, take their time.
func (c *chaos) fill(ctx context.Context) error {
	_, err := c.db.ExecContext(ctx, `DELETE FROM cache WHERE key LIKE '~%'`)
	if err == nil {
		_, err = c.db.ExecContext(ctx, `INSERT INTO cache (user_id, key, value) SELECT $1, '~' || i, '' FROM generate_series(1, 6000) i`, c.user)
	}
	return err
}

func (c *chaos) force(ctx context.Context) error {
	start := history.Now()
	err := Setup(ctx, c.db, SetupConfig{Force: true})
	c.Removed(history.AllKeys, start, err)
	return err
}

func (c *chaos) crash(ctx context.Context) error {
	start := history.Now()
	err := c.server.Crash(ctx)
	if err == nil {
		err = repair(ctx, c.db)
	}
	c.Removed(history.AllKeys, start, err)
	return err
}

// repair sees to what a server that commits asynchronously may have lost, or left.
func repair(ctx context.Context, db *sql.DB) error {
	for {
		var id string
		err := db.QueryRowContext(ctx, `SELECT gid FROM pg_prepared_xacts`).Scan(&id)
		if err != nil {
			return Setup(ctx, db, SetupConfig{})
		}
		db.ExecContext(ctx, `ROLLBACK PREPARED '`+id+`'`)
	}
}
