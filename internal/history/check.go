package history

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Verdict is what Check found.
type Verdict struct {
	Wrong        []string // a description of each wrong answer
	Misses, Hits int      // answers, right and wrong
}

// Check describes every answer that was not true at any moment from its staleness before
// the lookup began until that ended, or that an own write had made wrong when it began.
func Check(events []Event) (v Verdict) {
	byKey := make(map[int][]Event)
	var ofAll []Event
	for _, e := range events {
		if e.Key == AllKeys {
			ofAll = append(ofAll, e)
		} else {
			byKey[e.Key] = append(byKey[e.Key], e)
		}
	}
	for key, events := range byKey {
		first, last := int64(Forever), int64(0)
		for _, e := range events {
			first, last = min(first, e.Start), max(last, e.End)
		}
		for _, e := range ofAll {
			if e.End >= first && e.Start <= last {
				events = append(events, e)
			}
		}
		slices.SortFunc(events, func(a, b Event) int { return cmp.Compare(a.Start, b.Start) })
		v.misses(key, events)
		v.hits(key, events)
	}
	return v
}

// misses finds the misses of a key that was there all the time in question. events are in
// the order of their Start.
func (v *Verdict) misses(key int, events []Event) {
	// gone[i] is the last End of the removals that began before event i.
	gone := make([]int64, len(events)+1)
	for i, e := range events {
		gone[i+1] = gone[i]
		if e.Kind == Removed {
			gone[i+1] = max(gone[i], e.End)
		}
	}
	for i, miss := range events {
		if miss.Kind != Missed {
			continue
		}
		v.Misses++
		last, _ := slices.BinarySearchFunc(events, miss.End+1, func(e Event, at int64) int { return cmp.Compare(e.Start, at) })
		removedUntil := gone[last]
		// A store is within reach if no removal can have followed it.
		for j := i - 1; j >= 0 && events[j].Start > removedUntil; j-- {
			s := events[j]
			if s.Kind != Stored || !s.Certain {
				continue
			}
			own := s.Process != 0 && s.Process == miss.Process && s.End <= miss.Start
			if own || s.End <= miss.Start-miss.Staleness {
				v.Wrong = append(v.Wrong, fmt.Sprintf("process %d, staleness %v, missed key %d, own %v, there since %v before, at %d; removed until %v before",
					miss.Process, time.Duration(miss.Staleness), key, own, time.Duration(miss.Start-s.End), miss.Start, time.Duration(miss.Start-removedUntil)))
				break
			}
		}
	}
}

// hits finds the hits whose value was certainly replaced, removed or expired by the time
// in question, or not yet stored.
func (v *Verdict) hits(key int, events []Event) {
	origin := make(map[int64]Event)
	replaced := map[int]*replacements{0: {}} // by process; 0: by anybody
	var retimed []Event
	byEnd := slices.Clone(events)
	slices.SortFunc(byEnd, func(a, b Event) int { return cmp.Compare(a.End, b.End) })
	for _, e := range byEnd {
		if e.Kind == Stored {
			origin[e.Value] = e
		}
		if e.Kind == Retimed {
			retimed = append(retimed, e)
		}
		if !e.Certain || e.Kind != Stored && e.Kind != Removed {
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
		if hit.Kind != Hit {
			continue
		}
		v.Hits++
		s, ok := origin[hit.Value]
		wrong := ""
		switch {
		case !ok:
			wrong = "was never stored"
		case s.Start > hit.End:
			wrong = "was not yet stored"
		case replaced[0].after(s.End, hit.Start-hit.Staleness):
			wrong = "was replaced"
		case hit.Process != 0 && replaced[hit.Process].after(s.End, hit.Start):
			wrong = "was replaced by an own write"
		case s.TTL > 0 && s.End != Forever && hit.Start > s.End+s.TTL+Slack && !slices.ContainsFunc(retimed, func(e Event) bool {
			return e.Start < hit.End && e.End > s.Start
		}):
			wrong = "had expired"
		default:
			continue
		}
		v.Wrong = append(v.Wrong, fmt.Sprintf("process %d, staleness %v, key %d, at %d: the value %d of %v before %s",
			hit.Process, time.Duration(hit.Staleness), key, hit.Start, hit.Value, time.Duration(hit.Start-s.End), wrong))
	}
}

// replacements are writes, by when they ended: from each on, the latest start so far.
type replacements struct{ ends, starts []int64 }

func (r *replacements) add(e Event) {
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
