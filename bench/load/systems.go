package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib"
	_ "github.com/lib/pq"
	"github.com/redis/go-redis/v9"
	"github.com/redis/rueidis"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

const ttl = time.Hour

// system is a cache to measure.
type system struct {
	name   string
	get    func(ctx context.Context, key string) error // a miss is an error
	set    func(ctx context.Context, key, value string) error
	server func() time.Duration // CPU time the server's processes have used
	close  func()
}

var errMiss = errors.New("miss")

// servers are the throwaway PostgreSQL and Redis.
type servers struct {
	pg       *pgtest.Server
	dsn      string
	redis    *exec.Cmd
	redisURL string
}

func startServers(ctx context.Context) (*servers, error) {
	s := &servers{}
	var err error
	if s.pg, err = pgtest.Start(ctx, pgtest.Config{Settings: map[string]string{"shared_buffers": "1GB"}}); err != nil {
		return nil, err
	}
	s.dsn = s.pg.DSN("postgres")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, errors.Join(err, s.stop())
	}
	s.redisURL = l.Addr().String()
	l.Close()
	_, port, _ := net.SplitHostPort(s.redisURL)
	s.redis = exec.CommandContext(ctx, "redis-server", "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
	if err := s.redis.Start(); err != nil {
		s.redis = nil
		return nil, errors.Join(fmt.Errorf("%w (install redis-server)", err), s.stop())
	}
	for range 100 {
		if conn, err := net.Dial("tcp", s.redisURL); err == nil {
			conn.Close()
			return s, nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return nil, errors.Join(errors.New("redis-server does not answer"), s.stop())
}

func (s *servers) stop() error {
	if s.redis != nil {
		s.redis.Process.Kill()
		s.redis.Wait()
	}
	return s.pg.Stop()
}

func (s *servers) open(ctx context.Context, name string) (*system, error) {
	sys := &system{name: name, server: s.postgresCPU}
	switch name {
	case "fastpgcache-pq", "fastpgcache-pgx", "uncoalesced-pq":
		cfg := fastpgcache.Config{DisableCoalescing: name == "uncoalesced-pq"}
		var c *fastpgcache.Cache
		var err error
		if name == "fastpgcache-pgx" {
			db, e := sql.Open("pgx", s.dsn)
			if e != nil {
				return nil, e
			}
			db.SetMaxOpenConns(10)
			db.SetMaxIdleConns(10)
			c, err = fastpgcache.New(db, cfg)
		} else {
			c, err = fastpgcache.Open(s.dsn, cfg)
		}
		if err != nil {
			return nil, err
		}
		sys.get = func(ctx context.Context, key string) error {
			var v string
			found, err := c.Get(ctx, key, &v)
			if err == nil && !found {
				return errMiss
			}
			return err
		}
		sys.set = func(ctx context.Context, key, value string) error { return c.Set(ctx, key, value, ttl) }
		sys.close = func() { c.Close(); c.DB().Close() }
	case "prepared-pq":
		db, err := sql.Open("postgres", s.dsn+" binary_parameters=yes")
		if err != nil {
			return nil, err
		}
		db.SetMaxOpenConns(10)
		db.SetMaxIdleConns(10)
		get, err := db.Prepare(`SELECT value FROM cache WHERE user_id = current_user AND key = $1
			AND (expires_at IS NULL OR expires_at > statement_timestamp()) LIMIT 1`)
		if err != nil {
			return nil, err
		}
		set, err := db.Prepare(`INSERT INTO cache (user_id, key, value, expires_at)
			VALUES (current_user, $1, $2, statement_timestamp() + $3::float8 * interval '1 microsecond')
			ON CONFLICT (user_id, key) DO UPDATE SET value = excluded.value, expires_at = excluded.expires_at`)
		if err != nil {
			return nil, err
		}
		sys.get = func(ctx context.Context, key string) error {
			var v string
			return get.QueryRowContext(ctx, key).Scan(&v)
		}
		sys.set = func(ctx context.Context, key, value string) error {
			_, err := set.ExecContext(ctx, key, value, ttl.Microseconds())
			return err
		}
		sys.close = func() { db.Close() }
	case "go-redis":
		c := redis.NewClient(&redis.Options{Addr: s.redisURL})
		sys.get = func(ctx context.Context, key string) error { return c.Get(ctx, key).Err() }
		sys.set = func(ctx context.Context, key, value string) error { return c.Set(ctx, key, value, ttl).Err() }
		sys.close = func() { c.Close() }
		sys.server = s.redisCPU
	case "rueidis":
		c, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{s.redisURL}, DisableCache: true})
		if err != nil {
			return nil, err
		}
		sys.get = func(ctx context.Context, key string) error {
			_, err := c.Do(ctx, c.B().Get().Key(key).Build()).ToString()
			return err
		}
		sys.set = func(ctx context.Context, key, value string) error {
			return c.Do(ctx, c.B().Set().Key(key).Value(value).Ex(ttl).Build()).Error()
		}
		sys.close = c.Close
		sys.server = s.redisCPU
	default:
		return nil, fmt.Errorf("no system %q", name)
	}
	return sys, nil
}

func (s *servers) redisCPU() time.Duration { return processCPU(s.redis.Process.Pid) }

// postgresCPU sums the server's processes, which are children of one.
func (s *servers) postgresCPU() time.Duration {
	b, err := os.ReadFile(s.pg.DataDir() + "/postmaster.pid")
	if err != nil {
		return 0
	}
	parent, _, _ := strings.Cut(string(b), "\n")
	b, _ = os.ReadFile("/proc/" + parent + "/task/" + parent + "/children")
	var total time.Duration
	for _, child := range strings.Fields(string(b)) {
		pid, _ := strconv.Atoi(child)
		total += processCPU(pid)
	}
	return total
}

// processCPU is what Linux's scheduler says a process of one thread, or the first
// of several, has run; 0 elsewhere.
func processCPU(pid int) time.Duration {
	var total time.Duration
	tasks, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	for _, task := range tasks {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/schedstat", pid, task.Name()))
		if err != nil {
			continue
		}
		ran, _, _ := strings.Cut(string(b), " ")
		ns, _ := strconv.ParseInt(ran, 10, 64)
		total += time.Duration(ns)
	}
	return total
}

// fill stores every key.
func (s *servers) fill(ctx context.Context, p plan, value string) error {
	db, err := sql.Open("postgres", s.dsn)
	if err != nil {
		return err
	}
	defer db.Close()
	if err := fastpgcache.Setup(ctx, db, fastpgcache.SetupConfig{}); err != nil {
		return err
	}
	c, err := fastpgcache.New(db, fastpgcache.Config{})
	if err != nil {
		return err
	}
	defer c.Close()
	items := make(map[string]any, p.keys)
	for i := range p.keys {
		items[keyName(i)] = value
	}
	if err := c.SetMany(ctx, items, ttl); err != nil {
		return err
	}
	if _, err := db.ExecContext(ctx, "VACUUM ANALYZE cache"); err != nil {
		return err
	}
	r := redis.NewClient(&redis.Options{Addr: s.redisURL})
	defer r.Close()
	for i := 0; i < p.keys; i += 1000 {
		pipe := r.Pipeline()
		for j := i; j < min(i+1000, p.keys); j++ {
			pipe.Set(ctx, keyName(j), value, ttl)
		}
		if _, err := pipe.Exec(ctx); err != nil {
			return err
		}
	}
	return nil
}

func keyName(i int) string { return "key:" + strconv.Itoa(i) }
