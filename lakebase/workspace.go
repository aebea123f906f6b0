package lakebase

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/databricks/databricks-sdk-go/apierr"
	"github.com/databricks/databricks-sdk-go/client"
	"github.com/databricks/databricks-sdk-go/config"
	"github.com/databricks/databricks-sdk-go/service/database"
	"github.com/databricks/databricks-sdk-go/service/iam"
	"github.com/databricks/databricks-sdk-go/service/postgres"

	"github.com/fastpgcache/fastpgcache"
)

const (
	retryTimeoutSeconds = 30 // how long the SDK tries; its default of 5 minutes is longer than TokenCache waits
	httpTimeoutSeconds  = 15 // how long it waits for an answer; its default is 60
)

// workspace is the part of the SDK's WorkspaceClient that is needed here. To make a whole one links every service of
// Databricks into the program, which makes it 12 MB larger.
type workspace struct {
	instance, endpoint string // as in Config
	users              iam.CurrentUserInterface
	provisioned        database.DatabaseInterface
	autoscaling        postgres.PostgresInterface
}

func (cfg Config) logIn(ctx context.Context) (*workspace, error) {
	w := &workspace{instance: cfg.Instance, endpoint: cfg.Endpoint}
	var c *config.Config
	if cfg.Client != nil {
		c = cfg.Client.Config
		w.users, w.provisioned, w.autoscaling = cfg.Client.CurrentUser, cfg.Client.Database, cfg.Client.Postgres
	} else {
		c = &config.Config{
			Profile:             cfg.Profile,
			RetryTimeoutSeconds: retryTimeoutSeconds,
			HTTPTimeoutSeconds:  httpTimeoutSeconds,
		}
		api, err := client.New(c)
		if err != nil {
			return nil, err
		}
		w.users, w.provisioned, w.autoscaling = iam.NewCurrentUser(api), database.NewDatabase(api), postgres.NewPostgres(api)
	}
	// A request that is not sent: the SDK gets its header, for which it may have to log in.
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.Host, nil)
	if err != nil {
		return nil, err
	}
	return w, c.Authenticate(req)
}

func (w *workspace) lookUpHost(ctx context.Context) (string, error) {
	if w.endpoint == "" {
		instance, err := w.provisioned.GetDatabaseInstance(ctx, database.GetDatabaseInstanceRequest{Name: w.instance})
		switch {
		case errors.Is(err, apierr.ErrNotFound):
			endpoint, findErr := w.findEndpoint(ctx)
			if findErr != nil {
				return "", findErr
			}
			if endpoint == nil {
				return "", err
			}
			return hostOf(endpoint)
		case err != nil:
			return "", err
		case instance.ReadWriteDns == "":
			return "", fmt.Errorf("it has no read-write host; its state is %q", instance.State)
		}
		return instance.ReadWriteDns, nil
	}
	endpoint, err := w.autoscaling.GetEndpoint(ctx, postgres.GetEndpointRequest{Name: w.endpoint})
	if err != nil {
		return "", err
	}
	return hostOf(endpoint)
}

func hostOf(endpoint *postgres.Endpoint) (string, error) {
	switch status := endpoint.Status; {
	case status == nil || status.Hosts == nil || status.Hosts.Host == "":
		return "", errors.New("it has no host yet")
	case status.EndpointType == postgres.EndpointTypeEndpointTypeReadOnly:
		return "", errors.New("it is a read replica, where an unlogged table cannot be read: use the branch's read-write endpoint")
	}
	return endpoint.Status.Hosts.Host, nil
}

