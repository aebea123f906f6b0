package lakebase_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/lakebasetest"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
	"github.com/fastpgcache/fastpgcache/lakebase"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

// newLakebase starts a workspace and the PostgreSQL that its tokens are for.
func newLakebase(t *testing.T) (*lakebasetest.Workspace, *lakebasetest.Postgres) {
	t.Helper()
	// A machine with its own settings must not decide what is tested.
	for _, key := range []string{"DATABRICKS_HOST", "DATABRICKS_TOKEN", "DATABRICKS_CONFIG_PROFILE"} {
		t.Setenv(key, "")
	}
	t.Setenv("DATABRICKS_CONFIG_FILE", filepath.Join(t.TempDir(), "none"))
	pg := lakebasetest.NewPostgres(t)
	t.Setenv("PGSSLROOTCERT", pg.Authority.File)
	t.Setenv("PGSSLMODE", "disable") // must not matter
	w := lakebasetest.NewWorkspace(t)
	w.Host = pg.Addr
	w.Issue = func() (string, time.Time, error) {
		token, err := pg.Issue()
		return token, time.Now().Add(time.Hour), err
	}
	return w, pg
}

func wantNoGoroutineLeft(t *testing.T) {
	t.Helper()
	buf := make([]byte, 1<<20)
	var stacks string
	for range 100 {
		stacks = string(buf[:runtime.Stack(buf, true)])
		if !strings.Contains(stacks, "fastpgcache/fastpgcache.") && !strings.Contains(stacks, "fastpgcache/lakebase.") {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Errorf("goroutines are left:\n%s", stacks)
}

func TestOpenNeedsOnlyTheName(t *testing.T) {
	w, _ := newLakebase(t)
	profiles := filepath.Join(t.TempDir(), "databrickscfg")
	text := fmt.Sprintf("[laptop]\nhost = %s\ntoken = pat\n", w.URL)
	if err := os.WriteFile(profiles, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cases := map[string]struct {
		cfg     lakebase.Config
		env     map[string]string
		lookups string
	}{
		"instance":    {cfg: lakebase.Config{Instance: lakebasetest.Instance, Client: w.Client(t)}, lookups: "database/instances"},
		"endpoint":    {cfg: lakebase.Config{Endpoint: lakebasetest.Endpoint, Client: w.Client(t)}, lookups: "postgres/projects"},
		"profile":     {cfg: lakebase.Config{Instance: lakebasetest.Instance, Profile: "laptop"}, env: map[string]string{"DATABRICKS_CONFIG_FILE": profiles}},
		"environment": {cfg: lakebase.Config{Instance: lakebasetest.Instance}, env: map[string]string{"DATABRICKS_HOST": w.URL, "DATABRICKS_TOKEN": "pat"}},
		"no look-ups": {cfg: lakebase.Config{Instance: lakebasetest.Instance, Client: w.Client(t), Host: w.Host, User: lakebasetest.User, Database: "scram"}},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			for key, value := range c.env {
				t.Setenv(key, value)
			}
			before := len(w.Requests())
			cache, err := lakebase.Open(t.Context(), c.cfg, fastpgcache.Config{})
			if err != nil {
				t.Fatal(err)
			}
			defer cache.Close()
			requests := strings.Join(w.Requests()[before:], " ")
			if !strings.Contains(requests, c.lookups) {
				t.Errorf("asked for %s, want %s", requests, c.lookups)
			}
			if name == "no look-ups" && strings.Count(requests, "/api/") != 1 {
				t.Errorf("asked for %s, want a token only", requests)
			}
			var user, database string
			if err := cache.DB().QueryRow(`SELECT current_user, current_database()`).Scan(&user, &database); err != nil {
				t.Fatal(err)
			}
			want := c.cfg.Database
			if want == "" {
				want = "databricks_postgres"
			}
			if user != lakebasetest.User || database != want {
				t.Errorf("got %s in %s, want %s in %s", user, database, lakebasetest.User, want)
			}
		})
	}
	wantNoGoroutineLeft(t)
}

// An instance that is created or upgraded since March 2026 is an autoscaling project, of which the provisioned API knows nothing.
func TestInstanceFindsTheProjectThatItBecame(t *testing.T) {
	w, _ := newLakebase(t)
	w.Upgraded = true
	for name, instance := range map[string]string{"by its name": lakebasetest.Instance, "by its id": "p"} {
		t.Run(name, func(t *testing.T) {
			cache, err := lakebase.Open(t.Context(), lakebase.Config{Instance: instance, Client: w.Client(t)}, fastpgcache.Config{})
			if err != nil {
				t.Fatal(err)
			}
			cache.Close()
		})
	}
	for name, answer := range map[string]struct{ part, body, want string }{
		"two of that name": {"postgres/projects", `{"projects": [{"name": "projects/a", "status": {"display_name": "twins"}}, {"name": "projects/b", "status": {"display_name": "twins"}}]}`, "give the Endpoint"},
		"no endpoint":      {"production/endpoints", `{}`, "no read-write endpoint"},
		"none":             {"nothing", `{}`, "needs Endpoint instead of Instance"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := lakebase.Config{Instance: map[string]string{"two of that name": "twins", "no endpoint": "p", "none": "nobody"}[name], Client: w.Client(t)}
			w.Intercept(answer.part, func(rw http.ResponseWriter, r *http.Request) {
				if strings.HasSuffix(r.URL.Path, "/twins") {
					lakebasetest.Fail(rw, http.StatusNotFound, "no such project")
					return
				}
				fmt.Fprint(rw, answer.body)
			})
			defer w.Intercept("", nil)
			if _, err := lakebase.NewConnector(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), answer.want) {
				t.Errorf("got %v, want it to say %q", err, answer.want)
			}
		})
	}
}

