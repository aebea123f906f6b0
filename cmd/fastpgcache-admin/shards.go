package main

import (
	"context"
	"fmt"
	"io"
	"strconv"

	"github.com/fastpgcache/fastpgcache"
)

// maxShards bounds --shards: each has tables of its own.
const maxShards = 1024

// shardOptions are the options for each shard: the schemas NAME_0, NAME_1 and so on.
func (o *options) shardOptions() []*options {
	name := o.setup.Schema
	if !o.set["schema"] {
		name = "cache"
	}
	all := make([]*options, o.shards)
	for i := range all {
		shard := *o
		shard.setup.Schema = name + "_" + strconv.Itoa(i)
		shard.setup.Citus = true
		all[i] = &shard
	}
	return all
}

// runEach runs a command for each shard, or once, if it is about all of them. One that fails does not keep the others from
// their turn; the first failure is returned, with its options.
func runEach(ctx context.Context, o *options, out, progress io.Writer) (*options, error) {
	if o.shards == 0 || commands[o.command].whole {
		return o, commands[o.command].run(ctx, o, out, progress)
	}
	var failed *options
	var first error
	for _, shard := range o.shardOptions() {
		if err := commands[o.command].run(ctx, shard, out, progress); err != nil && first == nil {
			failed, first = shard, err
		}
		if ctx.Err() != nil {
			break
		}
	}
	if first != nil {
		first = fmt.Errorf("schema %q: %w", failed.setup.Schema, first)
	}
	return failed, first
}

const allUsersSQL = `
WITH RECURSIVE users(name) AS (
  SELECT min(user_id) FROM %[1]s.cache
  UNION ALL
  SELECT (SELECT min(user_id) FROM %[1]s.cache WHERE user_id > name) FROM users WHERE name IS NOT NULL)
SELECT name FROM users WHERE name IS NOT NULL`

// runSweep does what Cache.Sweep does, for every user. A shard's name is its schema's.
func runSweep(ctx context.Context, o *options, out, _ io.Writer) error {
	if o.shards == 0 {
		return &adviceError{"sweep needs --shards", "Name as many as the services use."}
	}
	done := sweep{Shards: o.shards}
	var of *server
	users := make(map[string]bool)
	for _, shard := range o.shardOptions() {
		s, err := openShard(ctx, shard)
		if err != nil {
			return err
		}
		defer s.Close()
		rows, err := s.QueryContext(ctx, fmt.Sprintf(allUsersSQL, s.schema))
		if err != nil {
			return err
		}
		names, err := texts(rows)
		if err != nil {
			return err
		}
		for _, name := range names {
			users[name] = true
		}
		of = s
	}
	for user := range users {
		n, err := o.sweepUser(ctx, of, user)
		if done.Removed += int64(n); err != nil {
			return fmt.Errorf("user %q: %w", user, err)
		}
	}
	return o.tell(out, done)
}

// openShard logs in where there is a cache that is to be trusted, and that the library knows.
func openShard(ctx context.Context, shard *options) (*server, error) {
	s, t, err := open(ctx, shard)
	if err == nil {
		if err = t.old(shard); err == nil {
			return s, nil
		}
		s.Close()
	}
	if shard.shards > 0 {
		err = fmt.Errorf("schema %q: %w", shard.setup.Schema, err)
	}
	return nil, err
}

// sweepUser sweeps one user's entries.
func (o *options) sweepUser(ctx context.Context, s *server, user string) (int, error) {
	cache, err := o.sharded(ctx, s, user)
	if err != nil {
		return 0, err
	}
	defer cache.Close()
	return cache.Sweep(ctx)
}

// sharded returns the shards as one cache, of one user's entries.
func (o *options) sharded(ctx context.Context, s *server, user string) (*fastpgcache.Cache, error) {
	shards := make(map[string]*fastpgcache.Cache)
	for _, shard := range o.shardOptions() {
		name := shard.setup.Schema
		citus, err := s.distributed(ctx, name)
		if err != nil {
			return nil, err
		}
		cache, err := fastpgcache.New(s.DB, fastpgcache.Config{Schema: name, User: user, Citus: citus, DisableCoalescing: true, DisablePrepare: true})
		if err != nil {
			return nil, err
		}
		shards[name] = cache
	}
	return fastpgcache.NewSharded(shards)
}

type sweep struct {
	Shards  int   `json:"shards"`
	Removed int64 `json:"removed"`
}

func (s sweep) print(w io.Writer) {
	fmt.Fprintf(w, "Removed %s from shards that they do not belong to.\n", count(s.Removed, "entry", "entries"))
}
