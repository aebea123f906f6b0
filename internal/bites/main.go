// Command bites shows that the tests of local answers would notice their faults: it makes
// them one by one, each in a copy of the module, and runs the model of all interleavings,
// the tests of the store, and, where these pass, the model checker. Faults of the checker of
// answers itself must be noticed by its own tests.
//
//	go run ./internal/bites [-ops n] [fault…]
package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// fault is changes of the package: in a file, of every old to new.
type fault struct {
	name    string
	changes []change
}

type change struct{ file, old, new string }

const check = "internal/history/check.go"

var faults = []fault{
	{"none", nil},

	// Kept values.
	{"keep-without-looking-at-the-stripe", []change{{"kept.go",
		`!k.valid(t) || k.stripes[t.stripe].Load() != t.count:`, `!k.valid(t):`}}},
	{"own-write-kept-though-another-came-between", []change{{"kept.go",
		` && k.stripes[t.stripe].Load() == count`, ` && count+1 > 0`}}},
	{"own-write-does-not-raise", []change{{"kept.go",
		"k.stripes[t.stripe].Load() == count\n\t\t\tk.stripes[t.stripe].Add(1)", `k.stripes[t.stripe].Load() == count`}}},
	{"raise-only-what-is-held", []change{{"kept.go",
		"\t\tk.stripes[stripe].Add(1)\n", "\t\tif held {\n\t\t\tk.stripes[stripe].Add(1)\n\t\t}\n"}}},
	{"any-own-value-taken-for-the-one-of-the-feed", []change{{"kept.go",
		`held && old.xid == xid && m`, `held && old.xid != 0 && m`}}},
	{"own-value-of-any-generation-taken-for-the-one-of-the-feed", []change{{"kept.go",
		` && m != nil && old.generation == m.generation`, ` && m == k.current.Load()`}}},
	{"value-of-any-generation", []change{{"kept.go",
		`v, ok && v.generation == m.generation`, `v, ok`}}},
	{"kept-for-any-generation", []change{{"kept.go",
		`!k.valid(t) || k.strip`, `!k.valid(ticket{generation: k.generation}) || func() bool { t.generation = k.generation; return false }() || k.strip`}}},
	{"of-two-answers-the-later-is-kept", []change{{"kept.go",
		"\t\tk.stripes[t.stripe].Add(1)\n\t\treturn nil, otter.InvalidateOp\n\t})\n}\n\n// written", "\t\treturn &keptValue{text, expires, 0, t.generation}, otter.WriteOp\n\t})\n}\n\n// written"}}},
	{"value-outlives-its-ttl", []change{{"kept.go",
		` - int64(age/time.Microsecond) - 1`, ``}}},
	{"kept-in-a-transaction", []change{
		{"single.go", `c.local == nil || c.tx != nil`, `c.local == nil`},
		{"local.go", `w.tickets == nil || w.c.tx != nil || at.xid == 0`, `w.tickets == nil`}}},
	{"one-clock-only", []change{{"clock.go",
		`max(now.monotonic-i.monotonic, now.wall-i.wall)`, `now.monotonic-i.monotonic`}}},
	{"wall-clock-read-once", []change{{"clock.go", `readAt != 0 && now-readAt < wallEvery`, `readAt != 0`}}},

	// Moments.
	{"published-before-the-changes-are-in", []change{{"local.go",
		"\tfor key, xid := range changes {\n", "\tok := l.kept.publish(next)\n\tfor key, xid := range changes {\n"},
		{"local.go", "\treturn l.kept.publish(next)\n", "\treturn ok\n"}}},
	{"value-before-its-moment", []change{{"local.go",
		"\tm := l.kept.current.Load()\n\tif m == nil {\n\t\treturn nil, 0, unknown\n\t}\n\tage := l.now()",
		"\tvar v0 *keptValue\n\tif l.kept.values != nil {\n\t\tv0, _ = l.kept.values.GetIfPresent(key)\n\t}\n\tnow := l.now()\n\tm := l.kept.current.Load()\n\tif m == nil {\n\t\treturn nil, 0, unknown\n\t}\n\tage := now"},
		{"local.go", `if v, ok := l.kept.get(key, m); ok {`, `if v, ok := v0, v0 != nil && v0.generation == m.generation; ok {`}}},
	{"true-from-after-the-statement", []change{{"feed.go",
		"\tf.catchUps.Add(1)\n",
		// As over a slow network: what is wrong is as large as the round trip.
		"\tf.catchUps.Add(1)\n\ttime.Sleep(2 * time.Millisecond)\n\tat = f.local.now()\n"}}},
	{"twice-as-old", []change{{"local.go",
		`age > l.maxStaleness`, `age > 2*l.maxStaleness`}}},
	{"clear-begins-no-generation", []change{{"local.go",
		`w.c.local.kept.reset()`, `_ = w.c.local.kept`}}},

	// The feed.
	{"running-transactions-forgotten", []change{{"feed.go",
		`c.args(s.xmax, s.list(), f.table`, `c.args(s.xmax, "", f.table`}}},
	{"running-transactions-seen", []change{{"feed.go",
		`!slices.Contains(s.running, xid)`, `!slices.Contains(s.running, -xid)`}}},
	{"token-not-looked-at", []change{{"feed.go",
		` || n.token != p.token`, ``}}},
	{"disabled-triggers-not-noticed", []change{{"feed.go",
		` AND t.tgenabled = 'A'::"char"`, ``}, {"feed.go", `t.xmin::text`, `t.oid::text`}}},
	{"truncate-not-noticed", []change{{"feed.go",
		`to_regclass($3::text)::oid::text || ' '::text || pg_relation_filenode(to_regclass($3::text))::text`, `to_regclass($3::text)::oid::text`}}},
	{"restart-not-noticed", []change{{"feed.go",
		`date_part('epoch'::text, pg_postmaster_start_time())::text`, `''::text`},
		{"feed.go", `e.id::text`, `''::text`},
		{"feed.go", ` || n.snapshot.xmax < p.snapshot.xmax`, ``}}},
	{"trimmed-not-looked-at", []change{{"feed.go",
		` || p.snapshot.xmax < n.trimmed.xmax`, ``}, {"feed.go", `if n.trimmed.saw(xid) {`, `if xid < 0 {`}}},
	{"trimmed-compared-by-xmax", []change{{"feed.go",
		`if n.trimmed.saw(xid) {`, `if xid < 0 {`}}},
	{"rows-without-keys-not-noticed", []change{{"feed.go",
		`n.all || n.token`, `n.token`}}},

	// What is written.
	{"delete-leaves-nothing-in-the-feed", []change{{"single.go",
		`change AS (INSERT INTO {schema}.cache_change (user_id, keys) SELECT {user}, ARRAY[key] FROM deleted WHERE live)`, `change AS (SELECT)`}}},
	{"set-leaves-nothing-in-the-feed", []change{{"single.go",
		`WITH change AS (INSERT INTO {schema}.cache_change (user_id, keys) VALUES ({user}, ARRAY[$1::text]))`, `WITH change AS (SELECT)`}}},
	{"set-many-leaves-nothing-in-the-feed", []change{{"batch.go",
		`WITH change AS (INSERT INTO {schema}.cache_change (user_id, keys) VALUES ({user}, $1::text[]))`, `WITH change AS (SELECT)`}}},
	{"cache-set-leaves-nothing-in-the-feed", []change{{"migrations.sql",
		`WITH change AS (INSERT INTO %1$I.cache_change (user_id, keys) VALUES (p_user_id, ARRAY[p_key]))`, ``}}},
	{"sql-writes-leave-nothing-in-the-feed", []change{{"migrations.sql",
		`INSERT INTO %1$I.cache_change (user_id, keys) VALUES (NEW.user_id, ARRAY[NEW.key]);`, ``}}},
	{"sql-writes-whatever-it-likes", []change{{"migrations.sql",
		`IF octet_length(NEW.key) NOT BETWEEN 1 AND 1024 OR`, `IF false AND`}}},
	{"sql-deletes-leave-nothing-in-the-feed", []change{{"migrations.sql",
		`WHERE expires_at IS NULL OR expires_at > statement_timestamp()) d`, `WHERE false) d`}}},
	{"trimming-not-told", []change{{"migrations.sql",
		`SET trimmed = epoch.trimmed, snapshots`, `SET snapshots`}}},

	// The checker of answers.
	{"check-believes-what-was-never-stored", []change{{check, `case !ok:`, `case !ok && false:`}}},
	{"check-believes-what-is-stored-later", []change{{check, `case s.Start > hit.End:`, `case false:`}}},
	{"check-forgets-replacements", []change{{check, `case replaced[0].after(`, `case false && replaced[0].after(`}}},
	{"check-forgets-own-replacements", []change{{check, `hit.Process != 0 && replaced`, `hit.Process < 0 && replaced`}}},
	{"check-forgets-ttls", []change{{check, `case s.TTL > 0 &&`, `case s.TTL < 0 &&`}}},
	{"check-takes-any-change-of-ttl-for-one-of-it", []change{{check, `e.Start < hit.End && e.End > s.Start`, `e.Start < hit.End`}}},
	{"check-takes-perhaps-for-certain", []change{{check, `if !e.Certain || e.Kind != Stored`, `if e.Kind != Stored`}}},
	{"check-takes-a-perhaps-stored-entry-for-there", []change{{check, ` || !s.Certain {`, ` {`}}},
	{"check-allows-twice-the-staleness-of-hits", []change{{check, `after(s.End, hit.Start-hit.Staleness)`, `after(s.End, hit.Start-2*hit.Staleness)`}}},
	{"check-allows-no-staleness-of-hits", []change{{check, `after(s.End, hit.Start-hit.Staleness)`, `after(s.End, hit.Start)`}}},
	{"check-allows-twice-the-staleness-of-misses", []change{{check, `s.End <= miss.Start-miss.Staleness`, `s.End <= miss.Start-2*miss.Staleness`}}},
	{"check-allows-no-staleness-of-misses", []change{{check, `s.End <= miss.Start-miss.Staleness`, `s.End <= miss.Start`}}},
	{"check-forgets-own-stores", []change{{check, `if own || `, `if `}}},
	{"check-forgets-removals", []change{{check, `gone[i+1] = max(gone[i], e.End)`, `gone[i+1] = max(gone[i], e.Start)`}}},
	{"check-forgets-removals-of-all", []change{{check, `if e.End >= first && e.Start <= last {`, `if false {`}}},
	{"check-compares-starts", []change{{check, `r.starts[n-1] > began`, `r.ends[n-1] > began`}}},
	{"check-looks-at-one-replacement", []change{{check, `start = max(start, r.starts[n-1])`, `start += 0 * r.starts[n-1]`}}},

	// Misses.
	{"own-writes-do-not-enter", []change{{"local.go",
		"\t\tl.misses.enter(hashOf(key))\n\t}\n\tl.kept.written", "\t\t_ = key\n\t}\n\tl.kept.written"}}},
	{"own-writes-do-not-enter-what-is-loaded", []change{{"misses.go",
		`if n.loading != 0 {`, `if n.loading < 0 {`}}},
	{"changes-do-not-enter", []change{{"local.go",
		"\t\tl.misses.enter(hash)\n\t\tl.kept", "\t\tl.kept"}}},
	{"filter-of-any-generation", []change{{"misses.go",
		` && f.generation == generation`, ``}}},
	{"expired-rows-not-loaded", []change{{"feed.go",
		`AND key > $1 ORDER`, `AND key > $1 AND (expires_at IS NULL OR expires_at > statement_timestamp()) ORDER`}}},
	{"false-positives-deleted", []change{{"misses.go",
		"\tfalsePositives := n.falsePositives.Add(1)", "\tf.filter.deleteHash(hash)\n\tfalsePositives := n.falsePositives.Add(1)"}}},

	// The limit on size.
	{"the-youngest-go", []change{{"migrations.sql",
		`THEN a.age >= ages[1] OR a.age >= ages[2]`, `THEN a.age < ages[1] OR a.age < ages[2]`}}},
	{"no-probation", []change{{"migrations.sql",
		`CASE WHEN mark = 0 THEN 64 ELSE 0 END AS queue`, `0 AS queue`}}},
	{"what-is-loaded-is-evicted", []change{{"migrations.sql",
		`WHERE c.xmin = r.version AND NOT EXISTS`, `WHERE c.xmin = r.version OR NOT EXISTS`}}},
	{"the-state-of-a-walk-is-believed", []change{{"migrations.sql",
		`AND '1e16'::real >= ALL (e.sums)`, ``}}},
	{"the-same-share-each-time", []change{{"migrations.sql",
		`floor(random() * 1000000)]`, `0]`}}},
	{"what-is-loaded-is-touched", []change{{"quota.go",
		"\n      AND NOT EXISTS (SELECT FROM {schema}.cache_lease l WHERE l.user_id = {user} AND l.key = k.key AND l.expires_at > statement_timestamp())\n    LIMIT 1 FOR NO KEY",
		"\n    LIMIT 1 FOR NO KEY"}}},
}

