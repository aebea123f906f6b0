package fastpgcache

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lib/pq"
)

// setUpShards sets up a schema for each name, and returns the DSNs of a role that may use
// them, and of the superuser.
func setUpShards(t testing.TB, names ...string) (dsn, admin string) {
	t.Helper()
	dsn, admin = setUp(t)
	db := openDB(t, admin)
	for _, name := range names {
		check(t, Setup(context.Background(), db, SetupConfig{Schema: name}))
	}
	return dsn, admin
}

// openShards returns a cache of each name's schema, each with a pool of its own.
func openShards(t testing.TB, dsn string, cfg Config, names ...string) map[string]*Cache {
	t.Helper()
	shards := make(map[string]*Cache)
	for _, name := range names {
		cfg.Schema = name
		shards[name] = openCache(t, dsn, cfg)
	}
	return shards
}

func sharded(t testing.TB, shards map[string]*Cache) *Cache {
	t.Helper()
	c, err := NewSharded(shards)
	check(t, err)
	return c
}

// keyOf returns the i-th key that belongs to the shard of this name.
func keyOf(c *Cache, name string, i int) string {
	for n := 0; ; n++ {
		key := fmt.Sprintf("key-%d", n)
		if *c.of(key).name.Load() == name {
			if i--; i < 0 {
				return key
			}
		}
	}
}

func TestNewShardedRefuses(t *testing.T) {
	dsn, _ := setUp(t)
	c, other := openCache(t, dsn, Config{}), openCache(t, dsn, Config{})
	twin, err := New(c.db, Config{Schema: "public"})
	check(t, err)
	named := openCache(t, dsn, Config{Schema: "s"})
	sharded(t, map[string]*Cache{"one": named})
	tests := map[string]map[string]*Cache{
		"no shards":             {},
		"nil":                   {"a": nil},
		"no name":               {"": c},
		"one under two names":   {"a": c, "b": c},
		"one table twice":       {"a": c, "b": twin},
		"a sharded cache":       {"a": sharded(t, map[string]*Cache{"x": other})},
		"a transaction's":       {"a": c.WithTx(nil)},
		"another name's before": {"two": named},
	}
	for name, shards := range tests {
		if _, err := NewSharded(shards); !errors.Is(err, ErrInvalidConfig) {
			t.Errorf("%s: got %v, want ErrInvalidConfig", name, err)
		}
	}
	sharded(t, map[string]*Cache{"one": named, "two": c}) // the same name once more
}

// Without Sweep and Clear the dead speak: this is what they are for.
func TestShardsThatComeAndGoBringNothingOldBack(t *testing.T) {
	names := []string{"a", "b", "c", "d", "e"}
	dsn, _ := setUpShards(t, names...)
	shards := openShards(t, dsn, Config{}, names...)
	ctx := t.Context()
	five := sharded(t, shards)
	few := maps.Clone(shards)
	delete(few, "e")
	four := sharded(t, few)
	key := keyOf(five, "e", 0)
	get := func(c *Cache) (value string) {
		t.Helper()
		_, err := c.Get(ctx, key, &value)
		check(t, err)
		return value
	}

	check(t, four.Set(ctx, key, "before e joined", 0))
	check(t, four.Set(ctx, keyOf(five, "a", 0), "stays", 0))
	load := func(context.Context) (any, error) { return nil, NotFoundFor(time.Hour) }
	absent := keyOf(five, "e", 1)
	if err := four.GetOrSet(ctx, absent, nil, 0, load); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	if got := get(five); got != "" { // e is empty
		t.Errorf("e had %q when it joined", got)
	}
	check(t, five.Set(ctx, key, "in e", 0))
	if got := get(four); got != "before e joined" {
		t.Errorf("got %q: this test would see nothing", got)
	}
	if n, err := five.Sweep(ctx); n != 1 || err != nil {
		t.Errorf("swept %d, %v, want the key that moved", n, err)
	}
	if got := get(four); got != "" {
		t.Errorf("e is gone, and %q of before it came is back", got)
	}
	var loaded string
	check(t, four.GetOrSet(ctx, absent, &loaded, 0, func(context.Context) (any, error) { return "there", nil }))
	if loaded != "there" {
		t.Errorf("got %q: an absence of before came back", loaded)
	}
	if found, err := four.Exists(ctx, keyOf(five, "a", 0)); !found || err != nil {
		t.Errorf("a key that did not move: %t, %v", found, err)
	}

	check(t, four.Set(ctx, key, "after e left", 0))
	if got := get(five); got != "in e" {
		t.Errorf("got %q: this test would see nothing", got)
	}
	_, err := shards["e"].Clear(ctx) // before it joins again
	check(t, err)
	if got := get(five); got != "" {
		t.Errorf("e joined again with %q", got)
	}
	if n, err := shards["a"].Sweep(ctx); n != 0 || err != nil {
		t.Errorf("one cache alone swept %d, %v", n, err)
	}
}

