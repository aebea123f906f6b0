package conformance

import (
	"context"
	"fmt"
	"math"
	"sync"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

var expiryTests = []test{
	{name: "TTLIsTheTimeLeft", run: testTTL},
	{name: "NoTTLMeansNoExpiry", run: testNoExpiry},
	{name: "ANegativeTTLIsRefusedBeforeAnyQuery", run: testInvalidTTL, lone: true},
	{name: "AnExpiredEntryIsInvisibleToEveryOperation", run: testExpired},
	{name: "ASetOverAnExpiredEntryIsFresh", run: testSetOverExpired},
	{name: "SubSecondTTLsRunOut", run: testSubSecond},
	{name: "TTLNeverRoundsALiveEntryToZero", run: testTTLNotZero},
	{name: "TheStatementsClockDecidesInALongTransaction", run: testLongTransaction},
	{name: "ExpireAndPersistChangeTheTTL", run: testExpire},
	{name: "ASetTakesTheOldTTLAway", run: testSetReplacesTTL},
	{name: "CleanupRemovesTheExpiredThatTheRoleMayActForAndNoOther", run: testCleanup},
	{name: "CleanupNeverRemovesAFreshEntry", run: testCleanupRace},
	{name: "CleanupWaitsForNobody", run: testCleanupSkips},
	{name: "ExpiriesThatOtherClientsWrote", run: testForeignExpiry},
}

// wantTTL checks that key lives for want, less at most what the test took so far.
func wantTTL(t *testing.T, c *fastpgcache.Cache, key string, want time.Duration) {
	t.Helper()
	got, found, err := c.TTL(bounded(t), key)
	exact := want == fastpgcache.NoExpiry
	if err != nil || !found || got > want || exact && got != want || !exact && got < want-patience {
		t.Errorf("ttl of %s: got %v, %t, %v, want %v", key, got, found, err, want)
	}
}

// expire makes keys of c expired, as time does.
func (s *suite) expire(t *testing.T, c *fastpgcache.Cache, keys ...string) {
	t.Helper()
	user := one[string](t, c.DB(), `SELECT current_user`)
	for _, key := range keys {
		const sql = `UPDATE {schema}.cache SET expires_at = statement_timestamp() WHERE user_id = $1 AND key = $2`
		if err := s.each(s.admin, sql, user, key); err != nil {
			t.Fatal(err)
		}
	}
}

// rows is how many rows c's user has under key, expired ones too.
func (s *suite) rows(t *testing.T, c *fastpgcache.Cache, key string) int {
	t.Helper()
	user := one[string](t, c.DB(), `SELECT current_user`)
	return one[int](t, s.admin, `SELECT count(*) FROM `+s.union(`SELECT 1 AS one FROM {schema}.cache WHERE user_id = $1 AND key = $2`), user, key)
}

func testTTL(s *suite, t *testing.T) {
	c := s.cache(t)
	for _, ttl := range []time.Duration{time.Minute, time.Minute + 1, 90 * time.Minute, 365 * 24 * time.Hour, math.MaxInt64 / 2, math.MaxInt64} {
		mustSet(t, c, "k", "v", ttl)
		// Rounded up, it may exceed what was asked by a microsecond.
		want := ttl
		if r := ttl % time.Microsecond; r > 0 && ttl < math.MaxInt64-time.Microsecond {
			want += time.Microsecond - r
		}
		wantTTL(t, c, "k", want)
		if found, err := c.Expire(bounded(t), "k", ttl); err != nil || !found {
			t.Errorf("expire %v: got %t, %v", ttl, found, err)
		}
		wantTTL(t, c, "k", want)
	}
	if ttl, found, err := c.TTL(bounded(t), "absent"); err != nil || found || ttl != 0 {
		t.Errorf("absent: got %v, %t, %v, want 0, false", ttl, found, err)
	}
}

func testNoExpiry(s *suite, t *testing.T) {
	c := s.cache(t)
	for _, ttl := range []time.Duration{0, fastpgcache.NoExpiry} {
		mustSet(t, c, "k", "v", time.Hour)
		mustSet(t, c, "k", "v", ttl)
		wantTTL(t, c, "k", fastpgcache.NoExpiry)
	}
}

func testInvalidTTL(s *suite, t *testing.T) {
	c, connector := s.offline(t)
	for _, ttl := range []time.Duration{-2, -time.Microsecond, -time.Second, math.MinInt64, 1, 3600, time.Millisecond - 1} {
		wantError(t, "set", c.Set(bounded(t), "k", "v", ttl), fastpgcache.ErrInvalidTTL)
		_, err := c.Expire(bounded(t), "k", ttl)
		wantError(t, "expire", err, fastpgcache.ErrInvalidTTL)
	}
	_, err := c.Expire(bounded(t), "k", 0)
	wantError(t, "expire", err, fastpgcache.ErrInvalidTTL)
	wantUntried(t, connector)
}

func testExpired(s *suite, t *testing.T) {
	c := s.cache(t)
	eachOperation(t, func(t *testing.T, op operation) {
		if !op.keyed || op.stores {
			return
		}
		mustSet(t, c, "k", "v", time.Hour)
		s.expire(t, c, "k")
		if found, err := op.run(bounded(t), c, "k"); err != nil || found {
			t.Errorf("got %t, %v, want nothing found", found, err)
		}
		if n := s.rows(t, c, "k"); n != 1 && !op.walks {
			t.Errorf("got %d rows, want the expired one untouched", n)
		}
		wantMiss(t, c, "k") // nothing revived it
	})
}

func testSetOverExpired(s *suite, t *testing.T) {
	c := s.cache(t)
	for _, ttl := range []time.Duration{time.Hour, fastpgcache.NoExpiry} {
		mustSet(t, c, "k", "old", time.Hour)
		s.expire(t, c, "k")
		mustSet(t, c, "k", "new", ttl)
		wantHit(t, c, "k", "new")
		wantTTL(t, c, "k", ttl)
	}
}

func testSubSecond(s *suite, t *testing.T) {
	c := s.cache(t)
	const ttl = 150 * time.Millisecond
	start := time.Now()
	mustSet(t, c, "k", "v", ttl)
	await(t, "the entry expires", func() bool {
		found, err := c.Exists(bounded(t), "k")
		if err != nil {
			t.Fatal(err)
		}
		return !found
	})
	if lived := time.Since(start); lived < ttl {
		t.Errorf("the entry lived %v, want at least %v", lived, ttl)
	}
	wantMiss(t, c, "k")
	if n := s.rows(t, c, "k"); n != 1 {
		t.Errorf("got %d rows, want 1: this test saw no expiry", n)
	}
}

// A busy machine sees few of these entries alive, and so it goes on until it has.
func testTTLNotZero(s *suite, t *testing.T) {
	c := s.cache(t)
	seen := 0
	for round, begin := 0, time.Now(); round < 10 || s.callers == 0 && seen == 0 && time.Since(begin) < patience; round++ {
		mustSet(t, c, "k", "v", 3*time.Millisecond)
		for {
			ttl, found, err := c.TTL(bounded(t), "k")
			if err != nil {
				t.Fatal(err)
			}
			if !found {
				break
			}
			seen++
			if ttl <= 0 {
				t.Errorf("got %v for an entry that is there", ttl)
			}
		}
	}
	if s.callers == 0 && seen == 0 {
		t.Error("never saw the entry alive: this test sees nothing")
	}
}

func testLongTransaction(s *suite, t *testing.T) {
	c := s.cache(t)
	tx, err := c.DB().BeginTx(bounded(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	in := c.WithTx(tx)
	mustSet(t, in, "short", "v", 100*time.Millisecond)
	await(t, "the entry expires", func() bool {
		found, err := in.Exists(bounded(t), "short")
		if err != nil {
			t.Fatal(err)
		}
		return !found
	})
	wantMiss(t, in, "short")
	if _, found, err := in.TTL(bounded(t), "short"); err != nil || found {
		t.Errorf("ttl: got %t, %v, want nothing found", found, err)
	}

	// A TTL counts from the statement, not from the transaction's start.
	mustSet(t, in, "set", "v", time.Hour)
	mustSet(t, in, "expire", "v", time.Minute)
	if found, err := in.Expire(bounded(t), "expire", time.Hour); err != nil || !found {
		t.Errorf("expire: got %t, %v", found, err)
	}
	began := one[string](t, tx, `SELECT now()::text`) // by itself: Citus' nodes each have their own
	for _, key := range []string{"set", "expire"} {
		if !one[bool](t, tx, `
			SELECT expires_at >= '`+began+`'::timestamptz + interval '1 hour 100 milliseconds'
			FROM `+s.union(`SELECT expires_at FROM {schema}.cache WHERE user_id = current_user AND key = '`+key+`'`)) {
			t.Errorf("%s: its TTL counts from the transaction's start", key)
		}
	}
}

func testExpire(s *suite, t *testing.T) {
	c := s.cache(t)
	mustSet(t, c, "k", "v", time.Minute)
	for _, tt := range []struct {
		op   string
		run  func() (bool, error)
		want time.Duration
	}{
		{"expire longer", func() (bool, error) { return c.Expire(bounded(t), "k", time.Hour) }, time.Hour},
		{"persist", func() (bool, error) { return c.Persist(bounded(t), "k") }, fastpgcache.NoExpiry},
		{"persist again", func() (bool, error) { return c.Persist(bounded(t), "k") }, fastpgcache.NoExpiry},
		{"expire shorter", func() (bool, error) { return c.Expire(bounded(t), "k", time.Minute) }, time.Minute},
		{"expire never", func() (bool, error) { return c.Expire(bounded(t), "k", fastpgcache.NoExpiry) }, fastpgcache.NoExpiry},
	} {
		if found, err := tt.run(); err != nil || !found {
			t.Errorf("%s: got %t, %v", tt.op, found, err)
		}
		wantTTL(t, c, "k", tt.want)
		wantHit(t, c, "k", "v")
	}
}

func testSetReplacesTTL(s *suite, t *testing.T) {
	c := s.cache(t)
	mustSet(t, c, "k", "v", time.Minute)
	mustSet(t, c, "k", "v", time.Hour)
	if ttl, _, err := c.TTL(bounded(t), "k"); err != nil || ttl < 30*time.Minute {
		t.Errorf("got %v, %v, want the new TTL", ttl, err)
	}
	mustSet(t, c, "k", "v", fastpgcache.NoExpiry)
	wantTTL(t, c, "k", fastpgcache.NoExpiry)
}

func testCleanup(s *suite, t *testing.T) {
	a, b := s.cache(t), s.cache(t)
	if _, err := a.Cleanup(bounded(t)); err != nil { // what other tests left
		t.Fatal(err)
	}
	const expired = 10
	for i := range expired {
		for _, c := range []*fastpgcache.Cache{a, b} {
			mustSet(t, c, fmt.Sprint("expired", i), "v", time.Hour)
		}
	}
	for i := range expired {
		s.expire(t, a, fmt.Sprint("expired", i))
		s.expire(t, b, fmt.Sprint("expired", i))
	}
	for _, c := range []*fastpgcache.Cache{a, b} {
		mustSet(t, c, "long", "v", time.Hour)
		mustSet(t, c, "forever", "v", fastpgcache.NoExpiry)
	}
	if removed, err := a.Cleanup(bounded(t)); err != nil || removed != expired {
		t.Errorf("got %d, %v, want the %d of its own removed", removed, err, expired)
	}
	if n := s.rows(t, b, "expired0"); n != 1 {
		t.Errorf("got %d rows of another user, want 1", n)
	}
	owner := s.open(t, s.dsn)
	if removed, err := owner.Cleanup(bounded(t)); err != nil || removed < expired {
		t.Errorf("got %d, %v, want everybody's %d removed", removed, err, expired)
	}
	if removed, err := b.Cleanup(bounded(t)); err != nil || removed != 0 {
		t.Errorf("again: got %d, %v, want none", removed, err)
	}
	for _, c := range []*fastpgcache.Cache{a, b} {
		wantHit(t, c, "long", "v")
		wantHit(t, c, "forever", "v")
		if n := s.rows(t, c, "expired0"); n != 0 {
			t.Error("an expired row is still there")
		}
	}
}

func testCleanupRace(s *suite, t *testing.T) {
	c := s.cache(t)
	ctx, cancel := context.WithCancel(bounded(t))
	var cleaners sync.WaitGroup
	for range 2 {
		cleaners.Go(func() {
			for ctx.Err() == nil {
				if _, err := c.Cleanup(ctx); err != nil && ctx.Err() == nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range 60 {
		key := fmt.Sprint(i % 4)
		mustSet(t, c, key, "old", time.Millisecond)
		mustSet(t, c, key, "fresh", time.Hour)
		wantHit(t, c, key, "fresh")
	}
	cancel()
	cleaners.Wait()
	for i := range 4 {
		wantHit(t, c, fmt.Sprint(i), "fresh")
	}
}

func testCleanupSkips(s *suite, t *testing.T) {
	c := s.cache(t)
	mustSet(t, c, "locked", "v", time.Hour)
	mustSet(t, c, "free", "v", time.Hour)
	s.expire(t, c, "locked", "free")
	tx, err := c.DB().BeginTx(bounded(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	if err := s.each(tx, `SELECT FROM {schema}.cache WHERE user_id = current_user AND key = 'locked' FOR UPDATE`); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Cleanup(bounded(t)); err != nil {
		t.Error(err)
	}
	if got := [2]int{s.rows(t, c, "locked"), s.rows(t, c, "free")}; got != [2]int{1, 0} {
		t.Errorf("got rows %v, want the locked one alone left", got)
	}
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Cleanup(bounded(t)); err != nil {
		t.Error(err)
	}
	if n := s.rows(t, c, "locked"); n != 0 {
		t.Error("the row is still there after its lock went")
	}
}

func testForeignExpiry(s *suite, t *testing.T) {
	c := s.cache(t)
	user := one[string](t, c.DB(), `SELECT current_user`)
	for _, tt := range []struct {
		expires string
		found   bool
		want    time.Duration
	}{
		{"infinity", true, fastpgcache.NoExpiry},
		{"-infinity", false, 0},
		{"294276-01-01", true, math.MaxInt64},
		{"4713-01-01 BC", false, 0},
	} {
		mustSet(t, c, "k", "v", time.Hour)
		if err := s.each(s.admin, `UPDATE {schema}.cache SET expires_at = $2 WHERE user_id = $1 AND key = 'k'`, user, tt.expires); err != nil {
			t.Fatal(err)
		}
		if got, found, err := c.TTL(bounded(t), "k"); err != nil || found != tt.found || got != tt.want {
			t.Errorf("%s: got %v, %t, %v, want %v, %t", tt.expires, got, found, err, tt.want, tt.found)
		}
		if found, err := c.Exists(bounded(t), "k"); err != nil || found != tt.found {
			t.Errorf("%s: exists: got %t, %v, want %t", tt.expires, found, err, tt.found)
		}
	}
}
