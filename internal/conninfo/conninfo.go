// Package conninfo reads connection strings, and never shows them.
package conninfo

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/lib/pq"
)

// Parse is [pq.NewConfig], but no error holds anything of dsn: whatever looks wrong about
// it may be a part of a password. Settings stand where neither dsn nor, if it is a URL, its
// query says otherwise, whatever the environment says.
func Parse(dsn string, settings ...string) (pq.Config, error) {
	dsn, err := withDefaults(trim(dsn), settings)
	if err != nil {
		return pq.Config{}, err
	}
	cfg, err := pq.NewConfig(dsn)
	if err != nil {
		if _, err := pq.NewConfig(""); err != nil {
			return pq.Config{}, errors.New("a PG variable of the environment, or the service file that it names, is not valid" + culprit(err))
		}
		return pq.Config{}, errors.New(invalid + culprit(err))
	}
	for name := range cfg.Runtime {
		if !parameter.MatchString(name) {
			return pq.Config{}, errors.New(invalid)
		}
	}
	return cfg, nil
}

const invalid = "the connection string is not valid: it must be a URL, postgres://…, or key=value pairs, with values that have spaces in single quotes"

// parameter is the name of a setting of the server's.
var parameter = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_$]*)*$`)

// culprit names the setting that err is about, if it is one that everybody knows.
func culprit(err error) string {
	for _, name := range []string{"sslmode", "port", "connect_timeout", "hostaddr", "sslnegotiation", "target_session_attrs", "load_balance_hosts", "binary_parameters", "client_encoding"} {
		for _, form := range []string{`"` + name + `"`, `"PG` + strings.ToUpper(name) + `"`, " " + name + " ", " " + name + ":"} {
			if strings.Contains(err.Error(), form) {
				return fmt.Sprintf(" (%s)", name)
			}
		}
	}
	return ""
}

// trim takes off what surrounds a connection string, and writes a URL's scheme as lib/pq
// knows it: it would take another for the name of a setting, and tell the server.
func trim(dsn string) string {
	dsn = strings.TrimSpace(dsn)
	if scheme, rest, ok := strings.Cut(dsn, "://"); ok && (strings.EqualFold(scheme, "postgres") || strings.EqualFold(scheme, "postgresql")) {
		return strings.ToLower(scheme) + "://" + rest
	}
	return dsn
}

// withDefaults puts settings into dsn. What dsn says itself stays.
func withDefaults(dsn string, settings []string) (string, error) {
	if !strings.HasPrefix(dsn, "postgres://") && !strings.HasPrefix(dsn, "postgresql://") {
		return strings.Join(append(settings, dsn), " "), nil // the last of two pairs wins
	}
	u, err := url.Parse(dsn)
	if err != nil {
		return "", errors.New("the connection string is not a valid URL")
	}
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return "", errors.New("the connection string is not a valid URL")
	}
	for _, setting := range settings {
		if key, value, _ := strings.Cut(setting, "="); q.Get(key) == "" {
			q.Set(key, value)
		}
	}
	u.RawQuery = q.Encode()
	return u.String(), nil
}

// Local reports whether everything that cfg may connect to is on this machine.
func Local(cfg pq.Config) bool {
	if !local(cfg.Host, cfg.Hostaddr) {
		return false
	}
	for _, m := range cfg.Multi {
		if !local(m.Host, m.Hostaddr) {
			return false
		}
	}
	return true
}

func local(host string, address netip.Addr) bool {
	if address.IsValid() {
		return address.IsLoopback()
	}
	if host == "" || host == "localhost" || filepath.IsAbs(host) || strings.HasPrefix(host, "@") {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback()
}
