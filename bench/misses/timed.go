package main

import (
	"context"
	"database/sql/driver"
	"strings"
	"sync"
	"time"
)

// timer is a connector that times catch-ups, from the statement to its last row.
type timer struct {
	driver.Connector

	mu   sync.Mutex
	took []time.Duration // guarded by mu
}

// reset returns what was timed since the last reset.
func (t *timer) reset() []time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	took := t.took
	t.took = nil
	return took
}

func (t *timer) Connect(ctx context.Context) (driver.Conn, error) {
	c, err := t.Connector.Connect(ctx)
	return timedConn{c, t}, err
}

type timedConn struct {
	driver.Conn
	timer *timer
}

func (c timedConn) Prepare(query string) (driver.Stmt, error) {
	s, err := c.Conn.Prepare(query)
	if err == nil && strings.Contains(query, "cache_epoch") {
		s = timedStmt{s, c.timer}
	}
	return s, err
}

type timedStmt struct {
	driver.Stmt
	timer *timer
}

func (s timedStmt) Query(args []driver.Value) (driver.Rows, error) {
	begin := time.Now()
	rows, err := s.Stmt.Query(args) //lint:ignore SA1019 what database/sql falls back to
	return timedRows{rows, s.timer, begin}, err
}

type timedRows struct {
	driver.Rows
	timer *timer
	begin time.Time
}

func (r timedRows) Next(dest []driver.Value) error {
	err := r.Rows.Next(dest)
	if err != nil {
		r.timer.mu.Lock()
		defer r.timer.mu.Unlock()
		r.timer.took = append(r.timer.took, time.Since(r.begin))
	}
	return err
}
