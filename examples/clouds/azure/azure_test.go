package azure

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
)

var errAsked = errors.New("asked for a token")

// asked is a credential that only notes what it is asked for.
type asked struct{ scopes []string }

func (a *asked) GetToken(_ context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	a.scopes = o.Scopes
	return azcore.AccessToken{ExpiresOn: time.Now().Add(time.Hour)}, errAsked
}

func TestTheFirstStatementAsksForATokenOfPostgreSQL(t *testing.T) {
	credential := &asked{}
	cache, err := open("server.postgres.database.azure.com", "my identity", "shop", credential)
	if err != nil {
		t.Fatal(err)
	}
	defer cache.Close()
	if err := cache.Ping(t.Context()); !errors.Is(err, errAsked) {
		t.Errorf("got %v, want the credential's error", err)
	}
	if len(credential.scopes) != 1 || credential.scopes[0] != scope {
		t.Errorf("asked for %q", credential.scopes)
	}
}