func TestSweepRefusesOneTableUnderTwoNames(t *testing.T) {
	dsn, _ := setUp(t)
	c := sharded(t, map[string]*Cache{"a": openCache(t, dsn, Config{}), "b": openCache(t, dsn, Config{})})
	check(t, c.SetMany(t.Context(), map[string]any{"1": 1, "2": 1, "3": 1, "4": 1, "5": 1}, 0))
	if n, err := c.Sweep(t.Context()); n != 0 || !errors.Is(err, ErrInvalidConfig) {
		t.Errorf("got %d, %v, want ErrInvalidConfig", n, err)
	}
	if got := len(keysOf(t, c, "")); got != 5 {
		t.Errorf("%d of 5 keys are left", got)
	}
}

func TestKeysOfShardsComeOnceAndInOrder(t *testing.T) {
	dsn, _ := setUpShards(t, "a", "b", "c")
	shards := openShards(t, dsn, Config{}, "a", "b", "c")
	c := sharded(t, shards)
	items := make(map[string]any)
	for i := range 300 {
		items[fmt.Sprint("k", i)] = i
	}
	for _, shard := range shards { // each has copies of keys that are not its own
		check(t, shard.SetMany(t.Context(), items, 0))
	}
	got, want := keysOf(t, c, ""), slices.Sorted(maps.Keys(items))
	if !slices.Equal(got, want) {
		t.Errorf("got %d keys, want %d, in order", len(got), len(want))
	}
	for range c.Keys(t.Context(), "k1") {
		break
	}
	if n, err := c.Sweep(t.Context()); n != 600 || err != nil {
		t.Errorf("swept %d, %v, want 600", n, err)
	}
}

func TestSetManyIsAllOrNoneOnEachDatabase(t *testing.T) {
	names := []string{"a", "b", "c"}
	dsn, admin := setUpShards(t, names...)
	shards := openShards(t, dsn, Config{}, "c")
	db := openDB(t, dsn)
	for _, name := range []string{"a", "b"} { // these share a pool
		shard, err := New(db, Config{Schema: name})
		check(t, err)
		shards[name] = shard
	}
	c := sharded(t, shards)
	_, err := openDB(t, admin).Exec(`ALTER TABLE b.cache ADD CHECK (value <> 'bad')`)
	check(t, err)
	items := make(map[string]any)
	for i := range 30 {
		items[fmt.Sprint(i)] = "good"
	}
	items[keyOf(c, "b", 0)] = "bad"
	err = c.SetMany(t.Context(), items, 0)
	if err == nil || !strings.Contains(err.Error(), `shard "b": `) || strings.Contains(err.Error(), `shard "a"`) {
		t.Errorf("got %v, want an error of shard b", err)
	}
	for key := range items {
		found, err := c.Exists(t.Context(), key)
		if want := c.of(key) == shards["c"]; err != nil || found != want {
			t.Errorf("%s of shard %s: got %t, %v", key, *c.of(key).name.Load(), found, err)
		}
	}
	items[keyOf(c, "a", 0)] = func() {}
	items["new"] = "good"
	if err := c.SetMany(t.Context(), items, 0); err == nil {
		t.Error("what cannot be encoded is stored")
	}
	if found, _ := c.Exists(t.Context(), "new"); found {
		t.Error("something was sent")
	}
}

