module github.com/fastpgcache/fastpgcache/bench

go 1.25.0

require github.com/fastpgcache/fastpgcache v0.0.0

require github.com/lib/pq v1.12.3 // indirect

replace github.com/fastpgcache/fastpgcache => ../
