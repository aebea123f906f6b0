// Package grafana has a dashboard of what package prommetrics exports.
package grafana

import _ "embed"

// Dashboard is fastpgcache.json: import it in Grafana.
//
//go:embed fastpgcache.json
var Dashboard []byte
