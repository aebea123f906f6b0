// Package prommetrics gives Prometheus what a cache tells of itself:
//
//	prometheus.MustRegister(prommetrics.NewCollector(cache, nil))
//
// There is a metric for each field of [fastpgcache.Stats]; metrics/grafana has a dashboard of
// them. What the pool does, [collectors.NewDBStatsCollector] tells.
//
// [collectors.NewDBStatsCollector]: https://pkg.go.dev/github.com/prometheus/client_golang/prometheus/collectors#NewDBStatsCollector
package prommetrics

import (
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/metrics/internal/figures"
)

// NewCollector returns a collector of c's Stats, which it asks for once a scrape. Two caches
// in one registry need labels that tell them apart; nil is none. It is safe for concurrent use.
func NewCollector(c *fastpgcache.Cache, labels prometheus.Labels) prometheus.Collector {
	return newCollector(c.Stats, labels)
}

type collector struct {
	stats    func() fastpgcache.Stats
	figures  []*prometheus.Desc // as figures.All
	duration *prometheus.Desc
}

func newCollector(stats func() fastpgcache.Stats, labels prometheus.Labels) *collector {
	c := &collector{
		stats:    stats,
		duration: prometheus.NewDesc(name(figures.DurationName, "s", false), figures.DurationHelp, nil, labels),
	}
	for _, f := range figures.All {
		c.figures = append(c.figures, prometheus.NewDesc(name(f.Name, f.Unit, f.Counter), f.Help, nil, labels))
	}
	return c
}

// name is what OpenTelemetry's exporter for Prometheus makes of a name.
func name(name, unit string, counter bool) string {
	name = strings.ReplaceAll(name, ".", "_")
	switch unit {
	case "s":
		name += "_seconds"
	case "By":
		name += "_bytes"
	}
	if counter {
		name += "_total"
	}
	return name
}

func (c *collector) Describe(descs chan<- *prometheus.Desc) {
	for _, desc := range c.figures {
		descs <- desc
	}
	descs <- c.duration
}

func (c *collector) Collect(metrics chan<- prometheus.Metric) {
	s := c.stats()
	for i, f := range figures.All {
		kind := prometheus.GaugeValue
		if f.Counter {
			kind = prometheus.CounterValue
		}
		metrics <- prometheus.MustNewConstMetric(c.figures[i], kind, f.Value(&s))
	}
	var count uint64
	buckets := map[float64]uint64{}
	for i, n := range s.Latency.Counts {
		count += uint64(n)
		if i < len(s.Latency.Counts)-1 {
			buckets[s.Latency.Bound(i).Seconds()] = count
		}
	}
	metrics <- prometheus.MustNewConstHistogram(c.duration, count, s.Latency.Sum.Seconds(), buckets)
}
