package fastpgcache

import "time"

// SetClock replaces the wall clock of a TokenCache that nobody uses yet.
func SetClock(c *TokenCache, now func() time.Time) { c.now = now }

// IsText is what keys and values are checked with.
var IsText = isText