func TestTransactionsOfShardsNeedOnePool(t *testing.T) {
	dsn, _ := setUpShards(t, "a", "b")
	c := sharded(t, openShards(t, dsn, Config{}, "a", "b"))
	if c.DB() != nil {
		t.Error("there is one pool")
	}
	tx, err := openDB(t, dsn).Begin()
	check(t, err)
	defer tx.Rollback()
	in := c.WithTx(tx)
	for name, err := range map[string]error{
		"set":      in.Set(t.Context(), "k", 1, 0),
		"set many": in.SetMany(t.Context(), map[string]any{"k": 1, "l": 2}, 0),
		"ping":     in.Ping(t.Context()),
	} {
		if err == nil || !strings.Contains(err.Error(), "one *sql.DB") {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// faulty is a connector whose server goes away.
type faulty struct {
	driver.Connector
	down  atomic.Bool
	tried atomic.Int64
}

var errDown = errors.New("the server is down")

func (f *faulty) Connect(ctx context.Context) (driver.Conn, error) {
	f.tried.Add(1)
	if f.down.Load() {
		return nil, errDown
	}
	return f.Connector.Connect(ctx)
}

func TestOneShardDown(t *testing.T) {
	names := []string{"a", "b", "c", "d"}
	dsn, admin := setUpShards(t, names...)
	var mu sync.Mutex
	var reported []error
	cfg := Config{MaxStaleness: time.Minute, OnError: func(err error) {
		mu.Lock()
		defer mu.Unlock()
		reported = append(reported, err)
	}}
	shards := openShards(t, dsn, cfg, "a", "c", "d")
	connector, err := pq.NewConnector(dsn)
	check(t, err)
	server := &faulty{Connector: connector}
	cfg.Schema = "b"
	shards["b"], err = OpenConnector(server, cfg)
	check(t, err)
	c := sharded(t, shards)
	t.Cleanup(func() { c.Close() })
	ctx := t.Context()
	items, want := make(map[string]any), make(map[string]Value)
	for i := range 40 {
		key := fmt.Sprint(i)
		items[key] = "v"
		if c.of(key) != shards["b"] {
			want[key] = Value("v")
		}
	}
	check(t, c.SetMany(ctx, items, 0))
	kept := keyOf(c, "b", 3)
	check(t, c.Set(ctx, kept, "kept", 0))
	eventually(t, "an answer from memory", func() bool {
		_, err := c.Get(ctx, kept, nil)
		return err == nil && shards["b"].Stats().Local.Hits > 0
	})

	server.down.Store(true)
	shards["b"].db.SetMaxIdleConns(0) // ends its connections
	_, err = openDB(t, admin).Exec(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename <> current_user AND query LIKE '%"b".%'`)
	check(t, err)
	names1 := func(op string, err error) {
		t.Helper()
		if err == nil || !errors.Is(err, errDown) || !strings.HasPrefix(err.Error(), "fastpgcache: "+op+": ") || strings.Count(err.Error(), `shard "b": `) != 1 {
			t.Errorf("%s: got %v, want an error that names shard b once", op, err)
		}
	}
	gone := keyOf(c, "b", 5)
	eventually(t, "the shard is down", func() bool { return errors.Is(shards["b"].Ping(ctx), errDown) })
	_, err = c.Get(ctx, gone, nil)
	names1("get", err)
	names1("ping", c.Ping(ctx))
	if found, err := c.Get(ctx, kept, nil); !found || err != nil {
		t.Errorf("what memory has: got %t, %v", found, err)
	}
	keys := slices.Collect(maps.Keys(items))
	shards["b"].local.kept.reset() // so that all but memory is asked
	got, err := c.GetMany(ctx, keys)
	names1("get many", err)
	if !maps.EqualFunc(got, want, func(a, b Value) bool { return string(a) == string(b) }) {
		t.Errorf("got %d values, want the %d of the other shards", len(got), len(want))
	}
	n := 0
	var last error
	for key, err := range c.Keys(ctx, "") {
		if last = err; key != "" {
			n++
		}
	}
	if n != len(want) {
		t.Errorf("got %d keys, want %d", n, len(want))
	}
	names1("keys", last)

	// One load for all, of which what can be stored is.
	var loads int
	asked := []string{gone, keyOf(c, "a", 20), keyOf(c, "c", 20), keyOf(c, "b", 21)}
	got, err = c.GetOrSetMany(ctx, asked, 0, func(_ context.Context, missing []string) (map[string]any, error) {
		loads++
		if !slices.Equal(missing, asked) {
			t.Errorf("asked for %v, want %v", missing, asked)
		}
		return map[string]any{missing[0]: 1, missing[1]: 1, missing[2]: 1, missing[3]: 1}, nil
	})
	if err != nil || len(got) != 4 || loads != 1 {
		t.Errorf("got %v, %v after %d loads", got, err, loads)
	}
	for _, key := range asked[1:3] {
		if found, err := c.Get(ctx, key, nil); !found || err != nil {
			t.Errorf("%s, of a shard that is up, was not stored: %v", key, err)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if !slices.ContainsFunc(reported, func(err error) bool {
		return strings.HasPrefix(err.Error(), `fastpgcache: get or set many: shard "b": `)
	}) {
		t.Errorf("got reports %v", reported)
	}
}

// A shard that hangs holds up its own callers only, and takes no more connections than its
// pool has.
func TestOneShardHangs(t *testing.T) {
	names := []string{"a", "b", "c"}
	dsn, admin := setUpShards(t, names...)
	shards := openShards(t, dsn, Config{}, names...)
	c := sharded(t, shards)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	check(t, c.SetMany(ctx, map[string]any{keyOf(c, "a", 0): 1, keyOf(c, "b", 0): 1, keyOf(c, "c", 0): 1}, 0))
	tx, err := openDB(t, admin).Begin()
	check(t, err)
	defer tx.Rollback()
	_, err = tx.Exec(`LOCK TABLE b.cache IN ACCESS EXCLUSIVE MODE`)
	check(t, err)
	var stuck, free sync.WaitGroup
	var waiting atomic.Int64
	for i := range 200 {
		stuck.Go(func() {
			waiting.Add(1)
			var err error
			if i%2 == 0 {
				_, err = c.Get(ctx, keyOf(c, "b", 0), nil)
			} else {
				_, err = c.GetMany(ctx, []string{keyOf(c, "b", 0), keyOf(c, "a", 0)})
			}
			if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), `shard "b"`) {
				t.Errorf("got %v, want that shard b was waited for until the context ended", err)
			}
		})
	}
	eventually(t, "they wait", func() bool { return waiting.Load() == 200 && shards["b"].db.Stats().InUse > 0 })
	begin := time.Now()
	for i := range 64 {
		free.Go(func() {
			for range 50 {
				if found, err := c.Get(ctx, keyOf(c, []string{"a", "c"}[i%2], 0), nil); !found || err != nil {
					t.Errorf("another shard: got %t, %v", found, err)
				}
			}
		})
	}
	free.Wait()
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("others took %v", took)
	}
	for name, shard := range shards {
		if n := shard.db.Stats().OpenConnections; n > 10 {
			t.Errorf("shard %s has %d connections", name, n)
		}
	}
	cancel()
	stuck.Wait()
}

func TestStatsOfShardsAddUpEveryField(t *testing.T) {
	one := Stats{LastCleanup: time.UnixMicro(1)}
	var set func(v reflect.Value)
	set = func(v reflect.Value) {
		switch v.Kind() {
		case reflect.Struct:
			for i := range v.NumField() {
				if v.Type().Field(i).IsExported() {
					set(v.Field(i))
				}
			}
		case reflect.Array:
			for i := range v.Len() {
				set(v.Index(i))
			}
		case reflect.Int, reflect.Int64:
			v.SetInt(7)
		default:
			t.Errorf("nothing is known of a field of type %v", v.Type())
		}
	}
	set(reflect.ValueOf(&one).Elem())
	var all Stats
	for i := range 3 {
		all.add(one, i == 0)
	}
	want := one
	all.LastCleanup, want.LastCleanup = time.Time{}, time.Time{}
	var triple func(v reflect.Value)
	triple = func(v reflect.Value) {
		switch v.Kind() {
		case reflect.Struct:
			for i := range v.NumField() {
				if v.Type().Field(i).IsExported() && v.Type().Field(i).Name != "Age" {
					triple(v.Field(i))
				}
			}
		case reflect.Array:
			for i := range v.Len() {
				triple(v.Index(i))
			}
		default:
			v.SetInt(3 * v.Int())
		}
	}
	triple(reflect.ValueOf(&want).Elem())
	if all != want {
		t.Errorf("got %+v, want %+v", all, want)
	}
	old, none := one, one
	old.LastCleanup, none.LastCleanup = time.UnixMicro(1), time.Time{}
	one.LastCleanup = time.UnixMicro(2)
	for _, tt := range []struct {
		shards []Stats
		want   time.Time
	}{{[]Stats{one, old}, time.UnixMicro(1)}, {[]Stats{none, one}, time.Time{}}, {[]Stats{one, none}, time.Time{}}} {
		var all Stats
		for i, s := range tt.shards {
			all.add(s, i == 0)
		}
		if !all.LastCleanup.Equal(tt.want) {
			t.Errorf("got last cleanup %v, want %v", all.LastCleanup, tt.want)
		}
	}
}

func TestCloseClosesTheShards(t *testing.T) {
	dsn, _ := setUpShards(t, "a", "b")
	shards := openShards(t, dsn, Config{}, "a", "b")
	c := sharded(t, shards)
	check(t, c.Set(t.Context(), "k", 1, 0))
	check(t, c.Close())
	check(t, c.Close())
	for name, shard := range shards {
		if err := shard.Set(t.Context(), "k", 1, 0); !errors.Is(err, ErrClosed) || !strings.Contains(err.Error(), `shard "`+name+`"`) {
			t.Errorf("got %v", err)
		}
		if err := shard.db.Ping(); err == nil {
			t.Errorf("the pool of %s is open", name)
		}
	}
}