// An upgrade while a program runs: the next token is the endpoint's.
func TestTokensGoOnWhenTheInstanceIsUpgraded(t *testing.T) {
	w := lakebasetest.NewWorkspace(t)
	w.Issue = func() (string, time.Time, error) { return "t", time.Now().Add(time.Hour), nil }
	tokens, err := lakebase.NewTokenCache(t.Context(), lakebase.Config{Instance: lakebasetest.Instance, Client: w.Client(t)})
	if err != nil {
		t.Fatal(err)
	}
	failOn(w, "api/2.0/database", http.StatusNotFound, "")
	if _, err := tokens.Refresh(t.Context()); err != nil {
		t.Error(err)
	}
}

// failOn fails the requests whose path contains part.
func failOn(w *lakebasetest.Workspace, part string, status int, body string) {
	w.Intercept(part, func(rw http.ResponseWriter, r *http.Request) {
		if body != "" {
			rw.WriteHeader(status)
			fmt.Fprint(rw, body)
			return
		}
		lakebasetest.Fail(rw, status, "the test says so")
	})
}

func TestOpenSaysWhichStepFailedAndWhatToCheck(t *testing.T) {
	w, _ := newLakebase(t)
	good := lakebase.Config{Instance: lakebasetest.Instance, Client: w.Client(t)}
	endpoint := lakebase.Config{Endpoint: lakebasetest.Endpoint, Client: good.Client}
	with := func(change func(*lakebase.Config)) lakebase.Config {
		cfg := good
		change(&cfg)
		return cfg
	}
	const garbage = `{"token": "token-leaked", "expiration_time": "soon", "expire_time": "soon"`
	cases := []struct {
		name  string
		cfg   lakebase.Config
		setUp func()
		want  []string
	}{
		{"neither", lakebase.Config{Client: good.Client}, nil, []string{"either Instance or Endpoint"}},
		{"both", with(func(c *lakebase.Config) { c.Endpoint = "e" }), nil, []string{"either Instance or Endpoint"}},
		{"network", good, func() {
			w.Intercept("Me", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
		}, []string{"look up the current user", "network"}},
		{"no such profile", lakebase.Config{Instance: "i", Profile: "nobody"}, nil, []string{"workspace client", "nobody"}},
		{"wrong instance", with(func(c *lakebase.Config) { c.Instance = "mistyped" }), nil, []string{`host of instance "mistyped"`, "exact name"}},
		{"no access", good, func() { failOn(w, "instances", 403, "") }, []string{"look up the host", "credentials"}},
		{"no host", good, func() { failOn(w, "instances", 200, `{"state": "STARTING"}`) }, []string{"no read-write host", "STARTING"}},
		{"garbage", good, func() { failOn(w, "instances", 200, "<html>") }, []string{"look up the host"}},
		{"wrong endpoint", with(func(c *lakebase.Config) { c.Instance, c.Endpoint = "", "projects/x" }), nil, []string{`host of endpoint "projects/x"`, "exact name"}},
		{"replica", endpoint, func() {
			failOn(w, "endpoints", 200, `{"status": {"endpoint_type": "ENDPOINT_TYPE_READ_ONLY", "hosts": {"host": "h"}}}`)
		}, []string{"read replica"}},
		{"endpoint starts", endpoint, func() { failOn(w, "endpoints", 200, `{"status": {}}`) }, []string{"no host yet"}},
		{"user unknown", good, func() { failOn(w, "Me", 401, "") }, []string{"look up the current user", "credentials"}},
		{"user nameless", good, func() { failOn(w, "Me", 200, "{}") }, []string{"no user name"}},
		{"token refused", good, func() { failOn(w, "credentials", 403, "") }, []string{`generate a token for instance "my_instance"`, "credentials"}},
		{"token out of order", good, func() { failOn(w, "credentials", 500, "") }, []string{"generate a token", "out of order"}},
		{"token garbage", good, func() { failOn(w, "credentials", 200, garbage) }, []string{"generate a token"}},
		{"token without expiry", good, func() { failOn(w, "credentials", 200, garbage+"}") }, []string{"expiry time"}},
		{"endpoint token without expiry", endpoint, func() { failOn(w, "credentials", 200, garbage+"}") }, []string{"generate a token"}},
		{"token empty", good, func() { failOn(w, "credentials", 200, `{"expiration_time": "2100-01-01T00:00:00Z"}`) }, []string{"empty"}},
		{"pooler", with(func(c *lakebase.Config) { c.Host = "ep-x-pooler.database.us-east-1.cloud.databricks.com" }), nil, []string{"pooler"}},
		{"replica host", with(func(c *lakebase.Config) { c.Host = "instance-ro-x.database.cloud.databricks.com:5432" }), nil, []string{"read-only"}},
		{"no network", with(func(c *lakebase.Config) { c.Host = "127.0.0.1:1" }), nil, []string{"log in as", "refused", "check that the host can be reached"}},
		{"no role", with(func(c *lakebase.Config) { c.User = "nobody" }), nil, []string{"log in as nobody", "databricks_create_role"}},
		{"no database", with(func(c *lakebase.Config) { c.Database = "nothing" }), nil, []string{"log in as", "nothing"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if c.setUp != nil {
				c.setUp()
				defer w.Intercept("", nil)
			}
			cache, err := lakebase.Open(t.Context(), c.cfg, fastpgcache.Config{})
			if err == nil {
				cache.Close()
				t.Fatal("got a cache, want an error")
			}
			text := err.Error()
			for _, want := range c.want {
				if !strings.Contains(text, want) {
					t.Errorf("got %q, want it to say %q", text, want)
				}
			}
			if !strings.HasPrefix(text, "fastpgcache: ") || strings.Count(text, "fastpgcache: ") != 1 {
				t.Errorf("%q is not prefixed once", text)
			}
			if strings.Contains(text, "token-") || strings.Contains(text, "Bearer pat") {
				t.Errorf("%q contains a token", text)
			}
		})
	}
	wantNoGoroutineLeft(t)
}

func TestSDKTriesAgainWhenTheWorkspaceIsBusy(t *testing.T) {
	for _, status := range []int{429, 503} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			t.Parallel()
			w := lakebasetest.NewWorkspace(t)
			w.Issue = func() (string, time.Time, error) { return "t", time.Now().Add(time.Hour), nil }
			client := w.Client(t)
			w.Intercept("credentials", func(rw http.ResponseWriter, r *http.Request) {
				w.Intercept("", nil)
				lakebasetest.Fail(rw, status, "busy")
			})
			if _, err := lakebase.NewTokenCache(t.Context(), lakebase.Config{Instance: lakebasetest.Instance, Client: client}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestEveryCallEndsWithItsContext(t *testing.T) {
	w, _ := newLakebase(t)
	client := w.Client(t)
	t.Setenv("DATABRICKS_HOST", w.URL)
	t.Setenv("DATABRICKS_TOKEN", "pat")
	for _, part := range []string{"instances", "Me", "credentials", "well-known"} {
		t.Run(part, func(t *testing.T) {
			release := make(chan struct{})
			w.Intercept(part, func(http.ResponseWriter, *http.Request) { <-release })
			defer close(release)
			defer w.Intercept("", nil)
			cfg := lakebase.Config{Instance: lakebasetest.Instance, Client: client}
			if part == "well-known" { // which a new client reads, heeding no context
				cfg.Client = nil
			}
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			before := time.Now()
			_, err := lakebase.Open(ctx, cfg, fastpgcache.Config{})
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v, want context.DeadlineExceeded", err)
			}
			if took := time.Since(before); took > 10*time.Second {
				t.Errorf("took %v, want 200ms", took)
			}
		})
	}
	wantNoGoroutineLeft(t)
}

// A workspace that is down for longer than a token lives costs no connection while the token lives, and none soon after the
// workspace is back.
func TestConnectionsSurviveAnOutageOfTheWorkspace(t *testing.T) {
	w, pg := newLakebase(t)
	var down atomic.Bool
	var expiry atomic.Int64
	w.Issue = func() (string, time.Time, error) {
		if down.Load() {
			return "", time.Time{}, errors.New("down")
		}
		expires := time.Now().Add(2 * time.Second)
		expiry.Store(expires.UnixNano())
		token, err := pg.Issue()
		return token, expires, err
	}
	cache, err := lakebase.Open(t.Context(), lakebase.Config{Endpoint: lakebasetest.Endpoint, Client: w.Client(t)}, fastpgcache.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer cache.Close()
	cache.DB().SetMaxIdleConns(-1)
	down.Store(true)
	for left := time.Hour; left > -time.Second; {
		err := cache.DB().PingContext(t.Context())
		left = time.Until(time.Unix(0, expiry.Load()))
		switch {
		case err != nil && left > 0:
			t.Fatalf("%v before the token expires: %v", left, err)
		case err != nil && !strings.Contains(err.Error(), "generate a token"):
			t.Fatalf("got %v, want it to say that no token was generated", err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err := cache.DB().PingContext(t.Context()); err == nil {
		t.Fatal("got a connection with an expired token")
	}
	down.Store(false)
	for range 300 {
		if err = cache.DB().PingContext(t.Context()); err == nil {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Errorf("15s after the outage: %v", err)
}
