package fastpgcache

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/lib/pq"

	"github.com/fastpgcache/fastpgcache/internal/conninfo"
)

const (
	loginTimeout = 30 * time.Second       // without a connect_timeout; ctx may end earlier
	wakeDelay    = 500 * time.Millisecond // before another try at a server that starts up

	// tokenConnLifetime is how long OpenConnector keeps a connection, which outlives its token: whoever may not log in any more
	// should not stay logged in for ever.
	tokenConnLifetime = 45 * time.Minute
)

// A Connector opens connections with lib/pq and asks a [TokenProvider] for the password of each. It is safe for concurrent
// use. Give it to [OpenConnector], or to [database/sql.OpenDB] and then call SetConnMaxLifetime on the pool: PostgreSQL checks
// a token when a connection is opened and never again.
type Connector struct {
	cfg    pq.Config
	tokens TokenProvider
}

var _ driver.Connector = (*Connector)(nil)

// NewConnector returns a Connector for a connection string of lib/pq, a URL or key=value pairs, without a password. It does no
// I/O beyond the files that the connection string names.
//
// Unless the connection string itself says otherwise, whatever PGSSLMODE is:
//   - sslmode is verify-full, because in lib/pq's default, require, any server is given the token; the certificate must be
//     signed by a system root, or by one in sslrootcert or PGSSLROOTCERT
//   - binary_parameters is yes, so that a statement that is not prepared takes one round trip
//   - connect_timeout is PGCONNECT_TIMEOUT, or 30 s
//
// An error is [ErrInvalidConfig]: for a password, since the token is the password; for an sslmode that may do without
// encryption (disable, allow, prefer), unless the server is on this machine; for a pg_service.conf entry, since lib/pq
// lets it override the connection string, sslmode included; and for Lakebase's pooled and read-only hosts. Its pooler takes
// no tokens (https://docs.databricks.com/aws/en/oltp/projects/connection-pooling), and an unlogged table is not replicated
// (https://www.postgresql.org/docs/current/sql-createtable.html).
func NewConnector(dsn string, tokens TokenProvider) (*Connector, error) {
	cfg, err := tokenConfig(dsn)
	if err != nil {
		return nil, prefixed("connector", fmt.Errorf("%w: %w", ErrInvalidConfig, err))
	}
	if tokens == nil {
		return nil, prefixed("connector", fmt.Errorf("%w: no token provider", ErrInvalidConfig))
	}
	return &Connector{cfg: cfg, tokens: tokens}, nil
}

func tokenConfig(dsn string) (pq.Config, error) {
	cfg, err := conninfo.Parse(dsn, "sslmode=verify-full", "binary_parameters=yes")
	if err != nil {
		return pq.Config{}, err
	}
	if cfg.Password != "" && cfg.Password != os.Getenv("PGPASSWORD") {
		return pq.Config{}, errors.New("the connection string has a password, but the token is the password: leave it out")
	}
	if cfg.Service != "" {
		return pq.Config{}, errors.New("a pg_service.conf entry (service, PGSERVICE) could weaken sslmode: put its settings into the connection string")
	}
	hosts := []string{cfg.Host}
	for _, m := range cfg.Multi {
		hosts = append(hosts, m.Host)
	}
	for _, host := range hosts {
		if err := checkHost(host); err != nil {
			return pq.Config{}, err
		}
	}
	switch cfg.SSLMode {
	case pq.SSLModeDisable, pq.SSLModeAllow, pq.SSLModePrefer:
		if !conninfo.Local(cfg) {
			return pq.Config{}, fmt.Errorf("sslmode=%s could send the token to another machine unencrypted: take verify-full, verify-ca or require", cfg.SSLMode)
		}
	}
	if cfg.ConnectTimeout <= 0 {
		cfg.ConnectTimeout = loginTimeout
	}
	return cfg, nil
}

// checkHost refuses the Lakebase hosts that cannot serve a cache. Their names are {endpoint}-pooler.database.…,
// {endpoint}-ro.database.… and instance-ro-{uuid}.database.…
// (https://docs.databricks.com/aws/en/oltp/projects/high-availability, …/oltp/instances/create/high-availability).
func checkHost(host string) error {
	name, domain, _ := strings.Cut(strings.ToLower(strings.TrimSuffix(host, ".")), ".")
	if !strings.HasPrefix(domain, "database.") ||
		!strings.HasSuffix(domain, ".databricks.com") && !strings.HasSuffix(domain, ".azuredatabricks.net") {
		return nil
	}
	if strings.HasSuffix(name, "-pooler") {
		return fmt.Errorf("%s is Lakebase's connection pooler, which takes no tokens: use the same host without -pooler", host)
	}
	if strings.HasSuffix(name, "-ro") || strings.HasPrefix(name, "instance-ro-") {
		return fmt.Errorf("%s is a read-only Lakebase host, where an unlogged table cannot be read: use the read-write host", host)
	}
	return nil
}

// Tokens returns the provider that NewConnector was given, such as a [TokenCache] to refresh by hand.
func (c *Connector) Tokens() TokenProvider { return c.tokens }

// Driver returns lib/pq's driver.
func (c *Connector) Driver() driver.Driver { return &pq.Driver{} }

// Connect opens a connection. It ends with ctx, the wait for a token and the login included.
//
// It tries once more after a token was rejected (SQLSTATE class 28), with another token, and once more half a second after
// the server said that it was starting up (57P03) or closed the connection, as a Lakebase compute does that is waking up.
func (c *Connector) Connect(ctx context.Context) (driver.Conn, error) {
	rejected, woken := false, false
	for {
		token, err := c.tokens.Token(ctx)
		if err != nil {
			return nil, prefixed("connect", err)
		}
		if token == "" { // lib/pq would look for a password in ~/.pgpass
			return nil, prefixed("connect", errors.New("the token provider returned an empty token"))
		}
		cfg := c.cfg.Clone()
		cfg.Password = token
		conn, err := login(ctx, cfg)
		switch {
		case err == nil:
			return conn, nil
		case !rejected && strings.HasPrefix(sqlState(err), "28"):
			rejected = true
			if p, ok := c.tokens.(interface{ Invalidate(rejected string) }); ok {
				p.Invalidate(token)
			}
		case !woken && startingUp(err):
			woken = true
			select {
			case <-time.After(wakeDelay):
			case <-ctx.Done(): // which the next login reports
			}
		default:
			return nil, prefixed("connect", fmt.Errorf("log in as %s at %s: %w", c.cfg.User, c.cfg.Host, err))
		}
	}
}

// startingUp tells whether the server is there but did not let anybody log in yet.
func startingUp(err error) bool {
	return sqlState(err) == "57P03" || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}
