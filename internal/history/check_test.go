package history

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

func TestCheckTellsRightAnswersFromWrongOnes(t *testing.T) {
	const process, other, staleness = 1, 2, 10
	store := func(by int, start, end int64) Event {
		return Event{Kind: Stored, Certain: true, Process: by, Value: start, Start: start, End: end}
	}
	perhaps := func(e Event) Event { e.Certain = false; return e }
	expires := func(e Event, ttl int64) Event { e.TTL = ttl; return e }
	remove := func(start, end int64) Event {
		return Event{Kind: Removed, Certain: true, Key: AllKeys, Start: start, End: end}
	}
	retime := func(start, end int64) Event { return Event{Kind: Retimed, Start: start, End: end} }
	miss := func(start, end int64) Event {
		return Event{Kind: Missed, Process: process, Staleness: staleness, Start: start, End: end}
	}
	hit := func(value, start, end int64) Event {
		return Event{Kind: Hit, Value: value, Process: process, Staleness: staleness, Start: start, End: end}
	}
	for _, test := range []struct {
		events []Event
		want   int
	}{
		{[]Event{miss(100, 101)}, 0},
		{[]Event{store(other, 80, 90), miss(100, 101)}, 1},
		{[]Event{perhaps(store(other, 80, 90)), miss(100, 101)}, 0},
		{[]Event{store(other, 80, 91), miss(100, 101)}, 0},
		{[]Event{store(process, 80, 100), miss(100, 101)}, 1},
		{[]Event{store(process, 80, 101), miss(100, 101)}, 0},
		{[]Event{store(other, 50, 60), remove(70, 80), miss(100, 101)}, 0},
		{[]Event{store(other, 50, 60), remove(70, 80), store(other, 81, 82), miss(100, 101)}, 1},
		{[]Event{store(other, 50, 60), remove(40, 51), miss(100, 101)}, 0},
		{[]Event{store(other, 50, 60), remove(40, 49), miss(100, 101)}, 1},
		{[]Event{store(other, 50, 60), remove(101, 102), miss(100, 110)}, 0},
		{[]Event{store(other, 50, 60), remove(110, 112), miss(100, 110)}, 0},
		{[]Event{store(other, 50, 60), remove(111, 112), miss(100, 110)}, 1},

		{[]Event{hit(50, 100, 101)}, 1},
		{[]Event{store(other, 50, 60), hit(50, 100, 101)}, 0},
		{[]Event{store(other, 50, 60), hit(50, 40, 50)}, 0},
		{[]Event{store(other, 50, 60), hit(50, 40, 49)}, 1},
		{[]Event{store(other, 50, 60), remove(61, 90), hit(50, 100, 101)}, 1},
		{[]Event{store(other, 50, 60), perhaps(remove(61, 90)), hit(50, 100, 101)}, 0},
		{[]Event{store(other, 50, 60), remove(61, 91), hit(50, 100, 101)}, 0},
		{[]Event{store(other, 50, 60), remove(60, 90), hit(50, 100, 101)}, 0},
		{[]Event{store(other, 50, 60), store(process, 61, 100), hit(50, 100, 101)}, 1},
		{[]Event{store(other, 50, 60), store(process, 61, 101), hit(50, 100, 101)}, 0},
		{[]Event{store(other, 50, 60), store(other, 61, 100), hit(50, 100, 101)}, 0},
		{[]Event{perhaps(store(other, 50, 60)), store(other, 61, 70), store(other, 65, 100), hit(50, 100, 101)}, 1},
		{[]Event{expires(store(other, 50, 60), 10), hit(50, 70+Slack, 80+Slack)}, 0},
		{[]Event{expires(store(other, 50, 60), 10), hit(50, 71+Slack, 80+Slack)}, 1},
		{[]Event{expires(store(other, 50, 60), 10), retime(61, 62), hit(50, 71+Slack, 80+Slack)}, 0},
		{[]Event{expires(store(other, 50, 60), 10), retime(40, 45), hit(50, 71+Slack, 80+Slack)}, 1},
	} {
		if got := Check(test.events); len(got.Wrong) != test.want {
			t.Errorf("%v: got %v, want %d", test.events, got.Wrong, test.want)
		}
	}
}

