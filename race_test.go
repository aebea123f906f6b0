//go:build race

package fastpgcache

const raceEnabled = true
