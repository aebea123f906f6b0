package fastpgcache

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/lib/pq"
)

// dsnConnector is what Open uses: lib/pq, over connections that do not wait for the dead.
type dsnConnector struct{ cfg pq.Config }

func (c dsnConnector) Driver() driver.Driver { return &pq.Driver{} }

func (c dsnConnector) Connect(ctx context.Context) (driver.Conn, error) {
	return login(ctx, c.cfg.Clone())
}

// login connects as cfg says, and ends with ctx.
func login(ctx context.Context, cfg pq.Config) (driver.Conn, error) {
	pc, err := pq.NewConnectorConfig(cfg)
	if err != nil {
		return nil, err
	}
	d := &connDialer{login: ctx}
	pc.Dialer(d)
	conn, err := pc.Connect(ctx)
	ended := d.endLogin()
	switch {
	case err == nil && ended:
		conn.Close()
		return nil, ctx.Err()
	case err == nil:
		if c, ok := conn.(pqConn); ok { // else a lib/pq of another time
			conn = boundedConn{c, d}
		}
		return conn, nil
	case ctx.Err() != nil && !errors.Is(err, ctx.Err()):
		return nil, fmt.Errorf("%w (%w)", ctx.Err(), err)
	}
	return nil, err
}

// pqConn and pqStmt are what lib/pq's connections and prepared statements do.
type pqConn interface {
	driver.Conn
	driver.ConnBeginTx
	driver.ConnPrepareContext
	driver.ExecerContext
	driver.NamedValueChecker
	driver.Pinger
	driver.QueryerContext
	driver.SessionResetter
	driver.Validator
}

type pqStmt interface {
	driver.Stmt
	driver.StmtExecContext
	driver.StmtQueryContext
}

// A boundedConn ends, with its connection, what lib/pq waits for whatever ctx says: the
// answer to BEGIN and, before the pool closes a connection, that to the end of a prepared
// statement. From a connection that has gone dead without a word none comes.
type boundedConn struct {
	pqConn
	dialer *connDialer
}

func (c boundedConn) BeginTx(ctx context.Context, opts driver.TxOptions) (driver.Tx, error) {
	stop := context.AfterFunc(ctx, c.dialer.hangUp)
	tx, err := c.pqConn.BeginTx(ctx, opts)
	if !stop() {
		return nil, driver.ErrBadConn // database/sql drops it, and reports ctx
	}
	return tx, err
}

func (c boundedConn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	s, err := c.pqConn.PrepareContext(ctx, query)
	if st, ok := s.(pqStmt); ok { // that of a COPY is none
		return boundedStmt{st, c.dialer}, err
	}
	return s, err
}

type boundedStmt struct {
	pqStmt
	dialer *connDialer
}

func (s boundedStmt) Close() error {
	defer time.AfterFunc(cancelPatience, s.dialer.hangUp).Stop()
	return s.pqStmt.Close()
}

// A connDialer is of one connection. It closes what it dialled when the login's ctx ends, because lib/pq heeds ctx only until
// a server answers the phone. lib/pq keeps the dialer for the connection's cancel requests, after which it waits for the
// answer, for ever where the connection has gone dead without a word: its place in the pool would be lost. It is never used
// again either way, so it is given up in a while.
type connDialer struct {
	net.Dialer
	login  context.Context // nil after the login
	stops  []func() bool
	dialed []net.Conn // for the connection itself
}

// cancelPatience is how long a server may take to end a statement after a cancel request,
// or a prepared one.
const cancelPatience = 2 * time.Second

func (d *connDialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if d.login == nil { // a cancel request
		for _, conn := range d.dialed {
			conn.SetReadDeadline(time.Now().Add(cancelPatience))
		}
		return d.Dialer.DialContext(ctx, network, address)
	}
	conn, err := d.Dialer.DialContext(ctx, network, address)
	if err == nil {
		d.dialed = append(d.dialed, conn)
		d.stops = append(d.stops, context.AfterFunc(d.login, func() { conn.Close() }))
	}
	return conn, err
}

// DialTimeout completes pq.Dialer, but lib/pq prefers DialContext.
func (d *connDialer) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	return net.DialTimeout(network, address, timeout)
}

// endLogin lets go of ctx and tells whether it had ended before.
func (d *connDialer) endLogin() (ended bool) {
	for _, stop := range d.stops {
		ended = !stop() || ended
	}
	d.login, d.stops = nil, nil
	return ended
}

// hangUp closes the connection, if it is still open.
func (d *connDialer) hangUp() {
	for _, conn := range d.dialed {
		conn.Close()
	}
}