func TestWhatTheDeadMayHaveDoneIsNoFault(t *testing.T) {
	store := Event{Kind: Stored, Certain: true, Value: 7<<32 | 1, Start: 10, End: 20}
	for _, answer := range []Event{
		{Kind: Missed, Start: 60, End: 61},
		{Kind: Hit, Value: 7<<32 | 2, Start: 60, End: 61},
		{Kind: Hit, Value: store.Value, Start: 60, End: 61},
	} {
		if got := Check(append([]Event{store, answer}, Lost(7, store.Value, 30, 50)...)); len(got.Wrong) != 0 {
			t.Errorf("got %v", got.Wrong)
		}
	}
	again := Event{Kind: Stored, Certain: true, Value: 8<<32 | 1, Start: 51, End: 55}
	for _, answer := range []Event{
		{Kind: Missed, Start: 60, End: 61},
		{Kind: Hit, Value: 7<<32 | 2, Start: 60, End: 61},
	} {
		if got := Check(append([]Event{store, again, answer}, Lost(7, store.Value, 30, 50)...)); len(got.Wrong) != 1 {
			t.Errorf("after it, got %v, want one", got.Wrong)
		}
	}
}

// possible tells by trying all moments whether answer may have been given: there is a moment
// of its store and one of the answer, between which no certain write must have happened.
func possible(events []Event, answer Event) bool {
	writes := slices.DeleteFunc(slices.Clone(events), func(e Event) bool { return e.Kind != Stored && e.Kind != Removed })
	none := Event{Kind: Removed, Start: -1, End: -1} // at first there is nothing
	for _, origin := range append(writes, none) {
		if answer.Kind == Hit && (origin.Kind != Stored || origin.Value != answer.Value) || answer.Kind == Missed && origin.Kind != Removed {
			continue
		}
		for at := max(answer.Start-answer.Staleness, 0); at <= answer.End; at++ {
			for from := origin.Start; from <= min(origin.End, at); from++ {
				free := true
				for _, w := range writes {
					own := w.Process != 0 && w.Process == answer.Process && w.End <= answer.Start
					if w != origin && w.Certain && w.Start > from && (w.End <= at || own) {
						free = false
					}
				}
				if free {
					return true
				}
			}
		}
	}
	return false
}

// Check agrees with trying all moments, on small histories that are random: right ones and
// wrong ones.
func TestCheckAgreesWithTryingEverything(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	wrong, right := 0, 0
	for range 60_000 {
		var events []Event
		for value := range int64(1 + random.IntN(4)) {
			e := Event{Kind: Stored, Certain: random.IntN(4) > 0, Process: random.IntN(3), Value: value + 1, Start: 1 + random.Int64N(20)}
			if random.IntN(3) == 0 {
				e.Kind, e.Value = Removed, 0
			}
			e.End = e.Start + random.Int64N(6)
			events = append(events, e)
		}
		answer := Event{Kind: Missed, Process: 1 + random.IntN(2), Staleness: random.Int64N(8), Start: random.Int64N(25)}
		answer.End = answer.Start + random.Int64N(4)
		if random.IntN(3) > 0 {
			answer.Kind, answer.Value = Hit, 1+random.Int64N(4)
		}
		want := possible(events, answer)
		got := len(Check(append(events, answer)).Wrong) == 0
		if got != want {
			t.Fatalf("%+v\nof %+v\ngot %t, want %t", answer, events, got, want)
		}
		if want {
			right++
		} else {
			wrong++
		}
	}
	t.Logf("%d right, %d wrong", right, wrong)
}

// A cache that answers from a moment ago, as it may, is found right; each way of answering
// otherwise is found wrong.
func TestFaultsOfACacheAreFound(t *testing.T) {
	for _, fault := range []string{"", "an old value", "an own write forgotten", "a lost entry", "a value of another key", "outlives its TTL", "comes too early", "too stale"} {
		t.Run(fault, func(t *testing.T) {
			got := Check(simulate(fault))
			if (len(got.Wrong) == 0) != (fault == "") || got.Hits < 500 || got.Misses < 100 {
				t.Errorf("got %d wrong of %d hits and %d misses: %s", len(got.Wrong), got.Hits, got.Misses, strings.Join(got.Wrong[:min(3, len(got.Wrong))], "\n"))
			}
		})
	}
}

