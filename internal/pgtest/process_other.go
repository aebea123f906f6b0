//go:build !unix

package pgtest

import (
	"errors"
	"syscall"
)

var errUnsupported = errors.New("pgtest: cannot start PostgreSQL on this system: " +
	"set FASTPGCACHE_TEST_DSN to a superuser's connection string for a running server")

type account struct{ name string }

func serverAccount() (*account, error) { return nil, errUnsupported }

func (a *account) own(string) error                 { return errUnsupported }
func (a *account) attributes() *syscall.SysProcAttr { return nil }
func (a *account) closedDir(string) string          { return "" }

func signal(int, syscall.Signal) error { return errUnsupported }
func killTree(int) error               { return errUnsupported }

type watchdog struct{ dir string }

func newWatchdog(*account) (*watchdog, error) { return nil, errUnsupported }
func (w *watchdog) close() error              { return errUnsupported }
func sweep()                                  {}
