// Package pgtest runs throwaway PostgreSQL servers from the binaries installed
// on this machine, for tests, benchmarks and examples.
//
// A test takes a database of its own on a server that its process shares:
//
//	func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }
//
//	func TestSomething(t *testing.T) {
//		db, err := sql.Open("postgres", pgtest.Database(t))
//		…
//	}
//
// A test that restarts or kills its server, or needs its own settings, takes a
// server of its own with [Own]; a program that is no test calls [Start].
//
// No server and no data directory outlives the process that started it, however
// that process ends.
//
// # Environment
//
//   - FASTPGCACHE_TEST_BINDIR: the directory of initdb and postgres
//   - FASTPGCACHE_TEST_DIR: where servers have their data, the system's directory
//     for temporary files if not set; one in memory makes databases several times as fast
//   - FASTPGCACHE_TEST_DSN: a superuser's connection string, URL or key/value;
//     [Shared] then uses that server instead of starting one
//   - FASTPGCACHE_LONG: not empty, [Long] says so
package pgtest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// startTimeout bounds initdb and each start of a server, besides ctx.
const startTimeout = time.Minute

var errNotOwned = errors.New("pgtest: this server was not started here: it is that of FASTPGCACHE_TEST_DSN")

// Config says how a server is set up. The zero value is a fast, unsafe one.
type Config struct {
	// BinDir is the directory of initdb and postgres; nothing else is needed
	// from it. Defaults to FASTPGCACHE_TEST_BINDIR, then the first directory of
	// PATH that has both, then the newest version in the usual places.
	BinDir string

	// Settings are those of postgresql.conf, over the defaults: a small server
	// on loopback that never waits for its disk. Defaults to none.
	Settings map[string]string

	// HBA is the whole of pg_hba.conf. Defaults to trusting everyone on loopback.
	HBA string

	// Files are written into the data directory, mode 0600: server.key, say.
	// Defaults to none.
	Files map[string][]byte

	// Durable leaves fsync, synchronous_commit and full_page_writes as
	// PostgreSQL has them, for a benchmark that must pay for its commits.
	// Defaults to false: all three are off.
	Durable bool
}

// Server is a throwaway PostgreSQL server, on 127.0.0.1 and a port of its own,
// which stays the same across restarts. It is safe for concurrent use.
type Server struct {
	dsn     string // all but the database
	host    string
	port    int
	version int

	dir     string // holds data, log and lock; empty for a server not started here
	bin     string
	account *account
	watch   *watchdog

	mu      sync.Mutex // one change of state at a time
	proc    *process   // nil while it does not run
	killed  bool       // and not started again since
	stopped bool
}

