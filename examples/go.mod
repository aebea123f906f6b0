module github.com/fastpgcache/fastpgcache/examples

go 1.25.0

require (
	github.com/alexedwards/scs/v2 v2.9.0
	github.com/fastpgcache/fastpgcache v0.0.0
	github.com/lib/pq v1.12.3
)

require github.com/maypok86/otter/v2 v2.4.0 // indirect

replace github.com/fastpgcache/fastpgcache => ../
