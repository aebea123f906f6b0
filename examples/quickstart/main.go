// Quickstart sets a cache up and shows what it does, on a PostgreSQL of its own:
//
//	go run ./quickstart
//
// It runs the PostgreSQL that is installed on this machine, in a temporary
// directory; where none is, it downloads one, unless it is run as root. With -dsn
// it uses a server that runs already, in a schema and with two roles that it
// removes at the end; for that, the role of the DSN must be one that may create
// roles, such as a superuser.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
)

func main() {
	dsn := flag.String("dsn", "", "a server that runs already, a URL or key=value settings")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *dsn, os.Stdout); err != nil {
		stop()
		fmt.Fprintln(os.Stderr, "quickstart:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, dsn string, out io.Writer) (err error) {
	if dsn == "" {
		s, err := startServer(ctx, out)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.stop()) }()
		dsn = s.dsn
	}
	t, err := newTour(ctx, dsn, out)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	return t.run(ctx)
}
