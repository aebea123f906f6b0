package fastpgcache_test

import (
	"os"
	"testing"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }
