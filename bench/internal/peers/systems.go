// Package peers opens this library and the caches that it is compared with, each on a
// server of its own, and measures them under load.
package peers

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

// System is a cache to measure.
type System struct {
	get    func(ctx context.Context, key string) error // a miss is an error
	set    func(ctx context.Context, key, value string) error
	server func() time.Duration // CPU time the server's processes have used
	Close  func()
}

var errMiss = errors.New("miss")

// Servers are a throwaway PostgreSQL and a throwaway Redis, and how to reach them.
type Servers struct {
	pg            *pgtest.Server
	redis         *exec.Cmd
	Postgres      string // the address of each
	Redis         string
	postgresLogin string
}

// Start starts both servers. Stop them.
func Start(ctx context.Context) (*Servers, error) {
	return StartWith(ctx, map[string]string{"shared_buffers": "1GB"})
}

// StartWith is Start with settings of PostgreSQL.
func StartWith(ctx context.Context, settings map[string]string) (*Servers, error) {
	s := &Servers{}
	var err error
	if s.pg, err = pgtest.Start(ctx, pgtest.Config{Settings: settings}); err != nil {
		return nil, err
	}
	host, pgPort := s.pg.Addr()
	s.Postgres = net.JoinHostPort(host, strconv.Itoa(pgPort))
	s.postgresLogin = s.pg.DSN("postgres")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, errors.Join(err, s.Stop())
	}
	s.Redis = l.Addr().String()
	l.Close()
	_, port, _ := net.SplitHostPort(s.Redis)
	s.redis = exec.CommandContext(ctx, "redis-server", "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
	if err := s.redis.Start(); err != nil {
		s.redis = nil
		return nil, errors.Join(fmt.Errorf("%w (install redis-server)", err), s.Stop())
	}
	for range 100 {
		if conn, err := net.Dial("tcp", s.Redis); err == nil {
			conn.Close()
			return s, nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return nil, errors.Join(errors.New("redis-server does not answer"), s.Stop())
}

// Stop stops both.
func (s *Servers) Stop() error {
	if s.redis != nil {
		s.redis.Process.Kill()
		s.redis.Wait()
	}
	return s.pg.Stop()
}

// DSN is how to reach PostgreSQL, through a proxy if Postgres is its address.
func (s *Servers) DSN() string {
	host, port, _ := net.SplitHostPort(s.Postgres)
	return fmt.Sprintf("%s host=%s port=%s", s.postgresLogin, host, port)
}

// Open opens one system with a pool of so many connections; 0 leaves each its default.
func (s *Servers) Open(ctx context.Context, name string, pool int) (*System, error) {
	sys := &System{server: s.postgresCPU}
	conns := pool
	if conns == 0 {
		conns = 10
	}
	switch name {
	case "fastpgcache-pq", "fastpgcache-pgx", "unmerged-pq":
		cfg := fastpgcache.Config{DisableCoalescing: name == "unmerged-pq"}
		driver, dsn := "postgres", s.DSN()+" binary_parameters=yes"
		if name == "fastpgcache-pgx" {
			driver, dsn = "pgx", s.DSN()
		}
		db, err := openPool(driver, dsn, conns)
		if err != nil {
			return nil, err
		}
		c, err := fastpgcache.New(db, cfg)
		if err != nil {
			return nil, err
		}
		sys.use(c)
		sys.Close = func() { c.Close(); db.Close() }
	case "4-shards-pq":
		db, err := openPool("postgres", s.DSN()+" binary_parameters=yes", conns)
		if err != nil {
			return nil, err
		}
		c, err := openShards(db)
		if err != nil {
			return nil, err
		}
		sys.use(c)
		sys.Close = func() { c.Close(); db.Close() }
	case "prepared-pq":
		db, err := openPool("postgres", s.DSN()+" binary_parameters=yes", conns)
		if err != nil {
			return nil, err
		}
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
		sys.Close = func() { db.Close() }
	case "go-redis":
		c := redis.NewClient(&redis.Options{Addr: s.Redis, PoolSize: pool})
		sys.get = func(ctx context.Context, key string) error { return c.Get(ctx, key).Err() }
		sys.set = func(ctx context.Context, key, value string) error { return c.Set(ctx, key, value, ttl).Err() }
		sys.Close = func() { c.Close() }
		sys.server = s.redisCPU
	case "rueidis":
		c, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{s.Redis}, DisableCache: true})
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
		sys.Close = c.Close
		sys.server = s.redisCPU
	default:
		return nil, fmt.Errorf("no system %q", name)
	}
	return sys, nil
}

