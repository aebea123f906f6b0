package fastpgcache

import (
	"bufio"
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// The model: processes act at random on a few keys, and note for everything that may
// change what a key answers, and for each answer, when it began and ended. Afterwards
// each answer is held against that.

// event is what happened to a key between two moments, in nanoseconds.
type event struct {
	Kind       kind
	Certain    bool  // it has happened by End; else perhaps
	Key        int   // or allKeys
	Value      int64 // each is stored at most once
	Process    int   // whose Cache it was; 0: nobody's
	Staleness  int64
	Start, End int64
	TTL        int64 // of what was stored; 0: none
}

type kind int

const (
	wasStored  kind = iota + 1
	wasRemoved      // at any moment from Start to End
	wasRetimed      // its TTL was changed
	wasMissed       // said to be absent
	wasHit          // said to have Value
)

const (
	allKeys = -1
	forever = math.MaxInt64
	slack   = int64(3 * time.Millisecond) // between the server's clock and ours
)

// Keys are of a window that moves on: so that there always are some that have never
// been there, which a filter can tell.
const (
	modelKeys   = 20
	windowMoves = 5
	windowTime  = int64(80 * time.Millisecond)
)

func window() (first int) { return windowMoves * int(now()/windowTime) }

var modelStart = time.Now()

// now is monotonic, and comparable across processes of one machine.
func now() int64 { return modelStart.UnixNano() + int64(time.Since(modelStart)) }

// violations describes every answer that was not true at any moment from its staleness
// before the lookup began until that ended, or that an own write had made wrong when it
// began; and counts the answers.
func violations(events []event) (found []string, misses, hits int) {
	byKey := make(map[int][]event)
	var ofAll []event
	for _, e := range events {
		if e.Key == allKeys {
			ofAll = append(ofAll, e)
		} else {
			byKey[e.Key] = append(byKey[e.Key], e)
		}
	}
	for key, events := range byKey {
		first, last := int64(forever), int64(0)
		for _, e := range events {
			first, last = min(first, e.Start), max(last, e.End)
		}
		for _, e := range ofAll {
			if e.End >= first && e.Start <= last {
				events = append(events, e)
			}
		}
		slices.SortFunc(events, func(a, b event) int { return cmp.Compare(a.Start, b.Start) })
		missed, n := wrongMisses(key, events)
		misses += n
		hit, n := wrongHits(key, events)
		hits += n
		found = append(append(found, missed...), hit...)
	}
	return found, misses, hits
}

// wrongMisses finds the misses of a key that was there all the time in question. events
// are in the order of their Start.
func wrongMisses(key int, events []event) (found []string, misses int) {
	// gone[i] is the last End of the removals that began before event i.
	gone := make([]int64, len(events)+1)
	for i, e := range events {
		gone[i+1] = gone[i]
		if e.Kind == wasRemoved {
			gone[i+1] = max(gone[i], e.End)
		}
	}
	for i, miss := range events {
		if miss.Kind != wasMissed {
			continue
		}
		misses++
		last, _ := slices.BinarySearchFunc(events, miss.End, func(e event, at int64) int { return cmp.Compare(e.Start, at) })
		removedUntil := gone[last]
		// A store is within reach if no removal can have followed it.
		for j := i - 1; j >= 0 && events[j].Start > removedUntil; j-- {
			s := events[j]
			if s.Kind != wasStored || !s.Certain {
				continue
			}
			own := s.Process != 0 && s.Process == miss.Process && s.End <= miss.Start
			if own || s.End <= miss.Start-miss.Staleness {
				found = append(found, fmt.Sprintf("process %d, staleness %v, missed key %d, own %v, there since %v before, from %v on; removed until %v before",
					miss.Process, time.Duration(miss.Staleness), key, own, time.Duration(miss.Start-s.End),
					time.Duration(s.End-modelStart.UnixNano()), time.Duration(miss.Start-removedUntil)))
				break
			}
		}
	}
	return found, misses
}

// wrongHits finds the hits whose value was certainly replaced, removed or expired by the
// time in question, or never stored.
func wrongHits(key int, events []event) (found []string, hits int) {
	origin := make(map[int64]event)
	replaced := map[int]*replacements{0: {}} // by process; 0: by anybody
	retimed := int64(forever)                // since when TTLs are changed
	byEnd := slices.Clone(events)
	slices.SortFunc(byEnd, func(a, b event) int { return cmp.Compare(a.End, b.End) })
	for _, e := range byEnd {
		if e.Kind == wasStored {
			origin[e.Value] = e
		}
		if e.Kind == wasRetimed {
			retimed = min(retimed, e.Start)
		}
		if !e.Certain || e.Kind != wasStored && e.Kind != wasRemoved {
			continue
		}
		replaced[0].add(e)
		if e.Process != 0 {
			if replaced[e.Process] == nil {
				replaced[e.Process] = &replacements{}
			}
			replaced[e.Process].add(e)
		}
	}
	for _, hit := range events {
		if hit.Kind != wasHit {
			continue
		}
		hits++
		s, ok := origin[hit.Value]
		wrong := ""
		switch {
		case !ok:
			wrong = "was never stored"
		case replaced[0].after(s.End, hit.Start-hit.Staleness):
			wrong = "was replaced"
		case replaced[hit.Process].after(s.End, hit.Start):
			wrong = "was replaced by an own write"
		case s.TTL > 0 && s.End != forever && hit.Start > s.End+s.TTL+slack && retimed > hit.End:
			wrong = "had expired"
		default:
			continue
		}
		found = append(found, fmt.Sprintf("process %d, staleness %v, key %d: the value of %v before %s",
			hit.Process, time.Duration(hit.Staleness), key, time.Duration(hit.Start-s.End), wrong))
	}
	return found, hits
}

// replacements are writes, by when they ended: from each on, the latest start so far.
type replacements struct{ ends, starts []int64 }

func (r *replacements) add(e event) {
	start := e.Start
	if n := len(r.starts); n > 0 {
		start = max(start, r.starts[n-1])
	}
	r.ends, r.starts = append(r.ends, e.End), append(r.starts, start)
}

// after reports whether one began after a time and had ended by another.
func (r *replacements) after(began, ended int64) bool {
	if r == nil {
		return false
	}
	n, _ := slices.BinarySearch(r.ends, ended+1)
	return n > 0 && r.starts[n-1] > began
}

func TestTheModelTellsRightAnswersFromWrongOnes(t *testing.T) {
	const process, other, staleness = 1, 2, 10
	store := func(by int, start, end int64) event {
		return event{Kind: wasStored, Certain: true, Process: by, Value: start, Start: start, End: end}
	}
	perhaps := func(e event) event { e.Certain = false; return e }
	expires := func(e event, ttl int64) event { e.TTL = ttl; return e }
	remove := func(start, end int64) event {
		return event{Kind: wasRemoved, Certain: true, Key: allKeys, Start: start, End: end}
	}
	miss := func(start, end int64) event {
		return event{Kind: wasMissed, Process: process, Staleness: staleness, Start: start, End: end}
	}
	hit := func(value, start, end int64) event {
		return event{Kind: wasHit, Value: value, Process: process, Staleness: staleness, Start: start, End: end}
	}
	for _, test := range []struct {
		events []event
		want   int
	}{
		{[]event{miss(100, 101)}, 0},
		{[]event{store(other, 80, 90), miss(100, 101)}, 1},
		{[]event{perhaps(store(other, 80, 90)), miss(100, 101)}, 0},
		{[]event{store(other, 80, 91), miss(100, 101)}, 0},
		{[]event{store(process, 80, 100), miss(100, 101)}, 1},
		{[]event{store(process, 80, 101), miss(100, 101)}, 0},
		{[]event{store(other, 50, 60), remove(70, 80), miss(100, 101)}, 0},
		{[]event{store(other, 50, 60), remove(70, 80), store(other, 81, 82), miss(100, 101)}, 1},
		{[]event{store(other, 50, 60), remove(40, 51), miss(100, 101)}, 0},
		{[]event{store(other, 50, 60), remove(40, 49), miss(100, 101)}, 1},
		{[]event{store(other, 50, 60), remove(101, 102), miss(100, 110)}, 0},
		{[]event{store(other, 50, 60), remove(111, 112), miss(100, 110)}, 1},

		{[]event{hit(50, 100, 101)}, 1},
		{[]event{store(other, 50, 60), hit(50, 100, 101)}, 0},
		{[]event{store(other, 50, 60), remove(61, 90), hit(50, 100, 101)}, 1},
		{[]event{store(other, 50, 60), perhaps(remove(61, 90)), hit(50, 100, 101)}, 0},
		{[]event{store(other, 50, 60), remove(61, 91), hit(50, 100, 101)}, 0},
		{[]event{store(other, 50, 60), remove(60, 90), hit(50, 100, 101)}, 0},
		{[]event{store(other, 50, 60), store(process, 61, 100), hit(50, 100, 101)}, 1},
		{[]event{store(other, 50, 60), store(other, 61, 100), hit(50, 100, 101)}, 0},
		{[]event{perhaps(store(other, 50, 60)), store(other, 61, 70), store(other, 65, 100), hit(50, 100, 101)}, 1},
		{[]event{expires(store(other, 50, 60), 10), hit(50, 70+slack, 80+slack)}, 0},
		{[]event{expires(store(other, 50, 60), 10), hit(50, 71+slack, 80+slack)}, 1},
	} {
		if got, _, _ := violations(test.events); len(got) != test.want {
			t.Errorf("%v: got %v, want %d", test.events, got, test.want)
		}
	}
}

// actor is one goroutine of a process.
type actor struct {
	process   int
	staleness time.Duration
	cache     *Cache
	db        *sql.DB
	random    *rand.Rand
	events    []event
	number    int64 // of its own, in the high bits of its values
	values    int64
	wrote     int // the key of the last write
	ops       *atomic.Int64
}

func (a *actor) note(e event) { a.events = append(a.events, e) }

// value returns one that nobody else stores, and its text.
func (a *actor) value() (int64, string) {
	a.values++
	v := a.number<<32 | a.values
	return v, strconv.FormatInt(v, 10)
}

// stored notes that key was given value from start on, or not, if err is not nil.
func (a *actor) stored(key int, value int64, process int, start int64, ttl time.Duration, err error) {
	e := event{Kind: wasStored, Certain: err == nil, Key: key, Value: value, Process: process, Start: start, End: now(), TTL: int64(ttl)}
	if err != nil {
		e.End = forever // the server may go on
	}
	a.note(e)
	if ttl > 0 {
		a.note(event{Kind: wasRemoved, Key: key, Start: start + int64(ttl) - slack, End: e.End + min(int64(ttl)+slack, forever-e.End)})
	}
}

func (a *actor) removed(key, process int, start int64, err error) {
	e := event{Kind: wasRemoved, Certain: err == nil, Key: key, Process: process, Start: start, End: now()}
	if err != nil {
		e.End = forever
	}
	a.note(e)
}

// run acts until stop, in ways of a Cache or of plain SQL.
func (a *actor) run(ctx context.Context, stop func() bool, act func(context.Context) error) {
	for !stop() {
		a.ops.Add(1)
		if err := act(ctx); err != nil {
			time.Sleep(2 * time.Millisecond) // PostgreSQL is down, or the table gone
		}
	}
}

func name(key int) string { return fmt.Sprint("key ", key) }

// answered notes what a lookup said.
func (a *actor) answered(key int, text string, found bool, start int64, err error) {
	e := event{Kind: wasMissed, Key: key, Process: a.process, Staleness: int64(a.staleness), Start: start, End: now()}
	if found {
		e.Kind = wasHit
		e.Value, _ = strconv.ParseInt(text, 10, 64)
	}
	if err == nil {
		a.note(e)
	}
}

func (a *actor) get(ctx context.Context, key int) error {
	var text string
	start := now()
	found, err := a.cache.Get(ctx, name(key), &text)
	a.answered(key, text, found, start, err)
	return err
}

func (a *actor) useCache(ctx context.Context) error {
	key, ttl := window()+a.random.IntN(modelKeys), time.Duration(1+a.random.IntN(20))*time.Millisecond
	start := now()
	value, text := a.value()
	switch p := a.random.IntN(100); {
	case p < 40: // of a few keys, and the one just written
		if a.wrote > 0 && a.random.IntN(2) == 0 {
			key = a.wrote
		}
		first := key
		for ; a.random.IntN(40) > 0; key = first + a.random.IntN(3) {
			a.ops.Add(1)
			if err := a.get(ctx, key); err != nil {
				return err
			}
		}
		return nil
	case p < 48:
		found, err := a.cache.Exists(ctx, name(key))
		if !found {
			a.answered(key, "", false, start, err)
		}
		return err
	case p < 54:
		_, found, err := a.cache.TTL(ctx, name(key))
		if !found {
			a.answered(key, "", false, start, err)
		}
		return err
	case p < 62:
		values, err := a.cache.GetMany(ctx, []string{name(key), name(key + 1), name(key + 2)})
		for i := range 3 {
			v, found := values[name(key+i)]
			a.answered(key+i, v.String(), found, start, err)
		}
		return err
	case p < 75:
		a.wrote = key
		err := a.cache.Set(ctx, name(key), text, 0)
		a.stored(key, value, a.process, start, 0, err)
		for i := 0; i < 12 && err == nil && p < 68; i++ { // whatever happens meanwhile
			a.ops.Add(1)
			err = a.get(ctx, key)
		}
		return err
	case p < 81:
		err := a.cache.Set(ctx, name(key), text, ttl)
		a.stored(key, value, a.process, start, ttl, err)
		return err
	case p < 84:
		value2, text2 := a.value()
		err := a.cache.SetMany(ctx, map[string]any{name(key): text, name(key + 1): text2}, 0)
		a.stored(key, value, a.process, start, 0, err)
		a.stored(key+1, value2, a.process, start, 0, err)
		return err
	case p < 86:
		added, err := a.cache.Add(ctx, name(key), text, 0)
		if added || err != nil {
			a.stored(key, value, a.process, start, 0, err)
		}
		return err
	case p < 87:
		v, found, err := a.cache.Take(ctx, name(key))
		a.removed(key, a.process, start, err)
		if found {
			e := event{Kind: wasHit, Key: key, Start: start, End: now()} // not from memory
			e.Value, _ = strconv.ParseInt(v.String(), 10, 64)
			a.note(e)
		}
		return err
	case p < 89:
		var got string
		loaded := false
		err := a.cache.GetOrSet(ctx, name(key), &got, 0, func(context.Context) (any, error) { loaded = true; return text, nil })
		a.note(event{Kind: wasStored, Key: key, Value: value, Start: start, End: forever}) // there is no telling
		if !loaded {
			a.answered(key, got, true, start, err)
		}
		return err
	case p < 91:
		tx, err := a.db.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		defer tx.Rollback()
		if err = a.cache.WithTx(tx).Set(ctx, name(key), text, 0); err == nil {
			time.Sleep(time.Duration(a.random.IntN(5)) * time.Millisecond)
			err = tx.Commit()
		}
		a.stored(key, value, 0, start, 0, err)
		return err
	case p < 93:
		found, err := a.cache.Expire(ctx, name(key), ttl)
		if found || err != nil {
			a.note(event{Kind: wasRetimed, Key: key, Start: start, End: now()})
			a.note(event{Kind: wasRemoved, Key: key, Start: start + int64(ttl) - slack, End: now() + int64(ttl) + slack})
		}
		return err
	case p < 94:
		_, err := a.cache.Persist(ctx, name(key))
		a.note(event{Kind: wasRetimed, Key: key, Start: start, End: now()})
		return err
	case p < 95 && a.random.IntN(10) == 0:
		_, err := a.cache.Clear(ctx) // entries that are written meanwhile may stay
		a.removed(allKeys, a.process, start, err)
		return err
	case p < 96: // a caller that leaves
		ctx, cancel := context.WithTimeout(ctx, time.Duration(a.random.IntN(500))*time.Microsecond)
		defer cancel()
		err := a.cache.Set(ctx, name(key), text, 0)
		a.stored(key, value, a.process, start, 0, err)
		return nil
	default:
		_, err := a.cache.Delete(ctx, name(key))
		a.removed(key, a.process, start, err)
		return err
	}
}

const (
	modelUpsert = `INSERT INTO cache (key, value) VALUES ($1, $2)
		ON CONFLICT (user_id, key) DO UPDATE SET value = excluded.value, value_bytes = NULL, expires_at = NULL`
	modelDelete = `DELETE FROM cache WHERE user_id = current_user AND key = $1`
)

func (a *actor) useSQL(ctx context.Context) error {
	key := window() + a.random.IntN(modelKeys)
	start := now()
	value, text := a.value()
	exec := func(statement string, args ...any) error {
		_, err := a.db.ExecContext(ctx, statement, args...)
		return err
	}
	switch p := a.random.IntN(1000); {
	case p < 250:
		err := exec(modelUpsert, name(key), text)
		a.stored(key, value, 0, start, 0, err)
		return err
	case p < 350:
		err := exec(`SELECT cache_set(current_user::text, $1, $2)`, name(key), text)
		a.stored(key, value, 0, start, 0, err)
		return err
	case p < 450:
		err := exec(modelDelete, name(key))
		a.removed(key, 0, start, err)
		return err
	case p < 500:
		err := exec(`SELECT cache_delete(current_user::text, $1)`, name(key))
		a.removed(key, 0, start, err)
		return err
	case p < 550: // at once what is there, and what comes
		result, err := a.db.ExecContext(ctx, `UPDATE cache SET value = $2, value_bytes = NULL WHERE user_id = current_user AND key = $1`, name(key), text)
		if err != nil {
			a.stored(key, value, 0, start, 0, err)
		} else if n, _ := result.RowsAffected(); n > 0 { // an expired one, perhaps
			e := event{Kind: wasStored, Key: key, Value: value, Start: start, End: now()}
			a.note(e)
		}
		return err
	case p < 552:
		err := exec(`DELETE FROM cache WHERE user_id = current_user`)
		a.removed(allKeys, 0, start, err)
		return err
	case p < 556: // so that the feed is trimmed up to a moment ago
		if err := exec(`UPDATE cache_epoch SET taken = ARRAY(SELECT t - interval '1 hour' FROM unnest(taken) t) WHERE user_id = current_user`); err != nil {
			return err
		}
		return exec(`SELECT cache_trim(current_user::text, 100000)`)
	}
	return a.transaction(ctx)
}

// transaction writes some keys, and maybe others in a savepoint that it rolls back
// to, and after a while commits, as a prepared transaction or not, or rolls back.
func (a *actor) transaction(ctx context.Context) error {
	conn, err := a.db.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer conn.ExecContext(ctx, `ROLLBACK`)
	exec := func(statement string, args ...any) {
		if err == nil {
			_, err = conn.ExecContext(ctx, statement, args...)
		}
	}
	exec(`BEGIN`)
	keys := a.random.Perm(modelKeys)[:1+a.random.IntN(3)]
	slices.Sort(keys)
	begin := window()
	var done []event
	for _, key := range keys {
		key += begin
		value, text := a.value()
		switch start := now(); a.random.IntN(5) {
		case 0:
			exec(modelDelete, name(key))
			done = append(done, event{Kind: wasRemoved, Key: key, Start: start})
		case 1:
			exec(`SAVEPOINT s`)
			exec(modelUpsert, name(key), text)
			exec(`ROLLBACK TO s`)
		case 2:
			exec(`SAVEPOINT t`)
			fallthrough
		default:
			exec(modelUpsert, name(key), text)
			done = append(done, event{Kind: wasStored, Key: key, Value: value, Start: start})
		}
	}
	wait := func() { time.Sleep(time.Duration(a.random.IntN(20)) * time.Millisecond) }
	wait()
	committed := false
	switch id := strconv.FormatUint(a.random.Uint64(), 36); a.random.IntN(8) {
	case 0:
		if exec(`ROLLBACK`); err == nil {
			return nil
		}
	case 1:
		exec(`PREPARE TRANSACTION '` + id + `'`)
		wait()
		exec(`COMMIT PREPARED '` + id + `'`)
		committed = err == nil
	default:
		exec(`COMMIT`)
		committed = err == nil
	}
	for _, e := range done {
		if e.Certain, e.End = committed, now(); !committed {
			e.End = forever
		}
		a.note(e)
	}
	return err
}

// chaos is what an administrator does.
type chaos struct {
	actor
	server *pgtest.Server
	user   string
}

// restore brings entries of which nobody hears, as a dump does that is restored.
func (c *chaos) restore(ctx context.Context) error {
	start := now()
	tx, err := c.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	exec := func(statement string, args ...any) {
		if err == nil {
			_, err = tx.ExecContext(ctx, statement, args...)
		}
	}
	exec(`ALTER TABLE cache DISABLE TRIGGER ALL`)
	stored := map[int]int64{}
	for key := window() + modelKeys/4; len(stored) < 8; key++ {
		value, text := c.value()
		stored[key] = value
		exec(`INSERT INTO cache (user_id, key, value) VALUES ($1, $2, $3)
			ON CONFLICT (user_id, key) DO UPDATE SET value = excluded.value, value_bytes = NULL, expires_at = NULL`, c.user, name(key), text)
	}
	for _, trigger := range []string{"cache_changed_insert", "cache_changed_update", "cache_moved", "cache_deleted"} {
		exec(`ALTER TABLE cache ENABLE ALWAYS TRIGGER ` + trigger)
	}
	if err == nil {
		err = tx.Commit()
	}
	for key, value := range stored {
		c.stored(key, value, 0, start, 0, err)
	}
	return err
}

func (c *chaos) truncate(ctx context.Context) error {
	start := now()
	_, err := c.db.ExecContext(ctx, `TRUNCATE cache`)
	c.removed(allKeys, 0, start, err)
	return err
}

// fill inserts many keys that nobody asks for, so that catching up, and loading after the
// others, take their time.
func (c *chaos) fill(ctx context.Context) error {
	_, err := c.db.ExecContext(ctx, `DELETE FROM cache WHERE key LIKE '~%'`)
	if err == nil {
		_, err = c.db.ExecContext(ctx, `INSERT INTO cache (user_id, key, value) SELECT $1, '~' || i, '' FROM generate_series(1, 6000) i`, c.user)
	}
	return err
}

func (c *chaos) force(ctx context.Context) error {
	start := now()
	err := Setup(ctx, c.db, SetupConfig{Force: true})
	c.removed(allKeys, 0, start, err)
	return err
}

func (c *chaos) crash(ctx context.Context) error {
	start := now()
	err := c.server.Crash(ctx)
	if err == nil {
		err = repair(ctx, c.db)
	}
	c.removed(allKeys, 0, start, err)
	return err
}

// repair sees to what a server that commits asynchronously may have lost, or left.
func repair(ctx context.Context, db *sql.DB) error {
	for {
		var id string
		err := db.QueryRowContext(ctx, `SELECT gid FROM pg_prepared_xacts`).Scan(&id)
		if err != nil {
			return Setup(ctx, db, SetupConfig{})
		}
		db.ExecContext(ctx, `ROLLBACK PREPARED '`+id+`'`)
	}
}

// TestNoAnswerIsWrong runs for a few seconds; FASTPGCACHE_MODEL_OPS says how many
// operations are to be made instead.
func TestNoAnswerIsWrong(t *testing.T) {
	ctx := t.Context()
	most, _ := strconv.ParseInt(os.Getenv("FASTPGCACHE_MODEL_OPS"), 10, 64)
	const short = 4 * time.Second
	server := pgtest.Own(t, pgtest.Config{})
	admin := server.Database(t)
	adminDB := openDB(t, admin)
	adminDB.SetMaxIdleConns(0)
	check(t, Setup(ctx, adminDB, SetupConfig{}))
	user := pgtest.Role(t, admin)
	dsn := pgtest.WithUser(admin, user)

	var ops atomic.Int64
	begin := time.Now()
	stop := func() bool {
		if most > 0 {
			return ops.Load() >= most
		}
		return time.Since(begin) >= short
	}
	var actors []*actor
	var wg sync.WaitGroup
	start := func(a *actor, act func(context.Context) error) {
		a.number, a.ops, a.random = int64(len(actors)+1), &ops, rand.New(rand.NewPCG(uint64(len(actors)), uint64(begin.UnixNano())))
		actors = append(actors, a)
		wg.Go(func() { a.run(ctx, stop, act) })
	}
	var caches []*Cache
	for i, cfg := range []Config{
		{MaxStaleness: 3 * time.Millisecond},
		{MaxStaleness: 15 * time.Millisecond},
		{MaxStaleness: 60 * time.Millisecond},
		{MaxStaleness: 500 * time.Millisecond}, // longer than a load
		{MaxStaleness: 15 * time.Millisecond, DisableCoalescing: true, DisablePrepare: true},
	} {
		cfg.OnError = func(error) {}
		c, err := Open(dsn, cfg)
		check(t, err)
		t.Cleanup(func() { c.Close() }) // whose connections may have died
		if i == 1 {
			c.db.SetMaxOpenConns(1)
		}
		caches = append(caches, c)
		for range 2 {
			a := &actor{process: i + 1, staleness: cfg.MaxStaleness, cache: c, db: c.db}
			start(a, a.useCache)
		}
	}
	db := openDB(t, dsn)
	for range 2 {
		a := &actor{db: db}
		start(a, a.useSQL)
	}
	c := &chaos{actor: actor{db: adminDB}, server: server, user: user}
	next := time.Now().Add(short / 2)
	start(&c.actor, func(ctx context.Context) error {
		switch {
		case time.Now().After(next): // every few seconds, since each takes one
			next = time.Now().Add(4 * short)
			return c.crash(ctx)
		case c.random.IntN(20) == 0:
			return c.force(ctx)
		case c.random.IntN(10) == 0:
			return c.truncate(ctx)
		}
		if c.random.IntN(4) == 0 {
			return c.fill(ctx)
		}
		time.Sleep(time.Duration(20+c.random.IntN(100)) * time.Millisecond)
		return c.restore(ctx)
	})
	wg.Wait()

	var events []event
	for _, a := range actors {
		events = append(events, a.events...)
	}
	report(t, events)
	var sum Stats
	for _, c := range caches {
		s := c.Stats()
		sum.FilterAnswers += s.FilterAnswers
		sum.LocalHits += s.LocalHits
		sum.Local.Resets += s.Local.Resets
		sum.Local.CatchUps += s.Local.CatchUps
		sum.Local.FilterLoads += s.Local.FilterLoads
	}
	t.Logf("%d operations in %v: %d misses and %d hits answered from memory, %d catch-ups, %d resets, %d filters",
		ops.Load(), time.Since(begin).Round(time.Millisecond), sum.FilterAnswers, sum.LocalHits, sum.Local.CatchUps, sum.Local.Resets, sum.Local.FilterLoads)
	if sum.FilterAnswers < 50 || sum.LocalHits < 500 || sum.Local.CatchUps < 20 || sum.Local.FilterLoads < 10 {
		t.Error("too little for a verdict")
	}
}

// report fails the test for violations among events.
func report(t *testing.T, events []event) {
	t.Helper()
	wrong, misses, hits := violations(events)
	counts := map[kind]int{}
	for _, e := range events {
		counts[e.Kind]++
	}
	t.Logf("%d stores, %d removals, %d misses and %d hits, %d of them wrong", counts[wasStored], counts[wasRemoved], misses, hits, len(wrong))
	for _, v := range wrong[:min(len(wrong), 10)] {
		t.Error(v)
	}
}

// The same with real processes, each with a Cache, whose server is killed under load.
func TestNoAnswerIsWrongAcrossProcesses(t *testing.T) {
	ctx := t.Context()
	server := pgtest.Own(t, pgtest.Config{})
	admin := server.Database(t)
	adminDB := openDB(t, admin)
	adminDB.SetMaxIdleConns(0)
	check(t, Setup(ctx, adminDB, SetupConfig{}))
	dsn := pgtest.WithUser(admin, pgtest.Role(t, admin))

	var mu sync.Mutex
	var events []event // guarded by mu
	var answers int64
	var wg sync.WaitGroup
	for process := 1; process <= 3; process++ {
		cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestModelProcess$")
		cmd.Env = append(os.Environ(), "FASTPGCACHE_MODEL_DSN="+dsn, fmt.Sprint("FASTPGCACHE_MODEL_PROCESS=", process))
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		check(t, err)
		check(t, cmd.Start())
		wg.Go(func() {
			var got struct {
				Events  []event
				Answers int64
			}
			err := json.NewDecoder(bufio.NewReader(out)).Decode(&got)
			if err := cmp.Or(err, cmd.Wait()); err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			events = append(events, got.Events...)
			answers += got.Answers
		})
	}
	c := &chaos{actor: actor{db: adminDB}, server: server}
	for range 2 {
		time.Sleep(1500 * time.Millisecond)
		check(t, c.crash(ctx))
	}
	wg.Wait()
	report(t, append(events, c.events...))
	if answers < 50 {
		t.Errorf("got %d answers of filters, too few for a verdict", answers)
	}
}

// TestModelProcess is no test, but one of those processes.
func TestModelProcess(t *testing.T) {
	process, _ := strconv.Atoi(os.Getenv("FASTPGCACHE_MODEL_PROCESS"))
	if process == 0 {
		t.Skip("no child process")
	}
	const staleness = 15 * time.Millisecond
	c, err := Open(os.Getenv("FASTPGCACHE_MODEL_DSN"), Config{MaxStaleness: staleness})
	check(t, err)
	begin := time.Now()
	stop := func() bool { return time.Since(begin) > 5*time.Second }
	var ops atomic.Int64
	var actors []*actor
	var wg sync.WaitGroup
	for i := range 3 {
		a := &actor{process: process, staleness: staleness, cache: c, db: c.db, ops: &ops,
			number: int64(100*process + i), random: rand.New(rand.NewPCG(uint64(i), uint64(begin.UnixNano())))}
		actors = append(actors, a)
		act := a.useCache
		if i == 0 {
			a.staleness, act = 0, a.useSQL
		}
		wg.Go(func() { a.run(t.Context(), stop, act) })
	}
	wg.Wait()
	var got struct {
		Events  []event
		Answers int64
	}
	for _, a := range actors {
		got.Events = append(got.Events, a.events...)
	}
	got.Answers = c.Stats().FilterAnswers
	c.Close()
	check(t, json.NewEncoder(os.Stdout).Encode(got))
}
