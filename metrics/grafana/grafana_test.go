package grafana

import (
	"encoding/json"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/fastpgcache/fastpgcache/cachetest"
	"github.com/fastpgcache/fastpgcache/metrics/prommetrics"
)

var metric = regexp.MustCompile(`fastpgcache_[a-z_]+`)

// A dashboard whose metrics were renamed shows empty panels and says nothing.
func TestTheDashboardAsksForEveryMetricAndForNoOther(t *testing.T) {
	registry := prometheus.NewRegistry()
	registry.MustRegister(prommetrics.NewCollector(cachetest.New(t), nil))
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	shown := map[string]bool{} // of the metrics that there are
	for _, f := range families {
		name := f.GetName()
		if f.GetType() == dto.MetricType_HISTOGRAM {
			name += "_bucket"
		}
		shown[name] = false
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(Dashboard, &dashboard); err != nil {
		t.Fatal(err)
	}
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			names := metric.FindAllString(target.Expr, -1)
			if len(names) == 0 || strings.Count(target.Expr, `{job=~"$job", instance=~"$instance"}`) != len(names) {
				t.Errorf("%s: not every metric is of the chosen jobs and instances: %s", panel.Title, target.Expr)
			}
			for _, name := range names {
				if _, ok := shown[name]; !ok {
					t.Errorf("%s: there is no %s", panel.Title, name)
				}
				shown[name] = true
			}
		}
	}
	for name, is := range shown {
		if !is {
			t.Errorf("no panel shows %s", name)
		}
	}
	for _, name := range metric.FindAllString(string(Dashboard), -1) {
		if !shown[name] {
			t.Errorf("there is no %s", name)
		}
	}
}
