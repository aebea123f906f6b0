package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/fastpgcache/fastpgcache"
)

// options are the command line.
type options struct {
	command  string
	argument string          // the key or prefix of get and keys
	set      map[string]bool // the flags that were given

	host, database, user, password, dsn string
	port                                uint
	address                             string // of the server, found out by connect

	databricks                  bool
	instance, endpoint, profile string

	setup  fastpgcache.SetupConfig
	shards int    // schemas that the cache is spread over; 0: it is one
	label  string // whose entries
	by     string // what top goes by
	limit  int    // of what is listed; 0: the command's own
	json   bool
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
	flags.IntVar(&o.shards, "shards", 0, "")
	flags.StringVar(&o.label, "label", "", "")
	flags.StringVar(&o.by, "by", "bytes", "")
	flags.IntVar(&o.limit, "limit", 0, "")
	flags.BoolVar(&o.json, "json", false, "")
	words, err := parseWords(flags, args)
	if err != nil {
		return nil, err
	}
	if len(words) > 0 {
		o.command, words = words[0], words[1:]
	}
	if o.command == "help" {
		return nil, flag.ErrHelp
	}
	command, ok := commands[o.command]
	switch {
	case !ok:
		return nil, errors.New("no such command (what stands there is not shown: it may be a password with a space)")
	case len(words) > command.words:
		return nil, errors.New("there is one argument too many (it is not shown: it may be a password with a space)")
	case len(words) > 0:
		o.argument = words[0]
	case o.command == "get":
		return nil, errors.New("get needs a key")
	}
	flags.Visit(func(f *flag.Flag) { o.set[f.Name] = true })
	for name := range o.set {
		if name != "schema" && name != "json" && !slices.Contains(command.flags, name) {
			return nil, fmt.Errorf("--%s is none of %s's flags", name, o.command)
		}
	}
	if o.setup.Schema == "" {
		return nil, errors.New("--schema is empty")
	}
	if o.set["shards"] && (o.shards < 1 || o.shards > maxShards) {
		return nil, fmt.Errorf("--shards %d is not between 1 and %d", o.shards, maxShards)
	}
	if o.set["port"] && (o.port == 0 || o.port > 65535) {
		return nil, fmt.Errorf("--port %d is no port", o.port)
	}
	if o.by != "bytes" && o.by != "age" {
		return nil, errors.New("--by knows bytes and age")
	}
	if o.limit < 0 {
		return nil, errors.New("--limit is negative")
	}
	return o, o.checkDatabricks()
}

// parseWords returns what is no flag: the command and its argument. Flags may stand
// before, between and behind them; "--" stands before a key that begins with a dash.
func parseWords(flags *flag.FlagSet, args []string) (words []string, err error) {
	for err = parseFlags(flags, args); err == nil && flags.NArg() > 0; err = parseFlags(flags, flags.Args()[1:]) {
		words = append(words, flags.Arg(0))
	}
	return words, err
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
