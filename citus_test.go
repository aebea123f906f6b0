package fastpgcache_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
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

// citusNode is the coordinator, or a worker, and its port.
type citusNode struct {
	*pgtest.Server
	port int
}

// startCitus starts a coordinator and two workers. It skips the test but where scripts/citus
// says where there is a Citus.
func startCitus(t *testing.T) (l *lab, nodes []citusNode) {
	t.Helper()
	bin := os.Getenv("FASTPGCACHE_TEST_CITUS")
	if bin == "" {
		t.Skip("scripts/citus runs this, on a PostgreSQL that has Citus")
	}
	for i := range 3 {
		s := pgtest.Own(t, pgtest.Config{BinDir: bin, Settings: map[string]string{
			"shared_preload_libraries": "citus", "citus.node_conninfo": "sslmode=disable", "max_connections": "300", "max_prepared_transactions": "300"}})
		_, port := s.Addr()
		node := labOn(t, s.DSN("postgres"))
		node.exec(node.admin, `CREATE EXTENSION citus`)
		if i == 0 {
			l = node
			l.exec(l.admin, fmt.Sprintf(`SELECT citus_set_coordinator_host('127.0.0.1', %d)`, port))
		} else {
			l.exec(l.admin, fmt.Sprintf(`SELECT citus_add_node('127.0.0.1', %d)`, port))
		}
		nodes = append(nodes, citusNode{s, port})
	}
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
}

// testCitusCommand has every command work on schemas that are distributed.
func testCitusCommand(l *lab) {
	const entries = 2500 // more than a bite
	for _, schema := range citusSchemas[:2] {
		l.exec(l.admin, `INSERT INTO `+schema+`.cache (user_id, key, value, expires_at) SELECT 'user ' || i % 2, 'key ' || i, 'v', '2000-01-01' FROM generate_series(1, $1::int) i`, entries)
	}
	var removed int
	for line := range strings.Lines(l.command("cleanup", "--json")) {
		var n struct{ Removed int }
		if err := json.Unmarshal([]byte(line), &n); err != nil {
			l.Fatalf("%q: %v", line, err)
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
// reads through the coordinator, one through a worker: a key has what was stored last.
func testMoves(l *lab, nodes []citusNode) {
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
	for _, schema := range citusSchemas[:4] {
		before := rounds.Load()
		where := fmt.Sprintf(`SELECT n.nodeport FROM pg_dist_shard s JOIN pg_dist_placement p USING (shardid) JOIN pg_dist_node n USING (groupid)
			WHERE s.logicalrelid = '%s.cache'::regclass`, schema)
		var from int
		if err := l.admin.QueryRowContext(ctx, where).Scan(&from); err != nil {
			l.Fatal(err)
		}
		to := nodes[1].port + nodes[2].port - from
		l.exec(l.admin, fmt.Sprintf(`SELECT citus_schema_move('%s', '127.0.0.1', %d, 'block_writes')`, schema, to))
		l.want(l.admin, int64(to), where)
		for rounds.Load() < before+40 && !l.Failed() {
			time.Sleep(10 * time.Millisecond)
		}
	}
	close(done)
	wg.Wait()
	l.Logf("%d rounds", rounds.Load())
}
