// Package lakebase opens a fastpgcache on Databricks Lakebase, whose password is a token that lasts an hour:
//
//	cache, err := lakebase.Open(ctx, lakebase.Config{Instance: "my_instance"}, fastpgcache.Config{})
//
// It looks up the host and the user in the workspace and keeps the token fresh, for provisioned instances (the Database API)
// and autoscaling projects (the Postgres API). It is a package of its own because the Databricks SDK is large.
package lakebase

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"

	"github.com/databricks/databricks-sdk-go"
	"github.com/databricks/databricks-sdk-go/apierr"
	"github.com/databricks/databricks-sdk-go/service/iam"

	"github.com/fastpgcache/fastpgcache"
)

// Config says which Lakebase database to use, and as whom. Either Instance or Endpoint is required.
type Config struct {
	// Instance is the name of a provisioned instance, or of an autoscaling project, as which such an instance goes on when
	// it is upgraded: then the endpoint is the read-write one of its default branch.
	Instance string
	Endpoint string // The name of an autoscaling endpoint, projects/{project}/branches/{branch}/endpoints/{endpoint}.

	// Profile is a section of ~/.databrickscfg. Defaults to the SDK's own search, which finds the DATABRICKS_ variables of the
	// environment and the credentials in notebooks, jobs and apps.
	Profile string
	// Client is used instead of Profile, with its own timeouts. Defaults to a new one.
	Client *databricks.WorkspaceClient

	Host     string // Defaults to the read-write host of the instance or endpoint; a port may follow after a colon.
	Database string // Defaults to databricks_postgres.
	User     string // The PostgreSQL role. Defaults to the name of the workspace's current user or service principal.
}

func (cfg Config) database() string {
	if cfg.Database == "" {
		return "databricks_postgres"
	}
	return cfg.Database
}

// target is what is connected to, for people.
func (cfg Config) target() string {
	if cfg.Endpoint != "" {
		return fmt.Sprintf("endpoint %q", cfg.Endpoint)
	}
	return fmt.Sprintf("instance %q", cfg.Instance)
}

// Open connects to the database and returns a cache that owns its pool. Besides the look-ups it opens the first connection,
// so that whatever is wrong shows here: an error names the step that failed (workspace client, host, user, token, login) and
// what to check. Set up the cache's table once as a role that may create tables, such as a member of databricks_superuser.
func Open(ctx context.Context, cfg Config, cache fastpgcache.Config) (*fastpgcache.Cache, error) {
	connector, err := NewConnector(ctx, cfg)
	if err != nil {
		return nil, err
	}
	c, err := fastpgcache.OpenConnector(connector, cache)
	if err != nil {
		return nil, err
	}
	if err := c.DB().PingContext(ctx); err != nil {
		c.Close()
		return nil, fmt.Errorf("%w (check that the host can be reached, that this identity has a PostgreSQL role of its name, made with databricks_create_role, "+
			"and that the role may connect to database %s)", err, cfg.database())
	}
	return c, nil
}

// NewConnector returns a connector for [database/sql.OpenDB], having looked up what cfg leaves open and fetched a token. Its
// Tokens method returns the [fastpgcache.TokenCache].
func NewConnector(ctx context.Context, cfg Config) (*fastpgcache.Connector, error) {
	w, err := cfg.workspace(ctx)
	if err != nil {
		return nil, err
	}
	if cfg.Host == "" {
		if cfg.Host, err = await(ctx, w.lookUpHost); err != nil {
			return nil, stepError("look up the host of "+cfg.target(), err)
		}
	}
	if cfg.User == "" {
		me, err := await(ctx, func(ctx context.Context) (*iam.User, error) {
			return w.users.Me(ctx, iam.MeRequest{})
		})
		if err == nil && me.UserName == "" {
			err = errors.New("the workspace returned no user name")
		}
		if err != nil {
			return nil, stepError("look up the current user", err)
		}
		cfg.User = me.UserName
	}
	tokens, err := w.newTokenCache(ctx)
	if err != nil {
		return nil, err
	}
	if _, _, err := net.SplitHostPort(cfg.Host); err != nil {
		cfg.Host = net.JoinHostPort(cfg.Host, "5432")
	}
	dsn := url.URL{Scheme: "postgres", User: url.User(cfg.User), Host: cfg.Host, Path: "/" + cfg.database()}
	return fastpgcache.NewConnector(dsn.String(), tokens)
}

// NewTokenCache returns the tokens alone, for another driver, having fetched the first.
func NewTokenCache(ctx context.Context, cfg Config) (*fastpgcache.TokenCache, error) {
	w, err := cfg.workspace(ctx)
	if err != nil {
		return nil, err
	}
	return w.newTokenCache(ctx)
}

// workspace checks cfg, and logs in to the workspace.
func (cfg Config) workspace(ctx context.Context) (*workspace, error) {
	if (cfg.Instance == "") == (cfg.Endpoint == "") {
		return nil, fmt.Errorf("fastpgcache: lakebase: %w: give either Instance or Endpoint", fastpgcache.ErrInvalidConfig)
	}
	w, err := await(ctx, cfg.logIn)
	if err != nil {
		return nil, fmt.Errorf("fastpgcache: lakebase: workspace client: %w (check its credentials, in Profile and ~/.databrickscfg "+
			"or the DATABRICKS_ variables of the environment, and the network to the workspace)", err)
	}
	return w, nil
}

// await calls f and returns when ctx ends even if f does not: the SDK reads the workspace's metadata and logs in to it on
// contexts of its own. Its timeouts end what is left behind.
func await[T any](ctx context.Context, f func(context.Context) (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		value, err := f(ctx)
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		if r.err != nil && ctx.Err() != nil && !errors.Is(r.err, ctx.Err()) {
			r.err = fmt.Errorf("%w (%w)", ctx.Err(), r.err) // the SDK returns the last HTTP error
		}
		return r.value, r.err
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}

func stepError(step string, err error) error {
	return fmt.Errorf("fastpgcache: lakebase: %w", explain(step, err))
}

// explain says which step failed and what to check.
func explain(step string, err error) error {
	var api *apierr.APIError
	var network *url.Error
	var check string
	switch {
	case errors.As(err, &network), errors.Is(err, context.DeadlineExceeded):
		check = " (check the workspace's URL and the network to it)"
	case !errors.As(err, &api):
		// The SDK quotes an answer that it cannot read, token included. At the bottom is why it cannot.
		for cause := err; cause != nil; cause = errors.Unwrap(cause) {
			err = cause
		}
	case api.StatusCode == http.StatusNotFound:
		check = " (check the exact name, and that it is in this workspace. Another branch than the default one, or a project whose " +
			"name is not the instance's, needs Endpoint instead of Instance: projects/…/branches/…/endpoints/…)"
	case api.StatusCode == http.StatusUnauthorized, api.StatusCode == http.StatusForbidden:
		check = " (check the workspace client's credentials, and what they permit)"
	case api.StatusCode == http.StatusTooManyRequests, api.StatusCode >= 500:
		check = " (the workspace is overloaded or out of order)"
	}
	return fmt.Errorf("%s: %w%s", step, err, check)
}
