package fastpgcache_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/conformance"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// citusSchemas are set up, and distributed, by the command.
var citusSchemas = []string{"cache_0", "cache_1", "cache_2", "cache_3", "cache_4", "cache_5", "cache_6", "cache_7"}

// startCitus starts a coordinator and two workers. It skips the test but where scripts/citus
// says where there is a Citus.
func startCitus(t *testing.T) (l *lab, nodes []*pgtest.Server) {
	t.Helper()
	bin := os.Getenv("FASTPGCACHE_TEST_CITUS")
	if bin == "" {
		t.Skip("scripts/citus runs this, on a PostgreSQL that has Citus")
	}
	nodes, err := pgtest.StartCitus(t.Context(), bin, 2)
	t.Cleanup(func() {
		for _, n := range nodes {
			if err := n.Stop(); err != nil {
				t.Error(err)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	l = labOn(t, nodes[0].DSN("postgres"))
	l.command("setup")
	return l, nodes
}

// command runs fastpgcache-admin over the schemas.
func (l *lab) command(words ...string) string {
	l.Helper()
	args := append([]string{"run", "./cmd/fastpgcache-admin", "--dsn", l.dsn, "--schema", "cache", "--shards", fmt.Sprint(len(citusSchemas))}, words...)
	out, err := exec.Command("go", args...).CombinedOutput()
	if err != nil {
		l.Fatalf("%v: %v\n%s", words, err, out)
	}
	return string(out)
}

func TestCitus(t *testing.T) {
	l, nodes := startCitus(t)
	for i, name := range []string{"coordinator", "worker"} {
		t.Run("conformance through a "+name, func(t *testing.T) {
			conformance.RunCitus(t, pqBinary, nodes[i].DSN("postgres"), l.dsn, citusSchemas)
		})
	}
	t.Run("schemas move", func(t *testing.T) { testMoves(l.in(t), nodes) })
	t.Run("the command", func(t *testing.T) { testCitusCommand(l.in(t)) })
	t.Run("a cache that was not told", func(t *testing.T) { testUntold(l.in(t)) })
}

// testCitusCommand has every command work on schemas that are distributed.
func testCitusCommand(l *lab) {
	const entries = 2500                  // more than a bite
	for _, schema := range citusSchemas { // what other tests have left
		l.exec(l.admin, `TRUNCATE `+schema+`.cache`)
	}
	for _, schema := range citusSchemas[:2] {
		l.exec(l.admin, `INSERT INTO `+schema+`.cache (user_id, key, value, expires_at) SELECT 'user ' || i % 2, 'key ' || i, 'v', '2000-01-01' FROM generate_series(1, $1::int) i`, entries)
	}
	var removed int
	for answers := json.NewDecoder(strings.NewReader(l.command("cleanup", "--json"))); answers.More(); {
		var n struct{ Removed int }
		if err := answers.Decode(&n); err != nil {
			l.Fatal(err)
		}
		removed += n.Removed
	}
	if removed != 2*entries {
		l.Errorf("cleanup removed %d of %d", removed, 2*entries)
	}
	for _, schema := range citusSchemas {
		l.exec(l.admin, `INSERT INTO `+schema+`.cache (user_id, key, value) VALUES ('u', 'one key', 'v')`)
	}
	if got, want := l.command("sweep"), "Removed 7 entries"; !strings.Contains(got, want) {
		l.Errorf("sweep: got %q, want %q", got, want)
	}
	if got := l.command("status"); strings.Count(got, "on a node of Citus") != len(citusSchemas) || strings.Contains(got, "size        0 B") {
		l.Errorf("status:\n%s", got)
	}
	if got := l.command("setup"); strings.Count(got, "Already set up") != len(citusSchemas) {
		l.Errorf("setup again:\n%s", got)
	}
	if err := fastpgcache.Setup(l.Context(), l.admin, fastpgcache.SetupConfig{Schema: citusSchemas[0], MaxBytes: 1 << 20}); err == nil {
		l.Error("a limit on size, which nobody would keep, is not refused")
	}
}

// testMoves moves schemas from worker to worker while the load runs. One program writes and
// reads through the coordinator, one through a worker: a key has what was stored last. Without
// the lock, some moves give reads through the coordinator what was in the old place.
func testMoves(l *lab, nodes []*pgtest.Server) {
	ctx, cancel := context.WithTimeout(l.Context(), 5*time.Minute)
	defer cancel()
	name := pgtest.Role(l.T, l.dsn)
	var caches []*fastpgcache.Cache
	for _, n := range nodes[:2] {
		db := l.open(pgtest.WithUser(n.DSN("postgres"), name))
		db.SetMaxOpenConns(4)
		shards := make(map[string]*fastpgcache.Cache)
		for _, schema := range citusSchemas {
			shards[schema] = l.cache(db, fastpgcache.Config{Schema: schema, Citus: true})
		}
		c, err := fastpgcache.NewSharded(shards)
		if err != nil {
			l.Fatal(err)
		}
		caches = append(caches, c)
	}
	var wg sync.WaitGroup
	var rounds atomic.Int64
	done := make(chan struct{})
	for caller := range 4 {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-done:
					return
				default:
				}
				key := fmt.Sprintf("caller %d, key %d", caller, n%50)
				writer, reader := caches[n%2], caches[n/2%2]
				var got int
				err := writer.Set(ctx, key, n, time.Hour)
				if err == nil {
					_, err = reader.Get(ctx, key, &got)
				}
				if err != nil || got != n {
					l.Errorf("%s: got %d, %v, want %d", key, got, err, n)
					return
				}
				rounds.Add(1)
			}
		})
	}
	for _, schema := range slices.Concat(citusSchemas, citusSchemas) {
		before := rounds.Load()
		where := fmt.Sprintf(`SELECT n.nodeport FROM pg_dist_shard s JOIN pg_dist_placement p USING (shardid) JOIN pg_dist_node n USING (groupid)
			WHERE s.logicalrelid = '%s.cache'::regclass`, schema)
		var from int
		if err := l.admin.QueryRowContext(ctx, where).Scan(&from); err != nil {
			l.Fatal(err)
		}
		_, to := nodes[1].Addr()
		if to == from {
			_, to = nodes[2].Addr()
		}
		l.exec(l.admin, fmt.Sprintf(`BEGIN;
			LOCK %[1]s.cache, %[1]s.cache_lease IN ACCESS EXCLUSIVE MODE;
			SELECT citus_schema_move('%[1]s', '127.0.0.1', %[2]d, 'block_writes');
			COMMIT`, schema, to))
		l.want(l.admin, int64(to), where)
		for rounds.Load() < before+40 && !l.Failed() {
			time.Sleep(10 * time.Millisecond)
		}
	}
	close(done)
	wg.Wait()
	l.Logf("%d rounds", rounds.Load())
}

