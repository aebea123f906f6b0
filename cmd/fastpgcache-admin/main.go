// Command fastpgcache-admin sets the cache up in a database, tells how it is, shows
// what is in it, and removes expired entries.
//
//	fastpgcache-admin --host db.example.org --database app --user admin --grant app_role
//	fastpgcache-admin status
//	fastpgcache-admin top
//	fastpgcache-admin cleanup
//	fastpgcache-admin sql --schema cache >cache.sql
//
// Run "fastpgcache-admin help" for all of it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"

	"github.com/fastpgcache/fastpgcache"
)

const usage = `Usage: fastpgcache-admin [command] [flags]

Commands:
  setup    create the cache, or bring it up to date; the default
  status   tell whether the cache is there and how it is, with hints
  top      list the users that take most, and the largest entries
  keys     list keys, or those with a prefix: keys session:
  get      print the value of a key: get session:42
  cleanup  remove expired entries, of every user that the role may act for
  sweep    remove entries from shards that they do not belong to, after a change
           of --shards
  sql      print what setup would run; needs no database
  version  print the version
  help     print this

Connection (of all but sql, version and help):
  --host HOST        server, or the directory of its socket (localhost)
  --port PORT        (5432)
  --database NAME    (postgres)
  --user ROLE        (postgres)
  --password WORD    other users of this machine can see it: better set PGPASSWORD
  --dsn DSN          a URL, or key=value settings; the flags above win over it. Other
                     users can see a password in it, too: better set PGPASSWORD

  PGHOST, PGPORT, PGDATABASE, PGUSER, PGPASSWORD, PGPASSFILE and ~/.pgpass,
  PGSSLMODE, PGSSLROOTCERT, PGCONNECT_TIMEOUT, PGSERVICE and their like are read
  as psql reads them. Flags win over --dsn, and that over the environment.
  sslmode defaults to prefer.

Databricks Lakebase:
  --databricks           log in with a token of the workspace, which also knows the
                         host and the user, if they are not given
  --instance-name NAME   an instance, or the autoscaling project that it became, or
  --endpoint NAME        an autoscaling endpoint: projects/…/branches/…/endpoints/…
  --profile NAME         of ~/.databrickscfg; none in a notebook

The cache:
  --schema NAME      where it is (public); setup creates the schema if absent
  --shards N         the N schemas NAME_0, NAME_1 and so on, where --schema is NAME
                     (cache): get, keys and sweep take them as one cache, the other
                     commands run for each
  --grant ROLE       setup, sql: who may use it, each login that is a member of
                     the role confined to its own entries; public, none (who may
                     already; on the first set-up public)
  --service ROLE     setup, sql: who may act for any user; none (who may already)
  --max-size SIZE    setup, sql: what each user's entries may take, such as 10GB;
                     none (what it is)
  --force            setup, sql: delete every entry. Nothing is asked
  --label NAME       get, keys, top: whose entries (get and keys: the role's own;
                     top: of everybody that the role may act for)
  --by WHAT          top: bytes, or age, the oldest first (bytes)
  --limit N          keys, top: how many are listed (keys: all; top: 10 of each)
  --json             print JSON; keys prints a JSON string on each line

Exit codes: 0 done, also where it was done already; 1 failed, status found
something wrong, or get found nothing; 2 not understood.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// Exit codes.
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 2
)

// commands are what can be run, each with the flags it knows beside --schema and --json.
var commands = map[string]struct {
	run   func(ctx context.Context, o *options, out, progress io.Writer) error
	flags []string
	words int  // that may follow: a key, or a prefix
	whole bool // it takes all shards as one cache; others run for each
}{
	"setup":   {runSetup, slices.Concat(setupFlags, connectionFlags), 0, false},
	"status":  {runStatus, append([]string{"shards"}, connectionFlags...), 0, false},
	"top":     {runTop, append([]string{"shards", "label", "by", "limit"}, connectionFlags...), 0, false},
	"keys":    {runKeys, append([]string{"shards", "label", "limit"}, connectionFlags...), 1, true},
	"get":     {runGet, append([]string{"shards", "label"}, connectionFlags...), 1, true},
	"cleanup": {runCleanup, append([]string{"shards"}, connectionFlags...), 0, false},
	"sweep":   {runSweep, append([]string{"shards"}, connectionFlags...), 0, true},
	"sql":     {runSQL, setupFlags, 0, false},
	"version": {runVersion, nil, 0, false},
}

var (
	setupFlags      = []string{"shards", "grant", "service", "max-size", "force"}
	connectionFlags = []string{"host", "port", "database", "user", "password", "dsn", "databricks", "instance-name", "endpoint", "profile"}
)

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, usage)
		return exitOK
	case err != nil:
		fmt.Fprintf(stderr, "fastpgcache-admin: %v\nRun \"fastpgcache-admin help\" for the commands and flags.\n", err)
		return exitUsage
	}
	if failed, err := runEach(ctx, o, stdout, stderr); err != nil {
		fmt.Fprintf(stderr, "fastpgcache-admin: %s: %s\n", o.command, explain(err, failed))
		return exitFailure
	}
	return exitOK
}

func runSQL(_ context.Context, o *options, out, _ io.Writer) error {
	text, err := fastpgcache.MigrationSQL(o.setup)
	if err != nil {
		return err
	}
	return o.tell(out, migration{text})
}

type migration struct {
	SQL string `json:"sql"`
}

func (m migration) print(w io.Writer) { io.WriteString(w, m.SQL) }

func runVersion(_ context.Context, o *options, out, _ io.Writer) error {
	v := version{Version: "(devel)"}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		v.Version = strings.TrimPrefix(info.Main.Version, "v")
	}
	var err error
	if v.Schema, err = schemaVersion(); err != nil {
		return err
	}
	return o.tell(out, v)
}

type version struct {
	Version string `json:"version"`
	Schema  int    `json:"schema"`
}

func (v version) print(w io.Writer) {
	fmt.Fprintf(w, "fastpgcache-admin %s, schema %d\n", v.Version, v.Schema)
}
