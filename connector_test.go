package fastpgcache_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/lakebasetest"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
	"github.com/fastpgcache/fastpgcache/lakebase"
)

const secret = "s3cret-token"

var alwaysSecret = fastpgcache.TokenFunc(func(context.Context) (string, error) { return secret, nil })

func mustConnector(t *testing.T, dsn string, tokens fastpgcache.TokenProvider) *fastpgcache.Connector {
	t.Helper()
	c, err := fastpgcache.NewConnector(dsn, tokens)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// connectOnce opens a connection, closes it, and checks what every error must keep to.
func connectOnce(t *testing.T, ctx context.Context, c *fastpgcache.Connector) error {
	t.Helper()
	conn, err := c.Connect(ctx)
	if err == nil {
		return conn.Close()
	}
	if strings.Count(err.Error(), "fastpgcache: ") != 1 || !strings.HasPrefix(err.Error(), "fastpgcache: ") {
		t.Errorf("%q is not prefixed once", err)
	}
	if strings.Contains(err.Error(), secret) {
		t.Errorf("%q contains the token", err)
	}
	if ctx.Err() != nil && !errors.Is(err, ctx.Err()) {
		t.Errorf("%v is not %v", err, ctx.Err())
	}
	return err
}

// A fakeServer speaks as much of PostgreSQL's protocol as a login takes, and keeps what it was sent, decrypted.
type fakeServer struct {
	addr   string
	tls    *tls.Config                        // nil: refuses TLS
	answer func(n int, c net.Conn, pw string) // answers the nth login's password

	wg       sync.WaitGroup
	mu       sync.Mutex
	received bytes.Buffer
	logins   int
}

func newFakeServer(t *testing.T, cfg *tls.Config, answer func(n int, c net.Conn, pw string)) *fakeServer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &fakeServer{addr: l.Addr().String(), tls: cfg, answer: answer}
	s.wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			s.wg.Go(func() {
				defer conn.Close()
				s.serve(conn)
			})
		}
	})
	t.Cleanup(func() { l.Close(); s.wg.Wait() })
	return s
}

func (s *fakeServer) serve(conn net.Conn) {
	startup, err := s.read(conn, false)
	if err != nil {
		return
	}
	if binary.BigEndian.Uint32(startup) == 80877103 { // SSLRequest
		if s.tls == nil {
			conn.Write([]byte("N"))
			s.read(conn, false) // whatever it is, it is kept
			return
		}
		conn.Write([]byte("S"))
		conn = tls.Server(conn, s.tls)
		if _, err := s.read(conn, false); err != nil {
			return
		}
	}
	conn.Write([]byte{'R', 0, 0, 0, 8, 0, 0, 0, 3}) // AuthenticationCleartextPassword
	pw, err := s.read(conn, true)
	if err != nil {
		return
	}
	s.mu.Lock()
	s.logins++
	n := s.logins
	s.mu.Unlock()
	s.answer(n, conn, strings.TrimSuffix(string(pw), "\x00"))
}

// read returns the next message's content.
func (s *fakeServer) read(conn net.Conn, typed bool) ([]byte, error) {
	if typed {
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			return nil, err
		}
	}
	var size uint32
	if err := binary.Read(conn, binary.BigEndian, &size); err != nil {
		return nil, err
	}
	msg := make([]byte, size-4)
	_, err := io.ReadFull(conn, msg)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.received.Write(msg)
	return msg, err
}

func (s *fakeServer) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.logins
}

func (s *fakeServer) got(text string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Contains(s.received.String(), text)
}

func (s *fakeServer) dsn(options string) string {
	host, port, _ := net.SplitHostPort(s.addr)
	return fmt.Sprintf("host=%s port=%s user=u dbname=d %s", host, port, options)
}

func welcome(c net.Conn) {
	c.Write([]byte{'R', 0, 0, 0, 8, 0, 0, 0, 0, 'Z', 0, 0, 0, 5, 'I'}) // AuthenticationOk, ReadyForQuery
	io.Copy(io.Discard, bufio.NewReader(c))                            // until the client leaves
}

func refuse(c net.Conn, sqlState string) {
	body := "SFATAL\x00C" + sqlState + "\x00Mrefused by the test\x00\x00"
	c.Write(append(binary.BigEndian.AppendUint32([]byte{'E'}, uint32(len(body)+4)), body...))
}

func reset(c net.Conn) {
	c.(*net.TCPConn).SetLinger(0)
	c.Close()
}

