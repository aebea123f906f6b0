package fastpgcache

import (
	"fmt"
	"iter"
	"slices"
	"strconv"
	"strings"
)

// snapshot tells which transactions were seen to have ended: those below xmax, but for
// those that were running.
type snapshot struct {
	xmax    int64
	running []int64
}

// parseSnapshot reads PostgreSQL's text of a txid_snapshot: xmin:xmax:list.
func parseSnapshot(text string) (s snapshot, err error) {
	parts := strings.Split(text, ":")
	if len(parts) != 3 {
		return s, fmt.Errorf("snapshot %q", text)
	}
	if s.xmax, err = strconv.ParseInt(parts[1], 10, 64); err != nil || parts[2] == "" {
		return s, err
	}
	for xid := range strings.SplitSeq(parts[2], ",") {
		n, err := strconv.ParseInt(xid, 10, 64)
		if err != nil {
			return s, err
		}
		s.running = append(s.running, n)
	}
	return s, nil
}

// saw reports whether s sees what xid did, if it did not roll back.
func (s snapshot) saw(xid int64) bool {
	return xid < s.xmax && !slices.Contains(s.running, xid)
}

// position is how far the feed was read.
type position struct {
	generation int64 // for which it was; 0: never
	token      string
	snapshot   snapshot
}

// news is what one reading of the feed brings.
type news struct {
	token    string // of the cache as it is; empty: it cannot be relied upon
	snapshot snapshot
	server   int64 // the server's clock, in microseconds
	trimmed  snapshot
	changes  iter.Seq2[string, int64] // since the position: each a key and the transaction that changed it
	all      bool                     // keys may have changed that are not among them
}

// follows reports whether n tells everything that happened since p. Rows of the feed that
// trimmed sees may be gone, so p must have seen whatever it sees.
func (n *news) follows(p position) bool {
	if n.all || n.token != p.token || n.snapshot.xmax < p.snapshot.xmax || p.snapshot.xmax < n.trimmed.xmax {
		return false
	}
	for _, xid := range p.snapshot.running {
		if n.trimmed.saw(xid) {
			return false
		}
	}
	return true
}

// take moves l on to n, which was asked for at the time at, from the position p, and
// returns the next position. Where n does not follow p, what is held is dropped, and a
// new generation begins as of n.
func (l *local) take(p position, at instant, n *news) position {
	next := position{p.generation, n.token, n.snapshot}
	m := l.kept.current.Load()
	if m != nil && m.generation == p.generation {
		if n.follows(p) {
			l.catchUp(moment{at, n.server, p.generation}, n.changes)
			return next
		}
		l.kept.reset()
	}
	if n.token == "" {
		return position{}
	}
	next.generation = l.kept.begin(at, n.server)
	return next
}
