// Command fastpgcache-admin sets the cache up in a database, tells how it is, and
// removes expired entries.
//
//	fastpgcache-admin --host db.example.org --database app --user admin --grant app_role
//	fastpgcache-admin status
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
	"math"
	"os"
	"os/signal"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/fastpgcache/fastpgcache"
)

const usage = `Usage: fastpgcache-admin [command] [flags]

Commands:
  setup    create the cache, or bring it up to date; the default
  status   tell whether the cache is there and how it is
  cleanup  remove expired entries, of every user that the role may act for
  sql      print what setup would run; needs no database
  version  print the version
  help     print this

Connection (of setup, status and cleanup):
  --host HOST        server, or the directory of its socket (localhost)
  --port PORT        (5432)
  --database NAME    (postgres)
  --user ROLE        (postgres)
  --password WORD    other users of this machine can see it: better set PGPASSWORD
  --dsn DSN          a URL, or key=value settings; the flags above win over it

  PGHOST, PGPORT, PGDATABASE, PGUSER, PGPASSWORD, PGPASSFILE and ~/.pgpass,
  PGSSLMODE, PGSSLROOTCERT, PGCONNECT_TIMEOUT, PGSERVICE and their like are read
  as psql reads them. Flags win over --dsn, and that over the environment.
  sslmode defaults to prefer.

Databricks Lakebase:
  --databricks           log in with a token of the workspace, which also knows the
                         host and the user, if they are not given
  --instance-name NAME   a provisioned instance, or
  --endpoint NAME        an autoscaling endpoint: projects/…/branches/…/endpoints/…
  --profile NAME         of ~/.databrickscfg; none in a notebook

The cache:
  --schema NAME      where it is (public); setup creates the schema if absent
  --grant ROLE       setup, sql: who may use it, each login that is a member of
                     the role confined to its own entries; public, none (who may
                     already; on the first set-up public)
  --service ROLE     setup, sql: who may act for any user; none (who may already)
  --max-size SIZE    setup, sql: what each user's entries may take (not yet enforced), such as 10GB;
                     none (what it is)
  --force            setup, sql: delete every entry. Nothing is asked
  --json             status: print JSON

Exit codes: 0 done, also where it was done already; 1 failed, or status found
something wrong; 2 not understood.
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

// options are the command line.
type options struct {
	command string
	set     map[string]bool // the flags that were given

	host, database, user, password, dsn string
	port                                uint

	databricks                  bool
	instance, endpoint, profile string

	setup fastpgcache.SetupConfig
	json  bool
}

// commands are what can be run, each with the flags it knows beside --schema.
var commands = map[string]struct {
	run   func(ctx context.Context, o *options, out, progress io.Writer) error
	flags []string
}{
	"setup":   {runSetup, append(setupFlags, connectionFlags...)},
	"status":  {runStatus, append([]string{"json"}, connectionFlags...)},
	"cleanup": {runCleanup, connectionFlags},
	"sql":     {runSQL, setupFlags},
	"version": {runVersion, nil},
}

var (
	setupFlags      = []string{"grant", "service", "max-size", "force"}
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
	if err := commands[o.command].run(ctx, o, stdout, stderr); err != nil {
		fmt.Fprintf(stderr, "fastpgcache-admin: %s: %s\n", o.command, explain(err, o))
		return exitFailure
	}
	return exitOK
}

// parse reads the command line: flags may stand before and after the command.
func parse(args []string) (*options, error) {
	o := &options{command: "setup", set: map[string]bool{}}
	flags := flag.NewFlagSet("fastpgcache-admin", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&o.host, "host", "", "")
	flags.UintVar(&o.port, "port", 0, "")
	flags.StringVar(&o.database, "database", "", "")
	flags.StringVar(&o.user, "user", "", "")
	flags.StringVar(&o.password, "password", "", "")
	flags.StringVar(&o.dsn, "dsn", "", "")
	flags.BoolVar(&o.databricks, "databricks", false, "")
	flags.StringVar(&o.instance, "instance-name", "", "")
	flags.StringVar(&o.endpoint, "endpoint", "", "")
	flags.StringVar(&o.profile, "profile", "", "")
	flags.StringVar(&o.setup.Schema, "schema", "public", "")
	flags.StringVar(&o.setup.Grantee, "grant", "", "")
	flags.StringVar(&o.setup.Service, "service", "", "")
	flags.Func("max-size", "", func(text string) (err error) {
		o.setup.MaxBytes, err = parseSize(text)
		return err
	})
	flags.BoolVar(&o.setup.Force, "force", false, "")
	flags.BoolVar(&o.json, "json", false, "")
	if err := parseFlags(flags, args); err != nil {
		return nil, err
	}
	if flags.NArg() > 0 {
		o.command = flags.Arg(0)
		if err := parseFlags(flags, flags.Args()[1:]); err != nil {
			return nil, err
		}
	}
	if o.command == "help" {
		return nil, flag.ErrHelp
	}
	command, ok := commands[o.command]
	switch {
	case !ok:
		return nil, errors.New("no such command (what stands there is not shown: it may be a password with a space)")
	case flags.NArg() > 0:
		return nil, errors.New("there is one argument too many (it is not shown: it may be a password with a space)")
	}
	flags.Visit(func(f *flag.Flag) { o.set[f.Name] = true })
	for name := range o.set {
		if name != "schema" && !slices.Contains(command.flags, name) {
			return nil, fmt.Errorf("--%s is none of %s's flags", name, o.command)
		}
	}
	if o.setup.Schema == "" {
		return nil, errors.New("--schema is empty")
	}
	if o.set["port"] && (o.port == 0 || o.port > 65535) {
		return nil, fmt.Errorf("--port %d is no port", o.port)
	}
	return o, o.checkDatabricks()
}

// invalidValue is package flag's error, which shows the value.
var invalidValue = regexp.MustCompile(`(?s)^invalid (?:boolean )?value ".*" for (?:flag )?-([a-z-]+): (.*)$`)

func parseFlags(flags *flag.FlagSet, args []string) error {
	err := flags.Parse(args)
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return err
	}
	if m := invalidValue.FindStringSubmatch(err.Error()); m != nil {
		return fmt.Errorf("--%s: %s", m[1], m[2])
	}
	return err
}

// parseSize reads a size as PostgreSQL writes one, in powers of 1,024; none is -1.
func parseSize(text string) (int64, error) {
	if text == "none" {
		return -1, nil
	}
	number := strings.TrimRight(text, "KMGTiBkb ")
	power, ok := map[string]int{"": 0, "B": 0, "K": 1, "M": 2, "G": 3, "T": 4}[strings.TrimSuffix(strings.TrimSuffix(strings.ToUpper(strings.TrimSpace(text[len(number):])), "B"), "I")]
	n, err := strconv.ParseFloat(number, 64)
	size := n * math.Pow(1024, float64(power))
	if !ok || err != nil || size < 1 || size > 1<<60 {
		return 0, errors.New("no size such as 500MB, 10GB or none")
	}
	return int64(size), nil
}

func (o *options) checkDatabricks() error {
	if !o.databricks {
		for _, name := range []string{"instance-name", "endpoint", "profile"} {
			if o.set[name] {
				return fmt.Errorf("--%s needs --databricks", name)
			}
		}
		return nil
	}
	if (o.instance == "") == (o.endpoint == "") {
		return errors.New("--databricks needs either --instance-name or --endpoint")
	}
	for _, name := range []string{"dsn", "password", "port"} {
		if o.set[name] {
			return fmt.Errorf("--%s does not go with --databricks", name)
		}
	}
	return nil
}

func runSQL(_ context.Context, o *options, out, _ io.Writer) error {
	text, err := fastpgcache.MigrationSQL(o.setup)
	if err != nil {
		return err
	}
	_, err = io.WriteString(out, text)
	return err
}

func runVersion(_ context.Context, _ *options, out, _ io.Writer) error {
	version := "(devel)"
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		version = info.Main.Version
	}
	schema, err := schemaVersion()
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "fastpgcache-admin %s, schema %d\n", strings.TrimPrefix(version, "v"), schema)
	return err
}
