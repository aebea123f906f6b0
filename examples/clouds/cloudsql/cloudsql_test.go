package cloudsql

import (
	"strings"
	"testing"

	"cloud.google.com/go/cloudsqlconn"
	"golang.org/x/oauth2"
)

func TestTheFirstStatementAsksForTheInstance(t *testing.T) {
	token := oauth2.StaticTokenSource(&oauth2.Token{AccessToken: "t"})
	cache, end, err := Open(t.Context(), "no instance", "app@project.iam", "shop", cloudsqlconn.WithIAMAuthNTokenSources(token, token))
	if err != nil {
		t.Fatal(err)
	}
	defer end()
	defer cache.Close()
	if err := cache.Ping(t.Context()); err == nil || !strings.Contains(err.Error(), "no instance") {
		t.Errorf("got %v, want it to name the instance", err)
	}
}