// quick are the tests that need no server, and some that catch at once what the model
// checker meets too seldom to fail for each time.
const quick = "^(TestNoInterleavingBreaksTheGuarantee|TestTheClock|TestTheWallClock|TestNoValueOutlives|TestOfTwo|TestOwn|TestAReset|TestTransactionsOf|TestWhat|TestKept|" +
	"TestAnExpiredEntryThatIsRevivedIsSeen|TestANewEpoch|TestLateCommits|TestAWriteInATransactionIsNotKept|TestEveryKindOfWriteIsHeardOf|TestWhoSleptPastTheTrimming|" +
	"TestTheOldestGoFirst|TestABulkLoad|TestNothingOfAWalk|TestALeaseKeeps|TestATouch)"

func main() {
	ops := flag.Int("ops", 200_000, "operations of the model checker for each fault")
	worlds := flag.Int("worlds", 150_000, "interleavings for each fault")
	flag.Parse()
	failed := false
	for _, f := range faults { // all of them, so that none rots while a few are tried
		for _, c := range f.changes {
			if source, err := os.ReadFile(c.file); err != nil || !strings.Contains(string(source), c.old) {
				fmt.Fprintf(os.Stderr, "%s: %q stands nowhere in %s\n", f.name, c.old, c.file)
				failed = true
			}
		}
	}
	for _, f := range faults {
		if flag.NArg() > 0 && !slices.Contains(flag.Args(), f.name) {
			continue
		}
		by, err := try(f, *ops, *worlds)
		if err != nil {
			fmt.Fprintln(os.Stderr, f.name, err)
			os.Exit(1)
		}
		failed = failed || (by == "") != (f.name == "none")
		if by == "" {
			by = "NOT CAUGHT"
		}
		fmt.Printf("%-45s %s\n", f.name, by)
	}
	if failed {
		os.Exit(1)
	}
}

