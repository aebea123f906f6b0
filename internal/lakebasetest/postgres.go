package lakebasetest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"database/sql"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lib/pq"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// An Authority signs the certificates of servers.
type Authority struct {
	File string // its own certificate, for sslrootcert
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewAuthority makes one that nobody knows yet.
func NewAuthority(tb testing.TB) *Authority {
	tb.Helper()
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "a test's authority"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	a := &Authority{key: newKey(tb), File: filepath.Join(tb.TempDir(), "root.crt")}
	a.cert = sign(tb, template, template, a.key, a.key)
	if err := os.WriteFile(a.File, certPEM(a.cert), 0o600); err != nil {
		tb.Fatal(err)
	}
	return a
}

// Certificate returns a certificate for name, a host or an IP address, and its key, both as PEM.
func (a *Authority) Certificate(tb testing.TB, name string) (cert, key []byte) {
	tb.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
	}
	if ip := net.ParseIP(name); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{name}
	}
	k := newKey(tb)
	c := sign(tb, template, a.cert, k, a.key)
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		tb.Fatal(err)
	}
	return certPEM(c), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// TLS returns a server's configuration with a certificate for name.
func (a *Authority) TLS(tb testing.TB, name string) *tls.Config {
	tb.Helper()
	pair, err := tls.X509KeyPair(a.Certificate(tb, name))
	if err != nil {
		tb.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{pair}}
}

func newKey(tb testing.TB) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

func sign(tb testing.TB, template, parent *x509.Certificate, key, parentKey *ecdsa.PrivateKey) *x509.Certificate {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
	if err != nil {
		tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return cert
}

func certPEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// A Postgres is a PostgreSQL that lets [User] in over TLS with the token issued last: by scram into database scram, and into
// databricks_postgres by a password in clear, as Lakebase does (https://docs.databricks.com/aws/en/oltp/authentication).
type Postgres struct {
	Addr      string // host:port, of which the certificate names the host
	Authority *Authority

	server *pgtest.Server
	admin  *sql.DB
	issued atomic.Int64
}

// NewPostgres starts a server that ends with the test.
func NewPostgres(tb testing.TB) *Postgres {
	tb.Helper()
	authority := NewAuthority(tb)
	cert, key := authority.Certificate(tb, "127.0.0.1")
	server := pgtest.Own(tb, pgtest.Config{
		Settings: map[string]string{"ssl": "on"},
		HBA: "host all postgres 127.0.0.1/32 trust\n" +
			"hostssl scram all 127.0.0.1/32 scram-sha-256\n" +
			"hostssl databricks_postgres all 127.0.0.1/32 password\n",
		Files: map[string][]byte{"server.crt": cert, "server.key": key},
	})
	host, port := server.Addr()
	p := &Postgres{Addr: net.JoinHostPort(host, fmt.Sprint(port)), Authority: authority, server: server}
	var err error
	if p.admin, err = sql.Open("postgres", server.DSN("postgres")); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { p.admin.Close() })
	p.exec(tb, `CREATE ROLE `+pq.QuoteIdentifier(User)+` LOGIN`)
	p.exec(tb, `CREATE DATABASE scram`)
	p.exec(tb, `CREATE DATABASE databricks_postgres`)
	return p
}

// DSN is for NewConnector: User, without a password.
func (p *Postgres) DSN(database string) string {
	host, port := p.server.Addr()
	return fmt.Sprintf("host=%s port=%d user=%s dbname=%s sslrootcert='%s'", host, port, User, database, p.Authority.File)
}

// Issue makes a new token the password of User, valid for five seconds by PostgreSQL's clock. The one before is thereby
// revoked, which Lakebase would not do.
func (p *Postgres) Issue() (string, error) {
	token := fmt.Sprintf("token-%d", p.issued.Add(1))
	_, err := p.admin.Exec(`ALTER ROLE ` + pq.QuoteIdentifier(User) + ` PASSWORD ` + pq.QuoteLiteral(token) +
		` VALID UNTIL ` + pq.QuoteLiteral(time.Now().Add(5*time.Second).Format(time.RFC3339Nano)))
	return token, err
}

// Revoke makes every token so far useless.
func (p *Postgres) Revoke(tb testing.TB) {
	tb.Helper()
	p.exec(tb, `ALTER ROLE `+pq.QuoteIdentifier(User)+` PASSWORD NULL`)
}

func (p *Postgres) exec(tb testing.TB, statement string) {
	tb.Helper()
	if _, err := p.admin.Exec(statement); err != nil {
		tb.Fatal(err)
	}
}
