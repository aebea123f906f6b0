// Package figures lists what Stats tells, once for every exporter.
package figures

import "github.com/fastpgcache/fastpgcache"

// A Figure is a number of Stats.
type Figure struct {
	Name    string // in OpenTelemetry; Prometheus' is made of it
	Unit    string // of UCUM: By, s, or what is counted in braces
	Help    string
	Counter bool // it only grows; else it goes up and down
	Value   func(*fastpgcache.Stats) float64
}

// All are all but Latency, which is the histogram that Duration names.
var All = []Figure{
	counter("fastpgcache.hits", "{key}", "Keys looked up and found, in memory or in the database.",
		func(s *fastpgcache.Stats) int64 { return s.Hits }),
	counter("fastpgcache.misses", "{key}", "Keys looked up and not found, by memory or by the database.",
		func(s *fastpgcache.Stats) int64 { return s.Misses }),
	counter("fastpgcache.sets", "{entry}", "Entries written.",
		func(s *fastpgcache.Stats) int64 { return s.Sets }),
	counter("fastpgcache.deletes", "{entry}", "Entries removed by a caller; neither expired nor evicted ones.",
		func(s *fastpgcache.Stats) int64 { return s.Deletes }),
	counter("fastpgcache.loads", "{call}", "Calls of the loaders of GetOrSet and its kin.",
		func(s *fastpgcache.Stats) int64 { return s.Loads }),
	counter("fastpgcache.evicted", "{entry}", "Entries of any process that this one removed, so that they keep the limit on size.",
		func(s *fastpgcache.Stats) int64 { return s.Evicted }),
	counter("fastpgcache.errors", "{error}", "Errors of the cache, returned or given to OnError; not those of loaders.",
		func(s *fastpgcache.Stats) int64 { return s.Errors }),
	counter("fastpgcache.statements", "{statement}", "Statements sent to the database.",
		func(s *fastpgcache.Stats) int64 { return s.Statements }),
	counter("fastpgcache.statement.keys", "{key}", "Keys that the statements looked up, wrote or removed. Divided by the statements: how calls merge.",
		func(s *fastpgcache.Stats) int64 { return s.Keys }),
	gauge("fastpgcache.last_cleanup.timestamp", "s", "When this process was last through with a cleanup, in seconds since 1970; 0: never.",
		func(s *fastpgcache.Stats) float64 {
			if s.LastCleanup.IsZero() {
				return 0
			}
			return float64(s.LastCleanup.UnixMicro()) / 1e6
		}),

	counter("fastpgcache.local.hits", "{key}", "Hits that were answered from memory.",
		func(s *fastpgcache.Stats) int64 { return s.Local.Hits }),
	counter("fastpgcache.local.misses", "{key}", "Misses that were answered from memory, by the filter.",
		func(s *fastpgcache.Stats) int64 { return s.Local.Misses }),
	gauge("fastpgcache.local.values", "{value}", "Values held in memory.",
		func(s *fastpgcache.Stats) float64 { return float64(s.Local.Values) }),
	gauge("fastpgcache.local.size", "By", "Memory that the values held take, about.",
		func(s *fastpgcache.Stats) float64 { return float64(s.Local.Bytes) }),
	counter("fastpgcache.local.evictions", "{value}", "Values that had to leave memory for others.",
		func(s *fastpgcache.Stats) int64 { return s.Local.Evictions }),
	counter("fastpgcache.local.catch_ups", "{catch_up}", "Readings of what others have changed.",
		func(s *fastpgcache.Stats) int64 { return s.Local.CatchUps }),
	counter("fastpgcache.local.resets", "{reset}", "Times that all of memory was forgotten, since something was in doubt.",
		func(s *fastpgcache.Stats) int64 { return s.Local.Resets }),
	gauge("fastpgcache.local.age", "s", "Time since the last catch-up; 0: at the moment nothing may be answered from memory.",
		func(s *fastpgcache.Stats) float64 { return s.Local.Age.Seconds() }),

	gauge("fastpgcache.filter.keys", "{key}", "Keys held by the filter, deleted ones among them.",
		func(s *fastpgcache.Stats) float64 { return float64(s.Local.FilterKeys) }),
	gauge("fastpgcache.filter.size", "By", "Memory that the filter takes.",
		func(s *fastpgcache.Stats) float64 { return float64(s.Local.FilterBytes) }),
	counter("fastpgcache.filter.loads", "{load}", "Readings of all keys into the filter.",
		func(s *fastpgcache.Stats) int64 { return s.Local.FilterLoads }),
	counter("fastpgcache.filter.false_positives", "{key}", "Keys that the filter took to be there, and were not.",
		func(s *fastpgcache.Stats) int64 { return s.Local.FalsePositives }),
}

// Duration is Stats.Latency.
const (
	DurationName = "fastpgcache.statement.duration"
	DurationHelp = "How long statements took, failed ones too, with the wait for a connection."
)

func counter(name, unit, help string, value func(*fastpgcache.Stats) int64) Figure {
	return Figure{Name: name, Unit: unit, Help: help, Counter: true,
		Value: func(s *fastpgcache.Stats) float64 { return float64(value(s)) }}
}

func gauge(name, unit, help string, value func(*fastpgcache.Stats) float64) Figure {
	return Figure{Name: name, Unit: unit, Help: help, Value: value}
}
