// Package fastpgcache gives a Go service Redis-style caching inside the
// PostgreSQL it already runs.
package fastpgcache