// testUntold has a cache that was not told of Citus say what to do, where it fails.
func testUntold(l *lab) {
	ctx := l.Context()
	db := l.open(pgtest.WithUser(l.dsn, pgtest.Role(l.T, l.dsn)))
	c := l.cache(db, fastpgcache.Config{Schema: citusSchemas[0]})
	for name, op := range map[string]func() error{
		"delete":    func() error { _, err := c.Delete(ctx, "k"); return err },
		"add":       func() error { _, err := c.Add(ctx, "k", "v", 0); return err },
		"increment": func() error { _, err := c.Increment(ctx, "k", 1, 0); return err },
		"take":      func() error { _, _, err := c.Take(ctx, "k"); return err },
		"clear":     func() error { _, err := c.Clear(ctx); return err },
	} {
		if err := op(); err == nil || !strings.Contains(err.Error(), "Config.Citus") {
			l.Errorf("%s: got %v", name, err)
		}
	}
	// It answers nothing from memory, and says why.
	reports := make(chan error, 100)
	local := l.cache(db, fastpgcache.Config{Schema: citusSchemas[0], MaxStaleness: time.Minute, OnError: func(err error) {
		select {
		case reports <- err:
		default:
		}
	}})
	for range 20 {
		if _, err := local.Get(ctx, "none", nil); err != nil {
			l.Error(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if s := local.Stats(); s.FilterAnswers+s.LocalHits > 0 {
		l.Errorf("%d answers from memory", s.FilterAnswers+s.LocalHits)
	}
	select {
	case err := <-reports:
		if !strings.Contains(err.Error(), "Citus") {
			l.Errorf("OnError: got %v", err)
		}
	case <-time.After(30 * time.Second):
		l.Error("OnError heard nothing")
	}
}
