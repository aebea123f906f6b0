package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	_ "github.com/lib/pq"
	"github.com/maypok86/otter/v2"
	"github.com/redis/go-redis/v9"
	"github.com/redis/rueidis"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/bench/internal/peers"
)

const ttl = time.Hour

// system is a cache to measure.
type system struct {
	name  string
	get   func(ctx context.Context, key string, v *string) error // a miss is an error
	set   func(ctx context.Context, key, value string) error
	stats func() fastpgcache.Stats // of local
	close func()
}

var errMiss = errors.New("miss")

// servers are the throwaway PostgreSQL and Redis.
type servers struct{ *peers.Servers }

func startServers(ctx context.Context) (*servers, error) {
	s, err := peers.Start(ctx)
	return &servers{s}, err
}

func (s *servers) cache(staleness time.Duration) (*fastpgcache.Cache, error) {
	return fastpgcache.Open(s.DSN(), fastpgcache.Config{MaxStaleness: staleness})
}

func (s *servers) open(ctx context.Context, name string) (*system, error) {
	sys := &system{name: name}
	switch name {
	case "local", "asking":
		d := *staleness
		if name == "asking" {
			d = 0
		}
		c, err := s.cache(d)
		if err != nil {
			return nil, err
		}
		sys.get = func(ctx context.Context, key string, v *string) error {
			found, err := c.Get(ctx, key, v)
			if err == nil && !found {
				return errMiss
			}
			return err
		}
		sys.set = func(ctx context.Context, key, value string) error { return c.Set(ctx, key, value, ttl) }
		sys.stats = c.Stats
		sys.close = func() { c.Close() }
	case "go-redis", "go-redis-cached": // since v9.22 it keeps values, too, and hears of changes every 5 ms
		o := &redis.Options{Addr: s.Redis}
		if name == "go-redis-cached" {
			o.Protocol, o.ClientSideCacheConfig = 3, &redis.ClientSideCacheConfig{MaxMemoryBytes: 64 << 20}
		}
		c := redis.NewClient(o)
		sys.get = func(ctx context.Context, key string, v *string) (err error) {
			*v, err = c.Get(ctx, key).Result()
			return err
		}
		sys.set = func(ctx context.Context, key, value string) error { return c.Set(ctx, key, value, ttl).Err() }
		sys.close = func() { c.Close() }
	case "rueidis", "rueidis-docache":
		c, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{s.Redis}, DisableCache: name == "rueidis"})
		if err != nil {
			return nil, err
		}
		sys.get = func(ctx context.Context, key string, v *string) (err error) {
			*v, err = c.Do(ctx, c.B().Get().Key(key).Build()).ToString()
			return err
		}
		if name == "rueidis-docache" {
			sys.get = func(ctx context.Context, key string, v *string) (err error) {
				*v, err = c.DoCache(ctx, c.B().Get().Key(key).Cache(), ttl).ToString()
				return err
			}
		}
		sys.set = func(ctx context.Context, key, value string) error {
			return c.Do(ctx, c.B().Set().Key(key).Value(value).Ex(ttl).Build()).Error()
		}
		sys.close = c.Close
	case "otter":
		c := otter.Must(&otter.Options[string, string]{MaximumWeight: 64 << 20, Weigher: func(key, value string) uint32 { return uint32(192 + len(key) + len(value)) }})
		sys.get = func(_ context.Context, key string, v *string) error {
			value, ok := c.GetIfPresent(key)
			if !ok {
				return errMiss
			}
			*v = value
			return nil
		}
		sys.set = func(_ context.Context, key, value string) error { c.Set(key, value); return nil }
		sys.close = func() { c.InvalidateAll() }
		for _, key := range keyNames() {
			c.Set(key, string(make([]byte, valueBytes)))
		}
	default:
		return nil, fmt.Errorf("no system %q", name)
	}
	return sys, nil
}
