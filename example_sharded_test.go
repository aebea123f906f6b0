package fastpgcache_test

import (
	"fmt"
	"log"

	"github.com/fastpgcache/fastpgcache"
)

// Eight schemas of one database, which fastpgcache-admin setup --shards 8 makes. Each could
// as well be a database of its own, opened by its DSN.
func ExampleNewSharded() {
	shards := make(map[string]*fastpgcache.Cache)
	for i := range 8 {
		name := fmt.Sprintf("cache_%d", i)
		shard, err := fastpgcache.New(db, fastpgcache.Config{Schema: name})
		if err != nil {
			log.Fatal(err)
		}
		shards[name] = shard
	}
	cache, err := fastpgcache.NewSharded(shards)
	if err != nil {
		log.Fatal(err)
	}
	defer cache.Close()
}
