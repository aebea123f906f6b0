module github.com/fastpgcache/fastpgcache/examples

go 1.25.0

replace github.com/fastpgcache/fastpgcache => ../

require (
	github.com/alexedwards/scs/v2 v2.9.0
	github.com/fastpgcache/fastpgcache v0.0.0
	github.com/lib/pq v1.12.3
)
