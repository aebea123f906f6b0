package main

import (
	"context"
	"database/sql/driver"
	"errors"
	"io"
	"strings"
)

// stub is a database of one entry, whose key is key.
type stub struct{}

func (stub) Connect(context.Context) (driver.Conn, error) { return stub{}, nil }
func (stub) Driver() driver.Driver                        { return nil }
func (stub) Close() error                                 { return nil }
func (stub) Begin() (driver.Tx, error)                    { return nil, errors.New("no transactions") }

func (stub) Prepare(query string) (driver.Stmt, error) {
	s := &stubStmt{row: []driver.Value{"value", nil}}
	switch {
	case strings.Contains(query, "cache_epoch"):
		s.row = []driver.Value{nil, int64(1), "token", ""}
	case strings.HasPrefix(strings.TrimSpace(query), "SELECT key"):
		s.row = []driver.Value{"key"}
	}
	return s, nil
}

// stubStmt returns the same row each time.
type stubStmt struct{ row []driver.Value }

func (*stubStmt) Close() error                               { return nil }
func (*stubStmt) NumInput() int                              { return -1 }
func (*stubStmt) Exec([]driver.Value) (driver.Result, error) { return nil, errors.New("no writes") }
func (s *stubStmt) Query([]driver.Value) (driver.Rows, error) {
	return &stubRows{s.row, false}, nil
}

type stubRows struct {
	row  []driver.Value
	done bool
}

func (r *stubRows) Columns() []string { return make([]string, len(r.row)) }
func (r *stubRows) Close() error      { return nil }
func (r *stubRows) Next(dest []driver.Value) error {
	if r.done {
		return io.EOF
	}
	r.done = true
	copy(dest, r.row)
	return nil
}
