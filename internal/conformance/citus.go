package conformance

import (
	"testing"

	"github.com/fastpgcache/fastpgcache"
)

// RunCitus runs the suite over schemas that Citus distributes: over the first of them, and
// over all of them as shards. dsn is of the node that the caches talk to, admin of the
// coordinator, both as superuser.
func RunCitus(t *testing.T, d Driver, dsn, admin string, schemas []string) {
	one := fastpgcache.Config{Citus: true, Schema: schemas[0]}
	unprepared := one
	unprepared.DisablePrepare = true
	for name, s := range map[string]*suite{
		"prepared":   {cfg: one, schemas: schemas[:1]},
		"unprepared": {cfg: unprepared, schemas: schemas[:1]},
		"sharded":    {cfg: one, schemas: schemas},
	} {
		t.Run(name, func(t *testing.T) {
			s.driver, s.dsn, s.admin = d, dsn, openAdmin(t, admin)
			for _, test := range tests() {
				if test.here || test.once && name != "prepared" || test.pool && len(s.schemas) > 1 {
					continue
				}
				t.Run(test.name, func(t *testing.T) { test.run(s, t) })
			}
		})
	}
}