func TestNewConnectorRefusesWhatCannotWork(t *testing.T) {
	t.Setenv("PGPASSWORD", "from the environment") // is ignored
	cases := []struct{ dsn, want string }{
		{"host=h password=x", "password"},
		{"postgres://u:x@h/d", "password"},
		{"postgres://u:x@h/%zz", "not a valid URL"},
		{"host=h sslmode=bogus", "sslmode"},
		{"nonsense", "key=value"},
		{"host=h sslmode=disable", "unencrypted"},
		{"postgres://u@h/d?sslmode=prefer", "unencrypted"},
		{"host=10.0.0.1 sslmode=allow", "unencrypted"},
		{"host=localhost,h sslmode=disable", "unencrypted"},
		{"host=localhost hostaddr=10.0.0.1 sslmode=disable", "unencrypted"},
		{"host=ep-cool-rain-d1abcdef-pooler.database.us-east-1.cloud.databricks.com", "pooler"},
		{"host=EP-cool-rain-d1abcdef-POOLER.database.us-east-1.cloud.databricks.com.", "pooler"},
		{"postgres://u@ep-cool-rain-d1abcdef-ro.database.westus.azuredatabricks.net/d", "read-only"},
		{"host=instance-ro-1b2c.database.cloud.databricks.com", "read-only"},
		{"host=h,instance-ro-1b2c.database.cloud.databricks.com", "read-only"},
	}
	for _, c := range cases {
		_, err := fastpgcache.NewConnector(c.dsn, alwaysSecret)
		if !errors.Is(err, fastpgcache.ErrInvalidConfig) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want ErrInvalidConfig about %s", c.dsn, err, c.want)
		}
		if err != nil && (strings.Contains(err.Error(), ":x@") || strings.Count(err.Error(), "fastpgcache: ") != 1) {
			t.Errorf("%s: got %q", c.dsn, err)
		}
	}
	for _, dsn := range []string{
		"", "host=h user=u dbname=d", "postgres://me%40example.com@h:5433/d?sslmode=require", "postgres://h",
		"host=instance-1b2c.database.cloud.databricks.com", "host=ep-cool-rain-d1abcdef.database.us-east-1.cloud.databricks.com",
		"host=my-pooler.example.com", "host=my-ro",
	} {
		mustConnector(t, dsn, alwaysSecret)
	}
	if _, err := fastpgcache.NewConnector("host=h", nil); !errors.Is(err, fastpgcache.ErrInvalidConfig) {
		t.Errorf("no provider: got %v, want ErrInvalidConfig", err)
	}

	service := filepath.Join(t.TempDir(), "pg_service.conf")
	writeFile(t, service, "[weak]\nsslmode=disable\n")
	t.Setenv("PGSERVICEFILE", service)
	t.Setenv("PGSERVICE", "weak")
	if _, err := fastpgcache.NewConnector("host=h", alwaysSecret); !errors.Is(err, fastpgcache.ErrInvalidConfig) {
		t.Errorf("PGSERVICE: got %v, want ErrInvalidConfig", err)
	}
}

func TestTokenGoesOnlyToTheServerNamedInTheConnectionString(t *testing.T) {
	ours, theirs := lakebasetest.NewAuthority(t), lakebasetest.NewAuthority(t)
	trust := "sslrootcert='" + ours.File + "'"
	cases := []struct {
		name    string
		tls     *tls.Config
		options string
		env     string // PGSSLMODE
		want    string // "": the server is given the token
	}{
		{"the right one", ours.TLS(t, "127.0.0.1"), trust, "", ""},
		{"another name", ours.TLS(t, "db.example.com"), trust, "", "certificate"},
		{"an unknown authority", theirs.TLS(t, "127.0.0.1"), trust, "", "certificate"},
		{"not the system's authority", ours.TLS(t, "127.0.0.1"), "sslrootcert=system", "", "certificate"},
		{"no root certificate", ours.TLS(t, "127.0.0.1"), "", "", "certificate"},
		{"no TLS", nil, trust, "", "SSL is not enabled"},
		{"PGSSLMODE=require", theirs.TLS(t, "127.0.0.1"), trust, "require", "certificate"},
		{"PGSSLMODE=disable", nil, trust, "disable", "SSL is not enabled"},
		{"sslmode=require", theirs.TLS(t, "127.0.0.1"), "sslmode=require", "", ""},
		{"sslmode=verify-ca", ours.TLS(t, "db.example.com"), trust + " sslmode=verify-ca", "", ""},
		{"sslmode=verify-ca, unknown", theirs.TLS(t, "127.0.0.1"), trust + " sslmode=verify-ca", "", "certificate"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if c.env != "" {
				t.Setenv("PGSSLMODE", c.env)
			}
			s := newFakeServer(t, c.tls, func(_ int, conn net.Conn, _ string) { welcome(conn) })
			err := connectOnce(t, t.Context(), mustConnector(t, s.dsn(c.options), alwaysSecret))
			if c.want == "" && (err != nil || !s.got(secret)) {
				t.Errorf("got %v, token received: %v, want a login", err, s.got(secret))
			}
			if c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want an error with %q", err, c.want)
			}
			if c.want != "" && s.got(secret) {
				t.Error("the server was given the token")
			}
		})
	}
}