// simulate is the history of a cache with a fault.
func simulate(fault string) []Event {
	random := rand.New(rand.NewPCG(3, 4))
	type version struct{ value, at, expires int64 }
	const keys, staleness = 5, int64(20 * 1e6)
	ms := func(n int64) int64 { return n * 1e6 }
	held := make([][]version, keys)
	own := make([][3]int64, keys) // when each process last wrote
	for k := range held {
		held[k] = []version{{}}
	}
	var events []Event
	now, values := int64(1e12), int64(0)
	at := func(k int, when int64) version {
		for i := len(held[k]) - 1; ; i-- {
			if v := held[k][i]; v.at <= when {
				if v.expires != 0 && v.expires <= now && fault != "outlives its TTL" {
					return version{at: v.expires}
				}
				return v
			}
		}
	}
	for range 4000 {
		now += ms(random.Int64N(4))
		k, p := random.IntN(keys), 1+random.IntN(2)
		e := Event{Key: k, Process: p, Certain: true, Start: now, End: now + ms(1)}
		switch random.IntN(6) {
		case 0:
			values++
			e.Kind, e.Value = Stored, values
			v := version{value: values, at: now}
			if random.IntN(2) == 0 {
				e.TTL = ms(5 + random.Int64N(20))
				v.expires = now + e.TTL
				events = append(events, Event{Kind: Removed, Key: k, Start: e.Start + e.TTL - Slack, End: e.End + e.TTL + Slack})
			}
			held[k] = append(held[k], v)
			own[k][p] = now
		case 1:
			e.Kind = Removed
			held[k] = append(held[k], version{at: now})
			own[k][p] = now
		default:
			when := max(now-random.Int64N(staleness), own[k][p])
			switch broken := random.IntN(10) == 0; {
			case !broken:
			case fault == "an old value" && len(held[k]) > 8:
				when = held[k][len(held[k])-8].at
			case fault == "an own write forgotten":
				when = now - staleness
			case fault == "too stale":
				when = now - 5*staleness
			}
			v := at(k, when)
			switch broken := random.IntN(10) == 0; {
			case !broken:
			case fault == "a lost entry":
				v.value = 0
			case fault == "a value of another key" && v.value != 0:
				v.value = at((k+1)%keys, when).value
			case fault == "comes too early":
				v.value = values + 1
			}
			e.Kind, e.Value, e.Staleness, e.Certain = Hit, v.value, staleness, false
			if v.value == 0 {
				e.Kind = Missed
			}
		}
		events = append(events, e)
		now = e.End + 1
	}
	return events
}

func TestALogNotesWhatItIsTold(t *testing.T) {
	l := &Log{Number: 3, Process: 2, Staleness: 5}
	v, text := l.Value()
	l.Stored(1, v, Now(), 0, nil)
	l.Stored(1, v, Now(), 1000, fmt.Errorf("lost"))
	l.Removed(AllKeys, Now(), nil)
	l.Answered(1, text, true, Now(), nil)
	l.Answered(1, "no number", true, Now(), nil)
	l.Answered(1, "", false, Now(), nil)
	l.Answered(1, "", false, Now(), fmt.Errorf("no answer"))
	var kinds []Kind
	for _, e := range l.Events {
		kinds = append(kinds, e.Kind)
	}
	if want := []Kind{Stored, Stored, Removed, Removed, Hit, Hit, Missed}; !slices.Equal(kinds, want) {
		t.Errorf("got %v, want %v", kinds, want)
	}
	if e := l.Events[1]; e.Certain || e.End != Forever || l.Events[2].End != Forever {
		t.Errorf("got %+v for what may have been stored", e)
	}
	if v>>32 != 3 || l.Events[4].Value != v || l.Events[5].Value == v {
		t.Errorf("got %v", l.Events)
	}
}