// Start creates a cluster and runs its server, which is ready for connections
// when Start returns. On failure nothing is left, and the error carries the end
// of the server's log. The server ends with this process if not stopped before.
func Start(ctx context.Context, cfg Config) (_ *Server, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	bin, err := findBinDir(cfg.BinDir)
	if err != nil {
		return nil, err
	}
	account, err := serverAccount()
	if err != nil {
		return nil, err
	}
	sweep()
	watch, err := newWatchdog(account)
	if err != nil {
		return nil, err
	}
	s := &Server{host: "127.0.0.1", dir: watch.dir, bin: bin, account: account, watch: watch}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Stop())
		}
	}()
	if s.version, err = s.binaryVersion(ctx); err != nil {
		return nil, err
	}
	if err := s.initdb(ctx, cfg); err != nil {
		return nil, err
	}
	for attempt := 0; ; attempt++ {
		if s.port, err = freePort(); err != nil {
			return nil, err
		}
		s.dsn = fmt.Sprintf("host=%s port=%d user=postgres sslmode=disable", s.host, s.port)
		err = s.launch(ctx)
		if !errors.Is(err, errPortTaken) || attempt == 9 {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

// DSN returns a connection string, in key/value form, for the superuser
// postgres and the given database. Options, each "key=value", come last and so
// override what stands before them: DSN("app", "user=alice").
func (s *Server) DSN(database string, options ...string) string {
	return strings.Join(append([]string{s.dsn, "dbname=" + quoteValue(database)}, options...), " ")
}

// Addr returns where the server listens.
func (s *Server) Addr() (host string, port int) { return s.host, s.port }

// Version returns the server's version as server_version_num has it: 150018.
func (s *Server) Version() int { return s.version }

// Owned tells whether the server was started here, so that it may be restarted
// and killed. Only that of FASTPGCACHE_TEST_DSN is not.
func (s *Server) Owned() bool { return s.dir != "" }

// DataDir returns the data directory; it is empty for a server that is not Owned.
func (s *Server) DataDir() string {
	if !s.Owned() {
		return ""
	}
	return filepath.Join(s.dir, "data")
}

// Log returns all that the server has logged.
func (s *Server) Log() (string, error) {
	if !s.Owned() {
		return "", errNotOwned
	}
	b, err := os.ReadFile(s.logFile())
	return string(b), err
}

// Stop shuts the server down fast, waits until it is gone and removes its
// directory. A second Stop does nothing.
func (s *Server) Stop() error {
	if !s.Owned() {
		return errNotOwned
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return nil
	}
	if s.killed {
		// The next start alone frees the shared memory that SIGKILL left.
		_ = s.launch(context.Background())
	}
	s.stopped = true
	return errors.Join(s.shutdown(), s.watch.close())
}

// Restart shuts the server down cleanly, ending every session, and starts it
// again on the same port. Unlogged tables keep their rows.
func (s *Server) Restart(ctx context.Context) error {
	if !s.Owned() {
		return errNotOwned
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.shutdown(); err != nil {
		return err
	}
	return s.launch(ctx)
}

// Kill ends every process of the server with SIGKILL, as the kernel does when
// memory runs out. The data directory stays; after StartAgain unlogged tables
// are empty.
func (s *Server) Kill() error {
	if !s.Owned() {
		return errNotOwned
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.kill()
}

// StartAgain starts a killed server, on the same port.
func (s *Server) StartAgain(ctx context.Context) error {
	if !s.Owned() {
		return errNotOwned
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.launch(ctx)
}

// Crash is Kill and StartAgain.
func (s *Server) Crash(ctx context.Context) error {
	if err := s.Kill(); err != nil {
		return err
	}
	return s.StartAgain(ctx)
}

// initdb creates the cluster and writes its configuration.
func (s *Server) initdb(ctx context.Context, cfg Config) error {
	// By its relative name, initdb cannot make the directory anew after it was
	// removed because this process was killed.
	cmd := s.command(ctx, "initdb", "-D", filepath.Base(s.DataDir()), "-U", "postgres",
		"-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
	if err := s.runLogged(cmd); err != nil {
		return s.explain("initdb", err)
	}
	hba := cfg.HBA
	if hba == "" {
		hba = "host all all 127.0.0.1/32 trust\nhost replication all 127.0.0.1/32 trust\n"
	}
	// Behind what initdb found this machine to need: the last of two wins.
	chosen, err := os.ReadFile(filepath.Join(s.DataDir(), "postgresql.conf"))
	if err != nil {
		return fmt.Errorf("pgtest: %w", err)
	}
	files := map[string][]byte{
		"postgresql.conf": append(chosen, settings(cfg)...),
		"pg_hba.conf":     []byte(hba),
	}
	maps.Copy(files, cfg.Files)
	for name, content := range files {
		path := filepath.Join(s.DataDir(), name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			return fmt.Errorf("pgtest: %w", err)
		}
		// WriteFile keeps the mode of a file that initdb made.
		if err := errors.Join(os.Chmod(path, 0o600), s.account.own(path)); err != nil {
			return fmt.Errorf("pgtest: %w", err)
		}
	}
	return nil
}

// settings returns postgresql.conf.
func settings(cfg Config) string {
	all := map[string]string{
		"listen_addresses":          "127.0.0.1",
		"unix_socket_directories":   "",
		"max_connections":           "200",
		"max_prepared_transactions": "10",
		"shared_buffers":            "128MB",
		"lc_messages":               "C",
		"log_line_prefix":           "%m [%p] %q%u@%d ",
	}
	if cfg.HBA == "" {
		all["password_encryption"] = "md5" // nobody is asked for one, and the better one takes 5 ms to store
	}
	if !cfg.Durable {
		all["fsync"] = "off"
		all["synchronous_commit"] = "off"
		all["full_page_writes"] = "off"
	}
	maps.Copy(all, cfg.Settings)
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(all)) {
		value := strings.NewReplacer(`\`, `\\`, `'`, `''`).Replace(all[name])
		fmt.Fprintf(&b, "%s = '%s'\n", name, value)
	}
	return b.String()
}

// binaryVersion asks the binary, since a pg_hba.conf may admit nobody.
func (s *Server) binaryVersion(ctx context.Context) (int, error) {
	cmd := s.command(ctx, "postgres", "--version")
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return 0, fmt.Errorf("pgtest: %s: %w: %s", cmd.Path, err, strings.TrimSpace(string(exit.Stderr)))
	}
	if err != nil {
		return 0, s.explain("postgres", err)
	}
	version, err := parseVersion(string(out))
	if err != nil {
		return 0, fmt.Errorf("pgtest: %s: %w", cmd.Path, err)
	}
	return version, nil
}

// parseVersion reads "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)" as 150018.
func parseVersion(line string) (int, error) {
	_, rest, _ := strings.Cut(line, "(PostgreSQL) ")
	var major, minor int
	if n, _ := fmt.Sscanf(rest, "%d.%d", &major, &minor); n == 0 {
		return 0, fmt.Errorf("no version in %q", line)
	}
	return major*10000 + minor, nil
}

// freePort returns a port nobody listens on. It lies below the range from which
// systems give ports to clients, so that no outgoing connection takes it while
// the server is down, not even a client dialing the server itself.
func freePort() (int, error) {
	var err error
	for range 100 {
		port := 15000 + rand.IntN(17000)
		var l net.Listener
		if l, err = net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port))); err == nil {
			return port, l.Close()
		}
	}
	return 0, fmt.Errorf("pgtest: no free port: %w", err)
}
