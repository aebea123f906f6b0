package fastpgcache

import (
	"context"
	"slices"
	"strconv"
	"time"

	"github.com/fastpgcache/fastpgcache/internal/history"
)

const (
	modelUpsert = `INSERT INTO cache (key, value) VALUES ($1, $2)
		ON CONFLICT (user_id, key) DO UPDATE SET value = excluded.value, value_bytes = NULL, expires_at = NULL`
	modelDelete = `DELETE FROM cache WHERE user_id = current_user AND key = $1`
)

func (a *actor) useSQL(ctx context.Context) error {
	key := window() + a.random.IntN(modelKeys)
	start := history.Now()
	value, text := a.Value()
	exec := func(statement string, args ...any) error {
		_, err := a.db.ExecContext(ctx, statement, args...)
		return err
	}
	switch p := a.random.IntN(1000); {
	case p < 250:
		err := exec(modelUpsert, name(key), text)
		a.Stored(key, value, start, 0, err)
		return err
	case p < 350:
		err := exec(`SELECT cache_set(current_user::text, $1, $2)`, name(key), text)
		a.Stored(key, value, start, 0, err)
		return err
	case p < 450:
		err := exec(modelDelete, name(key))
		a.Removed(key, start, err)
		return err
	case p < 500:
		err := exec(`SELECT cache_delete(current_user::text, $1)`, name(key))
		a.Removed(key, start, err)
		return err
	case p < 550: // at once what is there, and what comes
		result, err := a.db.ExecContext(ctx, `UPDATE cache SET value = $2, value_bytes = NULL WHERE user_id = current_user AND key = $1`, name(key), text)
		if err != nil {
			a.Stored(key, value, start, 0, err)
		} else if n, _ := result.RowsAffected(); n > 0 { // an expired one, perhaps
			e := history.Event{Kind: history.Stored, Key: key, Value: value, Start: start, End: history.Now()}
			a.Note(e)
		}
		return err
	case p < 552:
		err := exec(`DELETE FROM cache WHERE user_id = current_user`)
		a.Removed(history.AllKeys, start, err)
		return err
	case p < 556: // so that the feed is trimmed up to a moment ago
		if err := exec(`UPDATE cache_epoch SET taken = ARRAY(SELECT t - interval '1 hour' FROM unnest(taken) t) WHERE user_id = current_user`); err != nil {
			return err
		}
		return exec(`SELECT cache_trim(current_user::text, 100000)`)
	}
	return a.transaction(ctx)
}

// transaction writes some keys, and maybe others in a savepoint that it rolls back
// to, and after a while commits, as a prepared transaction or not, or rolls back.
func (a *actor) transaction(ctx context.Context) error {
	conn, err := a.db.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer conn.ExecContext(ctx, `ROLLBACK`)
	exec := func(statement string, args ...any) {
		if err == nil {
			_, err = conn.ExecContext(ctx, statement, args...)
		}
	}
	exec(`BEGIN`)
	keys := a.random.Perm(modelKeys)[:1+a.random.IntN(3)]
	slices.Sort(keys)
	begin := window()
	var done []history.Event
	for _, key := range keys {
		key += begin
		value, text := a.Value()
		switch start := history.Now(); a.random.IntN(5) {
		case 0:
			exec(modelDelete, name(key))
			done = append(done, history.Event{Kind: history.Removed, Key: key, Start: start})
		case 1:
			exec(`SAVEPOINT s`)
			exec(modelUpsert, name(key), text)
			exec(`ROLLBACK TO s`)
		case 2:
			exec(`SAVEPOINT t`)
			fallthrough
		default:
			exec(modelUpsert, name(key), text)
			done = append(done, history.Event{Kind: history.Stored, Key: key, Value: value, Start: start})
		}
	}
	wait := func() { time.Sleep(time.Duration(a.random.IntN(20)) * time.Millisecond) }
	wait()
	committed := false
	switch id := strconv.FormatUint(a.random.Uint64(), 36); a.random.IntN(8) {
	case 0:
		if exec(`ROLLBACK`); err == nil {
			return nil
		}
	case 1:
		exec(`PREPARE TRANSACTION '` + id + `'`)
		wait()
		exec(`COMMIT PREPARED '` + id + `'`)
		committed = err == nil
	default:
		exec(`COMMIT`)
		committed = err == nil
	}
	for _, e := range done {
		if e.Certain, e.End = committed, history.Now(); !committed {
			e.End = history.Forever
		}
		a.Note(e)
	}
	return err
}
