package prommetrics

import (
	"os"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/cachetest"
	"github.com/fastpgcache/fastpgcache/metrics/internal/figures"
)

func TestNamesAndHelpAreAsPrometheusAdvises(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(newCollector(func() fastpgcache.Stats { return fastpgcache.Stats{} }, nil))
	problems, err := testutil.GatherAndLint(registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func TestNamesThatUsersHaveInTheirDashboardsStay(t *testing.T) {
	var got []string
	for _, f := range figures.All {
		got = append(got, name(f.Name, f.Unit, f.Counter))
	}
	want := []string{
		"fastpgcache_hits_total", "fastpgcache_misses_total", "fastpgcache_sets_total", "fastpgcache_deletes_total",
		"fastpgcache_loads_total", "fastpgcache_evicted_total", "fastpgcache_errors_total", "fastpgcache_statements_total",
		"fastpgcache_statement_keys_total", "fastpgcache_last_cleanup_timestamp_seconds",
		"fastpgcache_local_hits_total", "fastpgcache_local_misses_total", "fastpgcache_local_values",
		"fastpgcache_local_size_bytes", "fastpgcache_local_evictions_total", "fastpgcache_local_catch_ups_total",
		"fastpgcache_local_resets_total", "fastpgcache_local_age_seconds", "fastpgcache_filter_keys",
		"fastpgcache_filter_size_bytes", "fastpgcache_filter_loads_total", "fastpgcache_filter_false_positives_total",
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestThePageHasEveryMetric(t *testing.T) {
	page, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range figures.All {
		row := "| `" + name(f.Name, f.Unit, f.Counter) + "` | `" + f.Name + "` | "
		if !strings.Contains(string(page), row) {
			t.Errorf("docs/metrics.md has no %s", row)
		}
	}
}

func TestAScrapeIsOneLookAtStats(t *testing.T) {
	looks := 0
	s := fastpgcache.Stats{Hits: 7, LastCleanup: time.Unix(1700000000, 500000000)}
	s.Latency.Counts[0], s.Latency.Counts[2], s.Latency.Counts[16] = 1, 2, 4
	s.Latency.Sum = 9 * time.Second
	s.Local.Bytes, s.Local.Age = 1024, 40*time.Millisecond
	c := newCollector(func() fastpgcache.Stats { looks++; return s }, prometheus.Labels{"cache": "shop"})
	err := testutil.CollectAndCompare(c, strings.NewReader(`
# HELP fastpgcache_hits_total Keys looked up and found, in memory or in the database.
# TYPE fastpgcache_hits_total counter
fastpgcache_hits_total{cache="shop"} 7
# HELP fastpgcache_last_cleanup_timestamp_seconds When this process was last through with a cleanup, in seconds since 1970; 0: never.
# TYPE fastpgcache_last_cleanup_timestamp_seconds gauge
fastpgcache_last_cleanup_timestamp_seconds{cache="shop"} 1.7000000005e+09
# HELP fastpgcache_local_age_seconds Time since the last catch-up; 0: at the moment nothing may be answered from memory.
# TYPE fastpgcache_local_age_seconds gauge
fastpgcache_local_age_seconds{cache="shop"} 0.04
# HELP fastpgcache_local_size_bytes Memory that the values held take, about.
# TYPE fastpgcache_local_size_bytes gauge
fastpgcache_local_size_bytes{cache="shop"} 1024
# HELP fastpgcache_statement_duration_seconds How long statements took, failed ones too, with the wait for a connection.
# TYPE fastpgcache_statement_duration_seconds histogram
fastpgcache_statement_duration_seconds_bucket{cache="shop",le="6.25e-05"} 1
fastpgcache_statement_duration_seconds_bucket{cache="shop",le="0.000125"} 1
fastpgcache_statement_duration_seconds_bucket{cache="shop",le="0.00025"} 3
fastpgcache_statement_duration_seconds_bucket{cache="shop",le="0.0005"} 3
fastpgcache_statement_duration_seconds_bucket{cache="shop",le="0.001"} 3
fastpgcache_statement_duration_seconds_bucket{cache="shop",le="0.002"} 3
fastpgcache_statement_duration_seconds_bucket{cache="shop",le="0.004"} 3
fastpgcache_statement_duration_seconds_bucket{cache="shop",le="0.008"} 3
fastpgcache_statement_duration_seconds_bucket{cache="shop",le="0.016"} 3
fastpgcache_statement_duration_seconds_bucket{cache="shop",le="0.032"} 3
fastpgcache_statement_duration_seconds_bucket{cache="shop",le="0.064"} 3
fastpgcache_statement_duration_seconds_bucket{cache="shop",le="0.128"} 3
fastpgcache_statement_duration_seconds_bucket{cache="shop",le="0.256"} 3
fastpgcache_statement_duration_seconds_bucket{cache="shop",le="0.512"} 3
fastpgcache_statement_duration_seconds_bucket{cache="shop",le="1.024"} 3
fastpgcache_statement_duration_seconds_bucket{cache="shop",le="2.048"} 3
fastpgcache_statement_duration_seconds_bucket{cache="shop",le="+Inf"} 7
fastpgcache_statement_duration_seconds_sum{cache="shop"} 9
fastpgcache_statement_duration_seconds_count{cache="shop"} 7
`), "fastpgcache_hits_total", "fastpgcache_last_cleanup_timestamp_seconds", "fastpgcache_local_age_seconds",
		"fastpgcache_local_size_bytes", "fastpgcache_statement_duration_seconds")
	if err != nil {
		t.Error(err)
	}
	if looks != 1 {
		t.Errorf("a scrape looked %d times at Stats, want 1", looks)
	}
}

func TestAScrapeWhileTheCacheIsUsed(t *testing.T) {
	cache := cachetest.NewConfig(t, fastpgcache.Config{MaxStaleness: time.Second})
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(NewCollector(cache, nil))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 50 {
				if _, err := cache.Get(t.Context(), "k", nil); err != nil {
					t.Error(err)
				}
				if _, err := registry.Gather(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "fastpgcache_misses_total" {
			if got := f.Metric[0].Counter.GetValue(); got != 200 {
				t.Errorf("%v misses, want 200", got)
			}
			return
		}
	}
	t.Error("no misses")
}
