package rds

import (
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/credentials"
)

func TestTheTokenHasTheSlashThatTheSDKLeavesOut(t *testing.T) {
	static := credentials.NewStaticCredentialsProvider("AKID", "SECRET", "")
	got, err := token(t.Context(), "db.example.eu-west-1.rds.amazonaws.com:5432", "eu-west-1", "app", static)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(got.Value, "db.example.eu-west-1.rds.amazonaws.com:5432/?Action=connect&DBUser=app&") {
		t.Errorf("got %s", got.Value)
	}
}

func TestOpenLogsInNowhereYet(t *testing.T) {
	cache, err := Open(t.Context(), "db.example.eu-west-1.rds.amazonaws.com", "eu-west-1", "app", "shop", "/etc/ssl/global-bundle.pem")
	if err != nil {
		t.Fatal(err)
	}
	cache.Close()
}