func TestConnectAsksForAnotherTokenOnce(t *testing.T) {
	fetches := 0
	tokens := fastpgcache.NewTokenCache(func(context.Context) (fastpgcache.Token, error) {
		fetches++
		return fastpgcache.Token{Value: fmt.Sprint("token", fetches)}, nil
	})
	s := newFakeServer(t, nil, func(n int, c net.Conn, pw string) {
		if pw == "token2" {
			welcome(c)
		} else {
			refuse(c, "28P01")
		}
	})
	c := mustConnector(t, s.dsn("sslmode=disable"), tokens)
	if err := connectOnce(t, t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if fetches != 2 || s.count() != 2 {
		t.Errorf("got %d fetches and %d logins, want 2 and 2", fetches, s.count())
	}

	tokens.Invalidate("token2") // from here on every token is wrong
	err := connectOnce(t, t.Context(), c)
	var state interface{ SQLState() string }
	if !errors.As(err, &state) || state.SQLState() != "28P01" || !strings.Contains(err.Error(), "log in as u") {
		t.Errorf("got %v, want 28P01 at the login of u", err)
	}
	if fetches != 4 || s.count() != 4 {
		t.Errorf("got %d fetches and %d logins, want 4 and 4", fetches, s.count())
	}
}

func TestConnectWaitsOnceForAServerThatWakes(t *testing.T) {
	t.Parallel()
	for name, asleep := range map[string]func(net.Conn){
		"starting up": func(c net.Conn) { refuse(c, "57P03") },
		"closed":      func(c net.Conn) { c.Close() },
		"reset":       reset,
	} {
		t.Run(name, func(t *testing.T) {
			s := newFakeServer(t, nil, func(n int, c net.Conn, _ string) {
				if n == 2 {
					welcome(c)
				} else {
					asleep(c)
				}
			})
			c := mustConnector(t, s.dsn("sslmode=disable"), alwaysSecret)
			if err := connectOnce(t, t.Context(), c); err != nil {
				t.Errorf("got %v, want a connection on the second try", err)
			}
			if err := connectOnce(t, t.Context(), c); err == nil || s.count() != 4 {
				t.Errorf("got %v after %d tries, want an error after two", err, s.count()-2)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			if err := connectOnce(t, ctx, c); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v, want context.DeadlineExceeded", err)
			}
		})
	}
}

func TestConnectRefusesAnEmptyToken(t *testing.T) {
	s := newFakeServer(t, nil, func(_ int, c net.Conn, _ string) { welcome(c) })
	empty := fastpgcache.TokenFunc(func(context.Context) (string, error) { return "", nil })
	if err := connectOnce(t, t.Context(), mustConnector(t, s.dsn("sslmode=disable"), empty)); err == nil {
		t.Error("got a connection without a password")
	}
	if s.count() != 0 {
		t.Error("the server was asked")
	}
}

func TestConnectEndsWithItsContext(t *testing.T) {
	authority := lakebasetest.NewAuthority(t)
	hold := make(chan struct{})
	silent := func(_ int, c net.Conn, _ string) { <-hold }
	l, err := net.Listen("tcp", "127.0.0.1:0") // takes the call and says nothing at all
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	mute := &fakeServer{addr: l.Addr().String()}
	hanging := fastpgcache.NewTokenCache(func(ctx context.Context) (fastpgcache.Token, error) {
		<-hold
		return fastpgcache.Token{}, ctx.Err()
	})
	plain := newFakeServer(t, nil, silent)
	encrypted := newFakeServer(t, authority.TLS(t, "127.0.0.1"), silent)
	t.Cleanup(func() { close(hold) }) // before the servers' own

	cases := map[string]*fastpgcache.Connector{
		"before TLS":         mustConnector(t, mute.dsn(""), alwaysSecret),
		"without TLS":        mustConnector(t, mute.dsn("sslmode=disable"), alwaysSecret),
		"after the password": mustConnector(t, plain.dsn("sslmode=disable"), alwaysSecret),
		"inside TLS":         mustConnector(t, encrypted.dsn("sslrootcert='"+authority.File+"'"), alwaysSecret),
		"without a token":    mustConnector(t, mute.dsn(""), hanging),
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			if err := connectOnce(t, ctx, c); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("deadline: got %v, want context.DeadlineExceeded", err)
			}
			ctx, cancel = context.WithCancel(t.Context())
			time.AfterFunc(100*time.Millisecond, cancel)
			if err := connectOnce(t, ctx, c); !errors.Is(err, context.Canceled) {
				t.Errorf("cancellation: got %v, want context.Canceled", err)
			}
		})
	}
	t.Run("connect_timeout", func(t *testing.T) {
		if err := connectOnce(t, t.Context(), mustConnector(t, mute.dsn("connect_timeout=1"), alwaysSecret)); err == nil {
			t.Error("got a connection, want a timeout")
		}
	})
}

