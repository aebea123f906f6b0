// Package azure opens a cache on Azure Database for PostgreSQL with a token of Microsoft Entra ID.
//
// The server must have Entra authentication, and a role of the identity's name, made with
// pgaadauth_create_principal. A managed identity of a VM, of Container Apps or of AKS needs nothing
// more here, a laptop "az login".
package azure

import (
	"context"
	"fmt"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"github.com/fastpgcache/fastpgcache"
)

// scope is that of all of Azure's PostgreSQL servers.
const scope = "https://ossrdbms-aad.database.windows.net/.default"

// Open opens a cache; host is server.postgres.database.azure.com, and user the identity's name.
func Open(host, user, database string) (*fastpgcache.Cache, error) {
	credential, err := azidentity.NewDefaultAzureCredential(nil)
	if err != nil {
		return nil, err
	}
	return open(host, user, database, credential)
}

func open(host, user, database string, credential azcore.TokenCredential) (*fastpgcache.Cache, error) {
	tokens := fastpgcache.NewTokenCache(func(ctx context.Context) (fastpgcache.Token, error) {
		token, err := credential.GetToken(ctx, policy.TokenRequestOptions{Scopes: []string{scope}})
		return fastpgcache.Token{Value: token.Token, Expiry: token.ExpiresOn}, err
	})
	connector, err := fastpgcache.NewConnector(fmt.Sprintf("host=%s user='%s' dbname=%s", host, user, database), tokens)
	if err != nil {
		return nil, err
	}
	return fastpgcache.OpenConnector(connector, fastpgcache.Config{})
}
