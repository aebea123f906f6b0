package fastpgcache

import "time"

// SetClock replaces the wall clock of a TokenCache that nobody uses yet.
func SetClock(c *TokenCache, now func() time.Time) { c.now = now }

// CheckKey is what keys are checked with.
var CheckKey = checkKey
