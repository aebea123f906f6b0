package otelmetrics

import (
	"slices"
	"strings"
	"testing"
	"time"

	prom "github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/cachetest"
	"github.com/fastpgcache/fastpgcache/metrics/prommetrics"
)

// collect reads once, and returns the instruments by name.
func collect(t *testing.T, reader metric.Reader) map[string]metricdata.Metrics {
	t.Helper()
	var data metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &data); err != nil {
		t.Fatal(err)
	}
	byName := map[string]metricdata.Metrics{}
	for _, scope := range data.ScopeMetrics {
		for _, m := range scope.Metrics {
			byName[m.Name] = m
		}
	}
	return byName
}

func TestACollectionIsOneLookAtStatsUntilUnregister(t *testing.T) {
	looks := 0
	s := fastpgcache.Stats{Hits: 7}
	s.Local.Age = 40 * time.Millisecond
	s.Latency.Counts[1], s.Latency.Counts[16], s.Latency.Sum = 2, 3, 4*time.Second
	reader := metric.NewManualReader()
	unregister, err := register(metric.NewMeterProvider(metric.WithReader(reader)),
		func() fastpgcache.Stats { looks++; return s }, []attribute.KeyValue{attribute.String("cache", "shop")})
	if err != nil {
		t.Fatal(err)
	}
	all := collect(t, reader)
	if looks != 1 {
		t.Errorf("a collection looked %d times at Stats, want 1", looks)
	}
	hits := all["fastpgcache.hits"].Data.(metricdata.Sum[float64])
	if cache, _ := hits.DataPoints[0].Attributes.Value("cache"); hits.DataPoints[0].Value != 7 || cache.AsString() != "shop" || !hits.IsMonotonic {
		t.Errorf("hits: %+v", hits)
	}
	if age := all["fastpgcache.local.age"].Data.(metricdata.Gauge[float64]); age.DataPoints[0].Value != 0.04 {
		t.Errorf("age: %+v", age)
	}
	if sum := all["fastpgcache.statement.duration.sum"].Data.(metricdata.Sum[float64]); sum.DataPoints[0].Value != 4 {
		t.Errorf("sum: %+v", sum)
	}
	got := map[string]float64{}
	for _, p := range all["fastpgcache.statement.duration.bucket"].Data.(metricdata.Sum[float64]).DataPoints {
		le, _ := p.Attributes.Value("le")
		got[le.AsString()] = p.Value
	}
	if len(got) != 17 || got["0.0000625"] != 0 || got["0.000125"] != 2 || got["2.048"] != 2 || got["+Inf"] != 5 {
		t.Errorf("buckets: %v", got)
	}
	for name, m := range all {
		if m.Unit == "" || !strings.HasSuffix(m.Description, ".") {
			t.Errorf("%s has the unit %q and the description %q", name, m.Unit, m.Description)
		}
	}
	if err := unregister(); err != nil {
		t.Fatal(err)
	}
	if all := collect(t, reader); len(all) != 0 || looks != 1 {
		t.Errorf("after unregister: %v, looked %d times", all, looks)
	}
}

// So that one dashboard does for both.
func TestPrometheusSeesTheNamesOfPrommetrics(t *testing.T) {
	cache := cachetest.New(t)
	registry := prom.NewRegistry()
	exporter, err := prometheus.New(prometheus.WithRegisterer(registry), prometheus.WithoutScopeInfo(), prometheus.WithoutTargetInfo())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Register(metric.NewMeterProvider(metric.WithReader(exporter)), cache); err != nil {
		t.Fatal(err)
	}
	ours := prom.NewRegistry()
	ours.MustRegister(prommetrics.NewCollector(cache, nil))
	got, want := names(t, registry), names(t, ours)
	want = slices.DeleteFunc(want, func(n string) bool { return n == "fastpgcache_statement_duration_seconds HISTOGRAM" })
	want = append(want, "fastpgcache_statement_duration_bucket_total COUNTER", "fastpgcache_statement_duration_sum_seconds_total COUNTER")
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// names are the metrics with their types, sorted.
func names(t *testing.T, g prom.Gatherer) (all []string) {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		all = append(all, f.GetName()+" "+dto.MetricType_name[int32(f.GetType())])
	}
	slices.Sort(all)
	return all
}
