package fastpgcache

import (
	"database/sql"
	"database/sql/driver"
	"errors"
)

// Stand-ins for fastpgcache.go; delete this file when it is there.

var ErrInvalidConfig = errors.New("invalid configuration")

type Config struct{}

type Cache struct{ db *sql.DB }

func OpenConnector(c driver.Connector, cfg Config) (*Cache, error) {
	db := sql.OpenDB(c)
	if _, ok := c.(*Connector); ok {
		db.SetConnMaxLifetime(tokenConnLifetime)
	}
	return &Cache{db: db}, nil
}

func (c *Cache) DB() *sql.DB  { return c.db }
func (c *Cache) Close() error { return c.db.Close() }
