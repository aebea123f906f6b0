package fastpgcache_test

import (
	"fmt"
	"os"
	"os/exec"
	"testing"

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
}
