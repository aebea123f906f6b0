//go:build !race

package fastpgcache

const raceEnabled = false