func TestConnectionOutlivesTheContextOfItsLogin(t *testing.T) {
	pg := lakebasetest.NewPostgres(t)
	token, err := pg.Issue()
	if err != nil {
		t.Fatal(err)
	}
	c := mustConnector(t, pg.DSN("scram"), fastpgcache.TokenFunc(func(context.Context) (string, error) { return token, nil }))
	db := sql.OpenDB(c)
	defer db.Close()
	db.SetMaxOpenConns(1)
	ctx, cancel := context.WithCancel(t.Context())
	if err := db.PingContext(ctx); err != nil {
		t.Fatal(err)
	}
	cancel()
	// lib/pq sends a cancel request through the same dialer.
	ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := db.ExecContext(ctx, `SELECT pg_sleep(60)`); err == nil {
		t.Error("the query ran to its end")
	}
	const sleeping = `SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)' AND state = 'active'`
	var count int
	if err := db.QueryRow(sleeping).Scan(&count); err != nil || count != 0 {
		t.Errorf("got %d queries asleep, %v, want none: it was cancelled", count, err)
	}
}

func TestHundredLoginsWithARejectedTokenFetchOnce(t *testing.T) {
	t.Parallel()
	pg := lakebasetest.NewPostgres(t)
	var fetches atomic.Int32
	tokens := fastpgcache.NewTokenCache(func(context.Context) (fastpgcache.Token, error) {
		fetches.Add(1)
		token, err := pg.Issue()
		return fastpgcache.Token{Value: token, Expiry: time.Now().Add(time.Hour)}, err
	})
	c := mustConnector(t, pg.DSN("databricks_postgres"), tokens)
	if err := connectOnce(t, t.Context(), c); err != nil {
		t.Fatal(err)
	}
	pg.Revoke(t)
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			if err := connectOnce(t, t.Context(), c); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := fetches.Load(); got != 2 {
		t.Errorf("got %d fetches, want 2: the first and one for all hundred", got)
	}
}

// A pool that keeps no connection, the real SDK, and a role whose password changes with every token: the clock goes on by half
// a token's life, two logins run at once, and so on.
func TestNoLoginFailsWhileTokensRotate(t *testing.T) {
	t.Parallel()
	pg := lakebasetest.NewPostgres(t)
	most := 50
	if pgtest.Long() {
		most = 500
	}
	for database, rotations := range map[string]int{"databricks_postgres": most, "scram": 20} {
		t.Run(database, func(t *testing.T) { rotate(t, pg, database, rotations) })
	}
}

func rotate(t *testing.T, pg *lakebasetest.Postgres, database string, rotations int) {
	start := time.Now()
	var elapsed atomic.Int64
	now := func() time.Time { return start.Add(time.Duration(elapsed.Load())) }
	w := lakebasetest.NewWorkspace(t)
	w.Issue = func() (string, time.Time, error) {
		token, err := pg.Issue()
		return token, now().Add(time.Hour), err
	}
	tokens, err := lakebase.NewTokenCache(t.Context(), lakebase.Config{Instance: lakebasetest.Instance, Client: w.Client(t)})
	if err != nil {
		t.Fatal(err)
	}
	fastpgcache.SetClock(tokens, now)
	db := sql.OpenDB(mustConnector(t, pg.DSN(database), tokens))
	defer db.Close()
	db.SetMaxIdleConns(-1)

	issued, atOnce := w.Issued()
	for issued <= rotations && !t.Failed() {
		elapsed.Add(int64(30 * time.Minute))
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				if err := db.PingContext(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		issued, atOnce = w.Issued()
	}
	lives := float64(elapsed.Load()) / float64(time.Hour)
	if perLife := float64(issued) / lives; perLife > 2.2 {
		t.Errorf("got %d fetches in %.0f lifetimes, %.2f each, want at most 2.2", issued, lives, perLife)
	}
	if atOnce != 1 {
		t.Errorf("got %d fetches at once, want 1", atOnce)
	}
	t.Logf("%d fetches in %.0f lifetimes, at most %d at once", issued, lives, atOnce)
}