func openPool(driver, dsn string, conns int) (*sql.DB, error) {
	db, err := sql.Open(driver, dsn)
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns)
	return db, nil
}

func (s *Servers) redisCPU() time.Duration { return processCPU(s.redis.Process.Pid) }

// postgresCPU sums the server's processes, which are children of one.
func (s *Servers) postgresCPU() time.Duration {
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

// use has the system's operations done by c.
func (sys *System) use(c *fastpgcache.Cache) {
	sys.get = func(ctx context.Context, key string) error {
		var v string
		found, err := c.Get(ctx, key, &v)
		if err == nil && !found {
			return errMiss
		}
		return err
	}
	sys.set = func(ctx context.Context, key, value string) error { return c.Set(ctx, key, value, ttl) }
}

// Of is a cache as a system, whose server's CPU is not known.
func Of(c *fastpgcache.Cache) *System {
	sys := &System{server: func() time.Duration { return 0 }, Close: func() { c.Close() }}
	sys.use(c)
	return sys
}

// openShards returns a cache of four schemas of one database.
func openShards(db *sql.DB) (*fastpgcache.Cache, error) {
	shards := make(map[string]*fastpgcache.Cache)
	for i := range 4 {
		name := fmt.Sprintf("shard_%d", i)
		shard, err := fastpgcache.New(db, fastpgcache.Config{Schema: name})
		if err != nil {
			return nil, err
		}
		shards[name] = shard
	}
	return fastpgcache.NewSharded(shards)
}

// FillShards sets the schemas of "4-shards-pq" up, and stores so many keys in them.
func (s *Servers) FillShards(ctx context.Context, keys int, value string) error {
	db, err := openPool("postgres", s.DSN(), 10)
	if err != nil {
		return err
	}
	defer db.Close()
	for i := range 4 {
		if err := fastpgcache.Setup(ctx, db, fastpgcache.SetupConfig{Schema: fmt.Sprintf("shard_%d", i)}); err != nil {
			return err
		}
	}
	c, err := openShards(db)
	if err != nil {
		return err
	}
	defer c.Close()
	items := make(map[string]any, keys)
	for i := range keys {
		items[keyName(i)] = value
	}
	if err := c.SetMany(ctx, items, ttl); err != nil {
		return err
	}
	_, err = db.ExecContext(ctx, "VACUUM ANALYZE shard_0.cache, shard_1.cache, shard_2.cache, shard_3.cache")
	return err
}

// Fill sets PostgreSQL up and stores so many keys in both servers.
func (s *Servers) Fill(ctx context.Context, keys int, value string) error {
	db, err := sql.Open("postgres", s.DSN())
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
	items := make(map[string]any, keys)
	for i := range keys {
		items[keyName(i)] = value
	}
	if err := c.SetMany(ctx, items, ttl); err != nil {
		return err
	}
	if _, err := db.ExecContext(ctx, "VACUUM ANALYZE cache"); err != nil {
		return err
	}
	r := redis.NewClient(&redis.Options{Addr: s.Redis})
	defer r.Close()
	for i := 0; i < keys; i += 1000 {
		pipe := r.Pipeline()
		for j := i; j < min(i+1000, keys); j++ {
			pipe.Set(ctx, keyName(j), value, ttl)
		}
		if _, err := pipe.Exec(ctx); err != nil {
			return err
		}
	}
	return nil
}

func keyName(i int) string { return "key:" + strconv.Itoa(i) }
