package conformance

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

var userTests = []test{
	{name: "EachRoleHasEntriesOfItsOwn", run: testRoles},
	{name: "EachLabelHasEntriesOfItsOwn", run: testLabels, lone: true},
	{name: "ALabelNeedsTheRight", run: testLabelNeedsRight},
}

// wantApart checks that the caches see no entry of each other's, and change none.
func wantApart(t *testing.T, caches []*fastpgcache.Cache) {
	t.Helper()
	for i, c := range caches {
		mustSet(t, c, "k", fmt.Sprint(i), time.Hour)
	}
	for i, c := range caches {
		wantHit(t, c, "k", fmt.Sprint(i))
	}
	for i, c := range caches {
		if found, err := c.Persist(bounded(t), "k"); err != nil || !found {
			t.Errorf("persist: got %t, %v", found, err)
		}
		if deleted, err := c.Delete(bounded(t), "k"); err != nil || !deleted {
			t.Errorf("delete: got %t, %v", deleted, err)
		}
		wantMiss(t, c, "k")
		for j, other := range caches[i+1:] {
			wantHit(t, other, "k", fmt.Sprint(i+1+j))
			wantTTL(t, other, "k", time.Hour)
		}
	}
}

func testRoles(s *suite, t *testing.T) {
	wantApart(t, []*fastpgcache.Cache{s.cache(t), s.cache(t)})
}

func testLabels(s *suite, t *testing.T) {
	dsn, service := s.role(t)
	s.setup(t, fastpgcache.SetupConfig{Schema: "labels", Service: service})
	t.Cleanup(func() { s.exec(t, `DROP SCHEMA labels CASCADE`) })
	caches := []*fastpgcache.Cache{s.open(t, dsn, inSchema("labels"))}
	for _, label := range []string{
		"tenant", "Tenant", `quo"te \`, "$1", "' OR true --", "current_user", "ключ🔑",
		strings.Repeat("u", 1024),
	} {
		caches = append(caches, s.open(t, dsn, inSchema("labels"), asUser(label)))
	}
	for _, c := range caches {
		runEach(t, c, 1)
	}
	wantApart(t, caches)

	// One's own name as the label is no label.
	mustSet(t, caches[0], "k", "v", 0)
	wantHit(t, s.open(t, dsn, inSchema("labels"), asUser(service)), "k", "v")
}

func testLabelNeedsRight(s *suite, t *testing.T) {
	dsn, name := s.role(t)
	victim := s.open(t, dsn)
	dsn, _ = s.role(t)
	impostor := s.open(t, dsn, asUser(name))
	mustSet(t, victim, "k", "v", time.Hour)
	eachOperation(t, func(t *testing.T, op operation) {
		for _, key := range []string{"k", "absent"} {
			found, err := op.run(bounded(t), impostor, key)
			if op.stores || op.name == "ping" {
				wantError(t, op.name, err, fastpgcache.ErrNotPermitted)
			} else if err != nil || found {
				t.Errorf("%s: got %t, %v, want nothing found", key, found, err)
			}
		}
	})
	wantHit(t, victim, "k", "v")
	wantTTL(t, victim, "k", time.Hour)
}
