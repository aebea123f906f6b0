package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/history"
)

// caller is one goroutine that uses a process' cache.
type caller struct {
	*history.Log
	trial   *trial
	process *process
	random  *rand.Rand
	wrote   int // the key of the last write
}

// Keys are of a window that moves on, so that there always are some that have never been
// there, and what failed long ago says nothing of them.
const (
	windowKeys  = 20
	windowMoves = 5
	windowTime  = int64(100 * time.Millisecond)
)

func window() (first int) { return windowMoves * int(history.Now()/windowTime) }

func name(key int) string { return fmt.Sprint("key ", key) }

// run calls act again and again until ctx ends, each with a context of its own.
func (c *caller) run(ctx context.Context, act func(context.Context) error) {
	for ctx.Err() == nil {
		err := c.call(act)
		if err != nil {
			time.Sleep(10 * time.Millisecond)
		}
		if c.trial.pause > 0 {
			time.Sleep(time.Duration(c.random.Int64N(2 * int64(c.trial.pause))))
		}
	}
}

// call calls act, which the time of its context bounds, and counts what came of it.
func (c *caller) call(act func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), c.trial.patience)
	defer cancel()
	begin, start := time.Now(), history.Now()
	err := act(ctx)
	if !isTx(err) { // a transaction that ends on a dead connection waits for its driver
		c.trial.result.called(time.Since(begin), err)
	}
	if over := time.Since(begin) - c.trial.patience; over > 2*time.Second && !isTx(err) {
		c.trial.failf("a call outlived its context by %v: %v", over, err)
	}
	if err == nil {
		c.process.succeeded.Store(max(start, c.process.succeeded.Load()))
		return nil
	}
	kind := c.trial.kind(err)
	if isTx(err) {
		kind = "WithTx " + kind
	}
	c.trial.result.failed1(kind)
	c.process.lastError.Store(err.Error())
	if strings.Count(err.Error(), "fastpgcache: ") != 1 && !isTx(err) {
		c.trial.failf("an error has no prefix, or two: %v", err)
	}
	return err
}

// errSentTwice is why a statement over lib/pq may have done what it says it did not:
// docs/operations.md.
var errSentTwice = errors.New("database/sql may have sent it twice")

// txError is of a transaction's begin or commit, which are the caller's own.
type txError struct{ error }

func (e txError) Unwrap() error { return e.error }

func isTx(err error) bool { _, ok := err.(txError); return ok }

func (c *caller) key() int {
	if c.wrote > 0 && c.random.IntN(3) == 0 {
		return c.wrote
	}
	return window() + c.random.IntN(windowKeys)
}

func (c *caller) get(ctx context.Context, key int) error {
	var text string
	start := history.Now()
	found, err := c.process.cache.Get(ctx, name(key), &text)
	c.Answered(key, text, found, start, err)
	return err
}

// act does one operation.
func (c *caller) act(ctx context.Context) error {
	cache, key, ttl := c.process.cache, c.key(), time.Duration(1+c.random.IntN(60))*time.Millisecond
	start := history.Now()
	p := c.random.IntN(100)
	if p < 40 {
		return c.get(ctx, key)
	}
	value, text := c.Value()
	switch {
	case p < 44:
		found, err := cache.Exists(ctx, name(key))
		if !found {
			c.Answered(key, "", false, start, err)
		}
		return err
	case p < 48:
		_, found, err := cache.TTL(ctx, name(key))
		if !found {
			c.Answered(key, "", false, start, err)
		}
		return err
	case p < 54:
		values, err := cache.GetMany(ctx, []string{name(key), name(key + 1), name(key + 2)})
		for i := range 3 {
			v, found := values[name(key+i)]
			c.Answered(key+i, v.String(), found, start, err)
		}
		return err
	case p < 66:
		c.wrote = key
		err := cache.Set(ctx, name(key), text, 0)
		c.Stored(key, value, start, 0, err)
		return err
	case p < 71:
		err := cache.Set(ctx, name(key), text, ttl)
		c.Stored(key, value, start, ttl, err)
		return err
	case p < 75:
		value2, text2 := c.Value()
		err := cache.SetMany(ctx, map[string]any{name(key): text, name(key + 1): text2}, 0)
		c.Stored(key, value, start, 0, err)
		c.Stored(key+1, value2, start, 0, err)
		return err
	case p < 78:
		added, err := cache.Add(ctx, name(key), text, 0)
		if added || err != nil {
			c.Stored(key, value, start, 0, err)
		} else if c.process.driver == "pq" {
			c.Stored(key, value, start, 0, errSentTwice)
		}
		return err
	case p < 80:
		v, found, err := cache.Take(ctx, name(key))
		if err != nil || found {
			c.Removed(key, start, err)
		} else if c.process.driver == "pq" {
			c.Removed(key, start, errSentTwice)
		}
		if found {
			fresh := &history.Log{} // never answered from memory
			fresh.Answered(key, v.String(), true, start, err)
			c.Events = append(c.Events, fresh.Events...)
		}
		return err
	case p < 84:
		return c.getOrSet(ctx, key)
	case p < 87:
		return c.inTx(ctx, key)
	case p < 89:
		found, err := cache.Expire(ctx, name(key), ttl)
		// Over lib/pq it may have been sent twice, and find that the entry has expired since the first time.
		if found || err != nil || c.process.driver == "pq" {
			c.retimed(key, start, ttl, err)
		}
		return err
	case p < 92:
		_, err := cache.Increment(ctx, c.process.counter(), 1, 0)
		if err == nil {
			c.process.counted.Add(1)
		} else {
			c.process.perhaps.Add(1)
		}
		return err
	case p < 94:
		_, err := cache.DeleteMany(ctx, []string{name(key + 2), name(key)})
		c.Removed(key, start, err)
		c.Removed(key+2, start, err)
		return err
	default:
		_, err := cache.Delete(ctx, name(key))
		c.Removed(key, start, err)
		return err
	}
}

// retimed notes that key's TTL was, or may have been, changed.
func (c *caller) retimed(key int, start int64, ttl time.Duration, err error) {
	end := history.Now()
	if err != nil {
		end = history.Forever
	}
	c.Note(history.Event{Kind: history.Retimed, Key: key, Start: start, End: end})
	c.Note(history.Event{Kind: history.Removed, Key: key, Start: start, End: end + min(int64(ttl)+history.Slack, history.Forever-end)})
}

func (c *caller) getOrSet(ctx context.Context, key int) error {
	value, text := c.Value()
	var got string
	loaded := false
	start := history.Now()
	err := c.process.cache.GetOrSet(ctx, name(key), &got, 0, func(context.Context) (any, error) { loaded = true; return text, nil })
	// There is no telling whether and when it was stored.
	c.Note(history.Event{Kind: history.Stored, Key: key, Value: value, Start: start, End: history.Forever})
	if !loaded {
		c.Answered(key, got, true, start, err)
	}
	return err
}

// inTx stores key in a transaction of the caller's.
func (c *caller) inTx(ctx context.Context, key int) error {
	value, text := c.Value()
	start := history.Now()
	tx, err := c.process.cache.DB().BeginTx(ctx, &sql.TxOptions{})
	if err != nil {
		return txError{err}
	}
	defer tx.Rollback()
	if err = c.process.cache.WithTx(tx).Set(ctx, name(key), text, fastpgcache.NoExpiry); err == nil {
		err = tx.Commit()
	}
	if err != nil {
		err = txError{err}
	}
	outside := &history.Log{} // its writes count as somebody else's
	outside.Stored(key, value, start, 0, err)
	c.Events = append(c.Events, outside.Events...)
	return err
}
