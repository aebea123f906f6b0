// Command draw makes the picture of the dashboard: it works a cache for a while, has a real
// Prometheus scrape it and answer the dashboard's queries, and draws the answers. Grafana takes
// no part. PostgreSQL's programs and prometheus must be installed.
//
//	go run ./grafana/draw -o ../docs/dashboard.svg
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/fastpgcache/fastpgcache/metrics/grafana"
)

func main() {
	out := flag.String("o", "dashboard.svg", "the picture")
	minutes := flag.Duration("for", 2*time.Minute, "how long the cache works")
	flag.Parse()
	ctx, cancel := context.WithTimeout(context.Background(), *minutes+2*time.Minute)
	defer cancel()
	if err := draw(ctx, *out, *minutes); err != nil {
		log.Fatal(err)
	}
}

// panel is one of the dashboard, with what Prometheus answered.
type panel struct {
	Title       string
	FieldConfig struct {
		Defaults struct {
			Unit   string
			Custom struct{ Stacking struct{ Mode string } }
		}
	}
	Targets []*target
}

type target struct {
	Expr, LegendFormat string

	points []point
}

type point struct{ at, value float64 }

func draw(ctx context.Context, out string, duration time.Duration) error {
	var dashboard struct{ Panels []*panel }
	if err := json.Unmarshal(grafana.Dashboard, &dashboard); err != nil {
		return err
	}
	registry := prometheus.NewRegistry()
	stop, err := work(ctx, registry)
	if err != nil {
		return err
	}
	defer stop()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &http.Server{Handler: promhttp.HandlerFor(registry, promhttp.HandlerOpts{})}
	go server.Serve(listener)
	defer server.Close()
	api, stopPrometheus, err := startPrometheus(listener.Addr().String())
	if err != nil {
		return err
	}
	defer stopPrometheus()

	start := time.Now()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(duration):
	}
	end := time.Now()
	for _, p := range dashboard.Panels {
		for _, t := range p.Targets {
			if t.points, err = ask(ctx, api, t.Expr, start.Add(5*time.Second), end); err != nil {
				return fmt.Errorf("%s: %w", p.Title, err)
			}
		}
	}
	return os.WriteFile(out, picture(dashboard.Panels, start, end), 0o644)
}

// startPrometheus has a server scrape target each second.
func startPrometheus(target string) (api string, stop func(), err error) {
	dir, err := os.MkdirTemp("", "draw")
	if err != nil {
		return "", nil, err
	}
	config := fmt.Sprintf("global: {scrape_interval: 1s}\nscrape_configs: [{job_name: shop, static_configs: [{targets: [%q]}]}]\n", target)
	file := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return "", nil, err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	addr := listener.Addr().String()
	listener.Close()
	cmd := exec.Command("prometheus", "--config.file="+file, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+addr, "--log.level=error")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	return "http://" + addr, func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		os.RemoveAll(dir)
	}, nil
}

// ask returns a query's answer, which is one series.
func ask(ctx context.Context, api, expr string, start, end time.Time) ([]point, error) {
	expr = strings.NewReplacer("$__rate_interval", "5s", "$job", ".*", "$instance", ".*").Replace(expr)
	query := url.Values{"query": {expr}, "step": {"1"},
		"start": {strconv.FormatInt(start.Unix(), 10)}, "end": {strconv.FormatInt(end.Unix(), 10)}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, api+"/api/v1/query_range?"+query.Encode(), nil)
	if err != nil {
		return nil, err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	var answer struct {
		Error string
		Data  struct {
			Result []struct{ Values [][2]any }
		}
	}
	if err := json.NewDecoder(response.Body).Decode(&answer); err != nil {
		return nil, err
	}
	if answer.Error != "" || len(answer.Data.Result) > 1 {
		return nil, fmt.Errorf("%s: %d series: %s", expr, len(answer.Data.Result), answer.Error)
	}
	var points []point
	for _, series := range answer.Data.Result {
		for _, v := range series.Values {
			value, err := strconv.ParseFloat(v[1].(string), 64)
			if err != nil {
				return nil, err
			}
			points = append(points, point{v[0].(float64), value})
		}
	}
	return points, nil
}