var failure = regexp.MustCompile(`(?m)^--- FAIL: (\w+)|^.*?(\d+ wrong|\d+ of them wrong)$`)

// try names the tests that fail with f.
func try(f fault, ops, worlds int) (by string, err error) {
	dir, err := os.MkdirTemp("", "bites")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	if err := os.CopyFS(dir, os.DirFS(".")); err != nil {
		return "", err
	}
	for _, c := range f.changes {
		file := filepath.Join(dir, c.file)
		source, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		if !strings.Contains(string(source), c.old) {
			return "", fmt.Errorf("%s: %q stands nowhere", c.file, c.old)
		}
		if err := os.WriteFile(file, []byte(strings.ReplaceAll(string(source), c.old, c.new)), 0o644); err != nil {
			return "", err
		}
	}
	for _, tests := range [][]string{{".", quick}, {".", "^TestNoAnswerIsWrong$"}, {"./internal/history", "."}} {
		if ofChecker := len(f.changes) > 0 && f.changes[0].file == check; ofChecker != (tests[0] != ".") && f.changes != nil {
			continue
		}
		cmd := exec.Command("go", "test", "-count=1", "-vet=off", "-failfast", "-v", "-run", tests[1], tests[0])
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), fmt.Sprint("FASTPGCACHE_MODEL_OPS=", ops), fmt.Sprint("FASTPGCACHE_MODEL_WORLDS=", worlds))
		out, err := cmd.CombinedOutput()
		if err == nil {
			continue
		}
		var tests []string
		for _, m := range failure.FindAllStringSubmatch(string(out), -1) {
			if m[1] != "" {
				tests = append(tests, m[1])
			} else if m[2] != "0 wrong" && m[2] != "0 of them wrong" {
				tests = append(tests, "("+m[2]+")")
			}
		}
		if tests == nil {
			return "", fmt.Errorf("the tests did not run: %.2000s", out)
		}
		return strings.Join(tests, " "), nil
	}
	return "", nil
}
