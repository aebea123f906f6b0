package pgtest

import (
	"context"
	"fmt"
)

// citusSettings are what a node of Citus needs: it has two connections for each of a client's.
var citusSettings = map[string]string{"shared_preload_libraries": "citus", "citus.node_conninfo": "sslmode=disable",
	"max_connections": "300", "max_prepared_transactions": "300"}

// StartCitus starts a coordinator and workers of a PostgreSQL that has Citus, whose programs
// are in bin, and makes one Citus of them, in the database postgres. Stop them all, also
// after an error.
func StartCitus(ctx context.Context, bin string, workers int) (nodes []*Server, err error) {
	for i := range 1 + workers {
		s, err := Start(ctx, Config{BinDir: bin, Settings: citusSettings})
		if err != nil {
			return nodes, err
		}
		nodes = append(nodes, s)
		if err := execute(s.DSN("postgres"), `CREATE EXTENSION citus`); err != nil {
			return nodes, err
		}
		join := `citus_add_node`
		if i == 0 {
			join = `citus_set_coordinator_host`
		}
		host, port := s.Addr()
		if err := execute(nodes[0].DSN("postgres"), fmt.Sprintf(`SELECT %s('%s', %d)`, join, host, port)); err != nil {
			return nodes, err
		}
	}
	return nodes, nil
}
