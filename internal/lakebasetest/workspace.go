// Package lakebasetest plays Databricks Lakebase for tests: a workspace over HTTP, and a PostgreSQL whose password is the
// token that the workspace issued last.
package lakebasetest

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/databricks/databricks-sdk-go"
)

const (
	Instance = "my_instance"
	Endpoint = "projects/p/branches/production/endpoints/primary"
	User     = "someone@example.com"
)

// A Workspace answers the SDK. Set its fields before its first use, but for Intercept.
type Workspace struct {
	URL          string
	Host         string // of the instance and the endpoint
	EndpointType string // defaults to ENDPOINT_TYPE_READ_WRITE
	Upgraded     bool   // there is no instance any more, but a project of its name, with Endpoint
	Issue        func() (token string, expiry time.Time, err error)

	mu        sync.Mutex // guards what follows
	part      string     // of the paths that intercept answers
	intercept http.HandlerFunc
	requests  []string
	inFlight  int
	most      int
	issued    int
}

// NewWorkspace starts a workspace that ends with the test.
func NewWorkspace(tb testing.TB) *Workspace {
	w := &Workspace{EndpointType: "ENDPOINT_TYPE_READ_WRITE"}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/databricks-config", func(rw http.ResponseWriter, r *http.Request) {
		reply(rw, map[string]any{"oidc_endpoint": w.URL + "/oidc"})
	})
	mux.HandleFunc("GET /api/2.0/preview/scim/v2/Me", func(rw http.ResponseWriter, r *http.Request) {
		reply(rw, map[string]any{"userName": User})
	})
	mux.HandleFunc("GET /api/2.0/postgres/projects", func(rw http.ResponseWriter, r *http.Request) {
		reply(rw, map[string]any{"projects": []any{w.project("q", "another"), w.project("p", Instance)}})
	})
	mux.HandleFunc("GET /api/2.0/postgres/projects/p", func(rw http.ResponseWriter, r *http.Request) {
		reply(rw, w.project("p", Instance))
	})
	mux.HandleFunc("GET /api/2.0/postgres/projects/p/branches/production/endpoints", func(rw http.ResponseWriter, r *http.Request) {
		replica, status := w.endpoint(), w.endpoint()
		replica["endpoint_type"] = "ENDPOINT_TYPE_READ_ONLY"
		reply(rw, map[string]any{"endpoints": []any{
			map[string]any{"name": "projects/p/branches/production/endpoints/replica", "status": replica},
			map[string]any{"name": Endpoint, "status": status}}})
	})
	mux.HandleFunc("GET /api/2.0/database/instances/"+Instance, func(rw http.ResponseWriter, r *http.Request) {
		if w.Upgraded {
			Fail(rw, http.StatusNotFound, "database instance is not found")
			return
		}
		reply(rw, map[string]any{"name": Instance, "state": "AVAILABLE", "read_write_dns": w.Host})
	})
	mux.HandleFunc("GET /api/2.0/postgres/"+Endpoint, func(rw http.ResponseWriter, r *http.Request) {
		reply(rw, map[string]any{"name": Endpoint, "status": w.endpoint()})
	})
	mux.HandleFunc("POST /api/2.0/database/credentials", func(rw http.ResponseWriter, r *http.Request) {
		var req struct {
			InstanceNames []string `json:"instance_names"`
		}
		json.NewDecoder(r.Body).Decode(&req)
		w.credential(rw, len(req.InstanceNames) == 1 && req.InstanceNames[0] == Instance && !w.Upgraded, "expiration_time")
	})
	mux.HandleFunc("POST /api/2.0/postgres/credentials", func(rw http.ResponseWriter, r *http.Request) {
		var req struct {
			Endpoint string `json:"endpoint"`
		}
		json.NewDecoder(r.Body).Decode(&req)
		w.credential(rw, req.Endpoint == Endpoint, "expire_time")
	})
	mux.HandleFunc("/", func(rw http.ResponseWriter, r *http.Request) {
		Fail(rw, http.StatusNotFound, "there is no such thing")
	})
	s := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.mu.Lock()
		w.requests = append(w.requests, r.URL.Path)
		intercept, part := w.intercept, w.part
		w.mu.Unlock()
		switch {
		case intercept != nil && strings.Contains(r.URL.Path, part):
			intercept(rw, r)
		case strings.HasPrefix(r.URL.Path, "/api/") && r.Header.Get("Authorization") != "Bearer pat":
			Fail(rw, http.StatusUnauthorized, "credential was not sent or was of an unsupported type")
		default:
			mux.ServeHTTP(rw, r)
		}
	}))
	tb.Cleanup(s.Close)
	w.URL = s.URL
	return w
}

func (w *Workspace) project(id, name string) map[string]any {
	return map[string]any{"name": "projects/" + id, "status": map[string]any{
		"project_id": id, "display_name": name, "default_branch": "projects/" + id + "/branches/production"}}
}

// endpoint is the status of Endpoint.
func (w *Workspace) endpoint() map[string]any {
	return map[string]any{"endpoint_type": w.EndpointType, "hosts": map[string]any{"host": w.Host}}
}

func (w *Workspace) credential(rw http.ResponseWriter, known bool, expiryField string) {
	if !known {
		Fail(rw, http.StatusNotFound, "there is no such database")
		return
	}
	w.mu.Lock()
	w.issued++
	w.inFlight++
	w.most = max(w.most, w.inFlight)
	w.mu.Unlock()
	token, expiry, err := w.Issue()
	w.mu.Lock()
	w.inFlight--
	w.mu.Unlock()
	if err != nil {
		Fail(rw, http.StatusInternalServerError, err.Error())
		return
	}
	reply(rw, map[string]any{"token": token, expiryField: expiry.UTC().Format(time.RFC3339Nano)})
}

// Intercept lets h answer the requests whose path contains part, until the next call; with nil there are none.
func (w *Workspace) Intercept(part string, h http.HandlerFunc) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.part, w.intercept = part, h
}

// Requests returns the paths of all requests so far.
func (w *Workspace) Requests() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]string(nil), w.requests...)
}

// Issued returns how many tokens were asked for, and how many at once at most.
func (w *Workspace) Issued() (total, atOnce int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.issued, w.most
}

// Client returns a client that may ask as often as it likes and gives up after a few seconds.
func (w *Workspace) Client(tb testing.TB) *databricks.WorkspaceClient {
	tb.Helper()
	client, err := databricks.NewWorkspaceClient(&databricks.Config{
		Host:                w.URL,
		Token:               "pat",
		AuthType:            "pat",
		RateLimitPerSecond:  1000,
		RetryTimeoutSeconds: 3,
		HTTPTimeoutSeconds:  1,
	})
	if err != nil {
		tb.Fatal(err)
	}
	return client
}

// Fail answers as the workspace does when something is wrong.
func Fail(rw http.ResponseWriter, status int, message string) {
	rw.Header().Set("Content-Type", "application/json")
	rw.WriteHeader(status)
	json.NewEncoder(rw).Encode(map[string]any{"error_code": http.StatusText(status), "message": message})
}

func reply(rw http.ResponseWriter, v any) {
	rw.Header().Set("Content-Type", "application/json")
	json.NewEncoder(rw).Encode(v)
}
