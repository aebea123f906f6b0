package fastpgcache_test

import (
	"os"
	"testing"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// TestMain stands in for fastpgcache_test.go's; delete this file when it is there.
func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }
