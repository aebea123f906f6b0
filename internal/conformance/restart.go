package conformance

import (
	"context"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// testRestart restarts and crashes one server under the caches of every driver
// and variant: they fail while it is away, and work again by themselves.
func testRestart(t *testing.T, drivers []Driver) {
	server := pgtest.Own(t, pgtest.Config{})
	dsn := server.Database(t)
	s := &suite{dsn: dsn, admin: openAdmin(t, dsn)}
	s.setup(t, fastpgcache.SetupConfig{})
	caches := make(map[string]*fastpgcache.Cache)
	for _, d := range drivers {
		for _, v := range variants(d) {
			one := &suite{driver: d, cfg: v.cfg, dsn: dsn}
			// A label of its own, as superuser: each has its own entries.
			caches[d.Name+"/"+v.name] = one.open(t, dsn, asUser(d.Name+"/"+v.name))
		}
	}
	each := func(what string, f func(*testing.T, *fastpgcache.Cache)) {
		for name, c := range caches {
			t.Run(what+"/"+name, func(t *testing.T) { f(t, c) })
		}
	}
	works := func(t *testing.T, c *fastpgcache.Cache) {
		await(t, "the cache works again", func() bool {
			ctx, cancel := context.WithTimeout(t.Context(), patience/3)
			defer cancel()
			_, err := c.Get(ctx, "k", nil)
			if err != nil {
				wantForm(t, "get", err)
			}
			return err == nil
		})
		runEach(t, c, 1)
	}

	each("before", func(t *testing.T, c *fastpgcache.Cache) {
		runEach(t, c, 1)
		mustSet(t, c, "still", "v", time.Hour)
	})
	if err := server.Restart(bounded(t)); err != nil {
		t.Fatal(err)
	}
	each("restarted", func(t *testing.T, c *fastpgcache.Cache) {
		works(t, c)
		wantHit(t, c, "still", "v")
	})
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	each("down", func(t *testing.T, c *fastpgcache.Cache) {
		for _, op := range operations() {
			_, err := op.run(bounded(t), c, "k")
			wantForm(t, op.name, err)
		}
	})
	if err := server.StartAgain(bounded(t)); err != nil {
		t.Fatal(err)
	}
	each("crashed", func(t *testing.T, c *fastpgcache.Cache) {
		works(t, c)
		wantMiss(t, c, "still") // the table is unlogged
		mustSet(t, c, "still", "v", time.Hour)
		wantHit(t, c, "still", "v")
	})
}
