package lakebase_test

import (
	"context"
	"log"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/lakebase"
)

func ExampleOpen() {
	ctx := context.Background()
	cache, err := lakebase.Open(ctx, lakebase.Config{Instance: "my_instance"}, fastpgcache.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer cache.Close()
}

// On a laptop: an autoscaling endpoint, with the credentials of a profile in ~/.databrickscfg.
func ExampleOpen_profile() {
	ctx := context.Background()
	cache, err := lakebase.Open(ctx, lakebase.Config{
		Endpoint: "projects/my-project/branches/production/endpoints/primary",
		Profile:  "DEFAULT",
	}, fastpgcache.Config{})
	if err != nil {
		log.Fatal(err)
	}
	defer cache.Close()
}
