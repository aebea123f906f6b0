package fastpgcache

import (
	"context"
	"database/sql"
	_ "embed"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/lib/pq"
)

//go:embed migrations.sql
var migrations string

// SetupConfig says what Setup creates, and for whom. What it does not say stays as
// an earlier set-up left it.
type SetupConfig struct {
	// Schema holds the table and the functions, and is created if absent.
	// Defaults to "public".
	Schema string

	// Grantee is the role that may use the cache: each login that is a member of it,
	// confined to its own entries. "public" is every role, "none" nobody. Defaults to
	// who may already, on the first set-up to "public".
	Grantee string

	// Service is the role that may act for any user label, or "none". Defaults to
	// who may already, on the first set-up to "none".
	Service string

	// MaxBytes is how much the entries of each user may take: keys, values as they are
	// stored, and 128 bytes a row. What is over it, in the background, is evicted: entries
	// that nobody reads before those that are read, the oldest first. docs/operations.md
	// tells more. Negative removes the limit. Defaults to the limit that there is, on the
	// first set-up to none.
	MaxBytes int64

	// Citus has Citus keep the schema on one of its nodes, where the database has that
	// extension; else it has no effect. Caches need Config.Citus then, and there is no limit
	// on size. Defaults to false: what Citus keeps stays there.
	Citus bool

	// Force creates the cache anew, which deletes every entry. Defaults to false:
	// what is there stays, and is upgraded if need be.
	Force bool
}

// SQLSTATEs that set-up can meet, the first two those of migrations.sql.
const (
	foreignObject    = "FPG01"
	foreignOwner     = "FPG02"
	undefinedObject  = "42704"
	invalidParameter = "22023"
	lockNotAvailable = "55P03"

	uniqueViolation   = "23505" // of a catalog's index
	duplicateSchema   = "42P06"
	duplicateTable    = "42P07"
	duplicateObject   = "42710"
	duplicateFunction = "42723"
)

// Setup creates the cache's tables, policies and functions, or brings them up to date, in
// one transaction. Whoever runs it owns them, and as their owner is not confined. It may
// be run any time, also by many processes at once. What it changes of SetupConfig it tells
// as a NOTICE. Errors match
//
//   - ErrInvalidConfig, also where a role does not exist, or nobody would be confined
//   - ErrNotPermitted, also where the schema, or one of the cache's objects, belongs to a
//     role without the rights of this one: that role could have anything run with them.
//     The error names the role to set up as
//   - ErrForeignTable, where something else bears the name of one of the cache's tables or
//     functions, or was attached to one. Force does not drop it
func Setup(ctx context.Context, db *sql.DB, cfg SetupConfig) error {
	start := time.Now()
	err := setup(ctx, db, cfg)
	for attempt := 1; attempt < setupAttempts && time.Since(start) < setupPatience && lostToConcurrentSetup(err) && sleep(ctx, backoff(attempt)); attempt++ {
		err = setup(ctx, db, cfg)
	}
	if err != nil {
		if ctxErr := ctx.Err(); ctxErr != nil {
			err = fmt.Errorf("%w: %w", ctxErr, err)
		}
		switch sqlState(err) {
		case foreignObject, duplicateTable, duplicateObject, duplicateFunction:
			err = fmt.Errorf("%w: %w", ErrForeignTable, err)
		case undefinedObject, invalidParameter:
			err = fmt.Errorf("%w: %w", ErrInvalidConfig, err)
		case foreignOwner, insufficientPrivilege:
			err = fmt.Errorf("%w: %w", ErrNotPermitted, err)
		case lockNotAvailable:
			err = fmt.Errorf("another transaction holds the cache's table for long, try again: %w", err)
		}
		return prefixed("setup", err)
	}
	return nil
}

// A set-up is tried a number of times, with pauses of 2 to 4 s in all, but not again once
// it has waited long for another.
const (
	setupAttempts = 12
	setupPatience = 20 * time.Second
)

// lostToConcurrentSetup reports whether running a set-up again may help: the very
// first ones have nothing to wait for each other on, and one that would have held up
// users of the cache for long has given up.
func lostToConcurrentSetup(err error) bool {
	switch sqlState(err) {
	case uniqueViolation, duplicateSchema, duplicateTable, duplicateObject, duplicateFunction, lockNotAvailable:
		return true
	}
	return lostToConcurrent(err)
}

func setup(ctx context.Context, db *sql.DB, cfg SetupConfig) error {
	if db == nil {
		return fmt.Errorf("%w: db is nil", ErrInvalidConfig)
	}
	migration, err := cfg.migration()
	if err != nil {
		return err
	}
	tx, err := db.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelReadCommitted})
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if _, err := tx.ExecContext(ctx, migration); err != nil {
		return err
	}
	return tx.Commit()
}

// MigrationSQL returns what Setup would run, for a DBA to review and apply with any tool:
// migrations.sql with what cfg says put into it. It is one statement, and needs no
// transaction around it. The error matches ErrInvalidConfig.
func MigrationSQL(cfg SetupConfig) (string, error) {
	migration, err := cfg.migration()
	if err != nil {
		return "", prefixed("migration", err)
	}
	return migration, nil
}

// settingsHere is a line of migrations.sql, before any setting is read.
const settingsHere = "  -- fastpgcache-admin sql puts settings here.\n"

func (cfg SetupConfig) migration() (string, error) {
	if cfg.Schema == "" {
		cfg.Schema = "public"
	}
	var lines strings.Builder
	for _, s := range []struct{ field, name, value string }{
		{"Schema", "schema", cfg.Schema},
		{"Grantee", "grantee", cfg.Grantee},
		{"Service", "service", cfg.Service},
		{"MaxBytes", "max_bytes", strconv.FormatInt(cfg.MaxBytes, 10)},
		{"Citus", "citus", strconv.FormatBool(cfg.Citus)},
		{"Force", "force", strconv.FormatBool(cfg.Force)},
	} {
		if err := checkIdentifier(s.field, s.value); err != nil {
			return "", err
		}
		fmt.Fprintf(&lines, "  PERFORM set_config('fastpgcache.%s', %s, true);\n", s.name, quoteInBody(s.value))
	}
	return strings.Replace(migrations, settingsHere, lines.String(), 1), nil
}

// quoteInBody makes a literal of value for the body of the DO statement, which a dollar
// sign could end.
func quoteInBody(value string) string {
	literal := strings.TrimSpace(pq.QuoteLiteral(value))
	if !strings.Contains(literal, "$") {
		return literal
	}
	return "E" + strings.ReplaceAll(strings.TrimPrefix(literal, "E"), "$", `\x24`)
}
