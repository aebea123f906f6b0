// Package otelmetrics gives OpenTelemetry what a cache tells of itself:
//
//	unregister, err := otelmetrics.Register(otel.GetMeterProvider(), cache)
//
// There is an instrument for each field of [fastpgcache.Stats]. Prometheus sees them under the
// names that package prommetrics has, but for the histogram of the statements' duration, which
// OpenTelemetry's interface cannot observe: it is two counters here,
//
//   - fastpgcache.statement.duration.sum, in seconds
//   - fastpgcache.statement.duration.bucket, with the attribute le, an upper bound in seconds:
//     the statements that took no longer. That of the last, "+Inf", is of all
package otelmetrics

import (
	"context"
	"strconv"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/metrics/internal/figures"
)

// Register has mp's readers observe c's Stats, which is asked for once a collection. Two caches
// of one provider need attributes that tell them apart. unregister ends it. Both are safe for
// concurrent use.
func Register(mp metric.MeterProvider, c *fastpgcache.Cache, attrs ...attribute.KeyValue) (unregister func() error, err error) {
	return register(mp, c.Stats, attrs)
}

func register(mp metric.MeterProvider, stats func() fastpgcache.Stats, attrs []attribute.KeyValue) (func() error, error) {
	meter := mp.Meter("github.com/fastpgcache/fastpgcache/metrics/otelmetrics")
	var all []metric.Observable
	add := func(name, unit, help string, counter bool) error {
		var instrument metric.Observable
		var err error
		if counter {
			instrument, err = meter.Float64ObservableCounter(name, metric.WithUnit(unit), metric.WithDescription(help))
		} else {
			instrument, err = meter.Float64ObservableGauge(name, metric.WithUnit(unit), metric.WithDescription(help))
		}
		all = append(all, instrument)
		return err
	}
	for _, f := range figures.All {
		if err := add(f.Name, f.Unit, f.Help, f.Counter); err != nil {
			return nil, err
		}
	}
	if err := add(figures.DurationName+".sum", "s", figures.DurationHelp, true); err != nil {
		return nil, err
	}
	if err := add(figures.DurationName+".bucket", "{statement}", "Statements that took no longer than le, in seconds.", true); err != nil {
		return nil, err
	}

	set := metric.WithAttributeSet(attribute.NewSet(attrs...))
	bounds := les(attrs)
	registration, err := meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		s := stats()
		for i, f := range figures.All {
			o.ObserveFloat64(all[i].(metric.Float64Observable), f.Value(&s), set)
		}
		sum, bucket := all[len(all)-2].(metric.Float64Observable), all[len(all)-1].(metric.Float64Observable)
		o.ObserveFloat64(sum, s.Latency.Sum.Seconds(), set)
		var count int64
		for i, n := range s.Latency.Counts {
			count += n
			o.ObserveFloat64(bucket, float64(count), bounds[i])
		}
		return nil
	}, all...)
	if err != nil {
		return nil, err
	}
	return registration.Unregister, nil
}

// les are attrs with the upper bound of each bucket.
func les(attrs []attribute.KeyValue) []metric.MeasurementOption {
	var l fastpgcache.Latency
	options := make([]metric.MeasurementOption, len(l.Counts))
	for i := range options {
		le := "+Inf"
		if i < len(options)-1 {
			le = strconv.FormatFloat(l.Bound(i).Seconds(), 'f', -1, 64)
		}
		options[i] = metric.WithAttributeSet(attribute.NewSet(append(attrs[:len(attrs):len(attrs)], attribute.String("le", le))...))
	}
	return options
}
