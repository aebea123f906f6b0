// Package history tells right answers of a cache from wrong ones. Callers note when
// everything that may change what a key answers began and ended, and each answer
// likewise. Afterwards [Check] holds each answer against that. It knows nothing of caches:
// the model checker, the conformance suite and scripts/prove all use it.
package history

import (
	"math"
	"strconv"
	"time"
)

// Event is what happened to a key between two moments, in nanoseconds.
type Event struct {
	Kind       Kind
	Certain    bool  // it has happened by End; else perhaps
	Key        int   // or AllKeys
	Value      int64 // each is stored at most once
	Process    int   // whose cache it was; 0: nobody's
	Staleness  int64 // how old an answer may be
	Start, End int64
	TTL        int64 // of what was stored; 0: none
}

// Kind is what an Event tells.
type Kind int

const (
	Stored  Kind = iota + 1
	Removed      // at any moment from Start to End
	Retimed      // its TTL was changed
	Missed       // said to be absent
	Hit          // said to have Value
)

const (
	AllKeys = -1
	Forever = math.MaxInt64

	// Slack is how far the server's clock and ours may be apart.
	Slack = int64(3 * time.Millisecond)
)

var begin = time.Now()

// Now is monotonic, and comparable across processes of one machine.
func Now() int64 { return begin.UnixNano() + int64(time.Since(begin)) }

// Log is what one caller notes. It is for one goroutine.
type Log struct {
	Number    int64         // no other Log's: its values have it in their high bits
	Process   int           // whose cache the caller uses; 0: none
	Staleness time.Duration // of that cache
	Events    []Event

	values int64
}

// Note adds e.
func (l *Log) Note(e Event) { l.Events = append(l.Events, e) }

// Value returns a value that nobody else stores, and its text.
func (l *Log) Value() (int64, string) {
	l.values++
	v := l.Number<<32 | l.values
	return v, strconv.FormatInt(v, 10)
}

// end is when what returned err just now was over: where it failed, the server may go on.
func end(err error) int64 {
	if err != nil {
		return Forever
	}
	return Now()
}

// Stored notes that key was given value from start on, or perhaps, if err is not nil.
func (l *Log) Stored(key int, value, start int64, ttl time.Duration, err error) {
	e := Event{Kind: Stored, Certain: err == nil, Key: key, Value: value, Process: l.Process, Start: start, End: end(err), TTL: int64(ttl)}
	l.Note(e)
	if ttl > 0 {
		l.Note(Event{Kind: Removed, Key: key, Start: start + int64(ttl) - Slack, End: e.End + min(int64(ttl)+Slack, Forever-e.End)})
	}
}

// Removed notes that key, or AllKeys, was removed from start on, or perhaps, if err is not nil.
func (l *Log) Removed(key int, start int64, err error) {
	l.Note(Event{Kind: Removed, Certain: err == nil, Key: key, Process: l.Process, Start: start, End: end(err)})
}

// Answered notes what a lookup said that began at start: nothing, if err is not nil.
func (l *Log) Answered(key int, text string, found bool, start int64, err error) {
	if err != nil {
		return
	}
	e := Event{Kind: Missed, Key: key, Process: l.Process, Staleness: int64(l.Staleness), Start: start, End: Now()}
	if found {
		e.Kind = Hit
		e.Value, err = strconv.ParseInt(text, 10, 64)
		if err != nil {
			e.Value = math.MinInt64 // which nobody has stored
		}
	}
	l.Note(e)
}

// Lost is what a caller that was killed may have done between two moments without being
// able to note it: with its next few values, to any key.
func Lost(number, lastValue, start, end int64) []Event {
	if lastValue == 0 {
		lastValue = number << 32
	}
	lost := []Event{
		{Kind: Removed, Key: AllKeys, Start: start, End: end},
		{Kind: Retimed, Key: AllKeys, Start: start, End: end},
	}
	for i := range int64(10) {
		lost = append(lost, Event{Kind: Stored, Key: AllKeys, Value: lastValue + 1 + i, Start: start, End: end})
	}
	return lost
}
