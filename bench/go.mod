module github.com/fastpgcache/fastpgcache/bench

go 1.25.0

replace github.com/fastpgcache/fastpgcache => ../

require (
	github.com/bits-and-blooms/bloom/v3 v3.7.1
	github.com/fastpgcache/fastpgcache v0.0.0-00010101000000-000000000000
	github.com/seiflotfy/cuckoofilter v0.0.0-20240715131351-a2f2c23f1771
)

require (
	github.com/bits-and-blooms/bitset v1.24.2 // indirect
	github.com/dgryski/go-metro v0.0.0-20200812162917-85c65e2d0165 // indirect
)
