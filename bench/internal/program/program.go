// Package program is what the programs of this module have in common.
package program

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"

	_ "github.com/lib/pq"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// Main runs a program until it ends or the user interrupts it. Its context may end, as a
// service's do.
func Main(run func(ctx context.Context) error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", filepath.Base(os.Args[0]), err)
		os.Exit(1)
	}
}

// WithServer runs f with a throwaway PostgreSQL that a cache is set up on, and its
// superuser's pool.
func WithServer(ctx context.Context, config pgtest.Config, f func(context.Context, *pgtest.Server, *sql.DB) error) (err error) {
	server, err := pgtest.Start(ctx, config)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.Stop()) }()
	db, err := sql.Open("postgres", server.DSN("postgres"))
	if err != nil {
		return err
	}
	defer db.Close()
	if err := fastpgcache.Setup(ctx, db, fastpgcache.SetupConfig{}); err != nil {
		return err
	}
	return f(ctx, server, db)
}

// Numbers reads numbers with commas between.
func Numbers(list string) (numbers []int, err error) {
	for text := range strings.SplitSeq(list, ",") {
		n, err := strconv.Atoi(text)
		if err != nil {
			return nil, err
		}
		numbers = append(numbers, n)
	}
	return numbers, nil
}
