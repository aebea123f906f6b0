package main

import (
	"fmt"
	"time"
)

// What is small needs no hint.
const (
	manyRows    = 10_000
	manyBytes   = 64 << 20
	muchFeed    = 512 << 20
	longAgo     = 5 * time.Minute
	hotEnough   = 0.9
	fewEntries  = 0.25 // of what the table takes
	updatesSeen = 10_000
)

// hints say what could be better, and what to do about it.
func (st *status) hints(schema string) []string {
	hints := []string{}
	hint := func(format string, args ...any) { hints = append(hints, fmt.Sprintf(format, args...)) }

	if st.Expired > st.Live && st.Expired >= manyRows {
		hint("most entries have expired, and still take space: set Config.CleanupInterval in a service, or let cron run fastpgcache-admin cleanup")
	}
	if rows := st.Live + st.Expired + st.Absent; !st.Confined && st.Dead > rows && st.Dead >= manyRows {
		hint("most rows are dead, and wait for autovacuum: VACUUM %s.cache;", schema)
	}
	if st.since != nil && st.now.Sub(*st.since) >= longAgo {
		hint("the session of process %d has had a transaction open for %s, which keeps all dead rows since then: let it end, or SELECT pg_terminate_backend(%d);",
			st.pid, span(st.now.Sub(*st.since)), st.pid)
	}
	if st.Updates >= updatesSeen && float64(st.HOT) < hotEnough*float64(st.Updates) {
		hint("only %s of the updates are HOT, the others touch the index, too: look for transactions that stay open for long", share(st.HOT, st.Updates))
	}
	if table := st.Bytes - st.IndexBytes; !st.Confined && table >= manyBytes && float64(st.Stored) < fewEntries*float64(table) {
		hint("the table takes %s for %s of entries: if it is to shrink, VACUUM FULL %s.cache; locks it meanwhile", bytes(table), bytes(st.Stored), schema)
	}
	if st.FeedBytes >= muchFeed {
		hint("the feed takes %s: it shrinks when no transaction stays open for long, and somebody writes", bytes(st.FeedBytes))
	}
	return hints
}