// findEndpoint returns the endpoint of the project that bears the instance's name, as its id or, where there is none of that
// id, for people. It is nil where there is no such project.
//
// New instances are autoscaling projects since March 2026, and those that were there are upgraded from June 2026 on
// (https://docs.databricks.com/aws/en/oltp/update-to-autoscaling-terraform).
func (w *workspace) findEndpoint(ctx context.Context) (*postgres.Endpoint, error) {
	project, err := w.autoscaling.GetProject(ctx, postgres.GetProjectRequest{Name: "projects/" + w.instance})
	if errors.Is(err, apierr.ErrNotFound) || errors.Is(err, apierr.ErrInvalidParameterValue) || errors.Is(err, apierr.ErrBadRequest) {
		if project, err = w.findProject(ctx); project == nil {
			return nil, err
		}
	}
	if err != nil {
		return nil, err
	}
	branch := project.Name + "/branches/production"
	if project.Status != nil && project.Status.DefaultBranch != "" {
		branch = project.Status.DefaultBranch
	}
	endpoints, err := w.autoscaling.ListEndpointsAll(ctx, postgres.ListEndpointsRequest{Parent: branch})
	if err != nil {
		return nil, err
	}
	for _, endpoint := range endpoints {
		if endpoint.Status != nil && endpoint.Status.EndpointType == postgres.EndpointTypeEndpointTypeReadWrite {
			return &endpoint, nil
		}
	}
	return nil, fmt.Errorf("it is upgraded, and %s has no read-write endpoint", branch)
}

// findProject returns the one project that bears the instance's name for people, or nil.
func (w *workspace) findProject(ctx context.Context) (found *postgres.Project, err error) {
	projects, err := w.autoscaling.ListProjectsAll(ctx, postgres.ListProjectsRequest{})
	if err != nil {
		return nil, err
	}
	for _, p := range projects {
		if p.Status == nil || p.Status.DisplayName != w.instance {
			continue
		}
		if found != nil {
			return nil, fmt.Errorf("%s and %s both bear that name: give the Endpoint", found.Name, p.Name)
		}
		found = &p
	}
	return found, nil
}

func (w *workspace) newTokenCache(ctx context.Context) (*fastpgcache.TokenCache, error) {
	tokens := fastpgcache.NewTokenCache(w.fetchToken)
	if _, err := tokens.Refresh(ctx); err != nil {
		return nil, err
	}
	return tokens, nil
}

// fetchToken asks the workspace for a password. It lasts an hour and is checked at login only
// (https://docs.databricks.com/aws/en/oltp/authentication, …/oltp/projects/authentication).
func (w *workspace) fetchToken(ctx context.Context) (fastpgcache.Token, error) {
	token, err := w.generateCredential(ctx)
	if err != nil {
		return fastpgcache.Token{}, explain("generate a token for "+Config{Instance: w.instance, Endpoint: w.endpoint}.target(), err)
	}
	return token, nil
}

func (w *workspace) generateCredential(ctx context.Context) (fastpgcache.Token, error) {
	if w.endpoint != "" {
		return w.endpointCredential(ctx, w.endpoint)
	}
	cred, err := w.provisioned.GenerateDatabaseCredential(ctx, database.GenerateDatabaseCredentialRequest{InstanceNames: []string{w.instance}})
	if errors.Is(err, apierr.ErrNotFound) { // it may have been upgraded since the last time
		endpoint, findErr := w.findEndpoint(ctx)
		if findErr != nil {
			return fastpgcache.Token{}, findErr
		}
		if endpoint != nil {
			return w.endpointCredential(ctx, endpoint.Name)
		}
	}
	if err != nil {
		return fastpgcache.Token{}, err
	}
	expiry, err := time.Parse(time.RFC3339, cred.ExpirationTime)
	if err != nil {
		return fastpgcache.Token{}, fmt.Errorf("the token's expiry time: %v", err)
	}
	return fastpgcache.Token{Value: cred.Token, Expiry: expiry}, nil
}

func (w *workspace) endpointCredential(ctx context.Context, endpoint string) (fastpgcache.Token, error) {
	cred, err := w.autoscaling.GenerateDatabaseCredential(ctx, postgres.GenerateDatabaseCredentialRequest{Endpoint: endpoint})
	if err != nil {
		return fastpgcache.Token{}, err
	}
	if cred.ExpireTime == nil {
		return fastpgcache.Token{}, errors.New("the token came without an expiry time")
	}
	return fastpgcache.Token{Value: cred.Token, Expiry: cred.ExpireTime.AsTime()}, nil
}
