module github.com/fastpgcache/fastpgcache/examples

go 1.25.0

require (
	github.com/alexedwards/scs/v2 v2.9.0
	github.com/fastpgcache/fastpgcache v0.0.0
	github.com/fergusstrange/embedded-postgres v1.34.0
	github.com/lib/pq v1.12.3
)

require (
	github.com/maypok86/otter/v2 v2.4.0 // indirect
	github.com/xi2/xz v0.0.0-20171230120015-48954b6210f8 // indirect
)

replace github.com/fastpgcache/fastpgcache => ../
