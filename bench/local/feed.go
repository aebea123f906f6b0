package main

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

// watchFeed writes as many statements as the machine gives, each of one key, beside a
// cache that answers from memory, and then once more beside a transaction that stays open.
func watchFeed(ctx context.Context) error {
	s, err := startServers(ctx)
	if err != nil {
		return err
	}
	defer s.Stop()
	value := strings.Repeat("v", valueBytes)
	if err := s.Fill(ctx, keys, value); err != nil {
		return err
	}
	db, err := sql.Open("postgres", s.DSN())
	if err != nil {
		return err
	}
	defer db.Close()
	fmt.Println("| at | statements/s | rows of the feed | heap MB | index MB | a catch-up, median ms | longest ms |")
	fmt.Println("|--:|--:|--:|--:|--:|--:|--:|")
	free, err := s.write(ctx, db, value, *feed)
	if err != nil {
		return err
	}
	tx, err := db.Begin()
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if _, err := tx.Exec(`SELECT txid_current()`); err != nil {
		return err
	}
	fmt.Println("\nBeside a transaction that stays open:")
	beside, err := s.write(ctx, db, value, *feed/5)
	if err != nil {
		return err
	}
	fmt.Printf("\n%.2f of the rate before\n", beside/free)
	return nil
}

func (s *servers) write(ctx context.Context, db *sql.DB, value string, d time.Duration) (rate float64, err error) {
	c, err := fastpgcache.Open(s.DSN(), fastpgcache.Config{DisableCoalescing: true})
	if err != nil {
		return 0, err
	}
	defer c.Close()
	listening, err := s.cache(*staleness)
	if err != nil {
		return 0, err
	}
	defer listening.Close()
	ctx, stop := context.WithTimeout(ctx, d)
	defer stop()
	names := keyNames()
	var written atomic.Int64
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := g; ctx.Err() == nil; i += 8 {
				if c.Set(ctx, names[i%len(names)], value, ttl) == nil {
					written.Add(1)
				}
			}
		})
	}
	wg.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			listening.Get(ctx, names[i%100], nil)
			time.Sleep(time.Millisecond)
		}
	})
	var took []time.Duration
	begin, last, lastAt := time.Now(), int64(0), time.Now()
	every := max(d/20, 2*time.Second)
	for tick := time.Now().Add(every); ctx.Err() == nil; {
		// What a catch-up is: a reading of the rows since a moment ago.
		var xmax int64
		if err := db.QueryRowContext(ctx, `SELECT txid_snapshot_xmax(txid_current_snapshot())`).Scan(&xmax); err != nil {
			break
		}
		time.Sleep(*staleness / 2)
		at := time.Now()
		var n int
		err := db.QueryRowContext(ctx, `SELECT count(*) FROM cache_change f, unnest(f.keys::text[]) k WHERE f.user_id = current_user AND f.xid >= $1`, xmax).Scan(&n)
		if err != nil {
			break
		}
		took = append(took, time.Since(at))
		if time.Now().Before(tick) {
			continue
		}
		tick = tick.Add(every)
		var rows, heap, index int64
		if err := db.QueryRowContext(ctx, `SELECT count(*), pg_table_size('cache_change'), pg_indexes_size('cache_change') FROM cache_change`).Scan(&rows, &heap, &index); err != nil {
			break
		}
		now := written.Load()
		slices.Sort(took)
		fmt.Printf("| %v | %.0f | %d | %.0f | %.0f | %.2f | %.2f |\n", time.Since(begin).Round(time.Second), float64(now-last)/time.Since(lastAt).Seconds(), rows,
			float64(heap)/1e6, float64(index)/1e6, took[len(took)/2].Seconds()*1000, took[len(took)-1].Seconds()*1000)
		took, last, lastAt = took[:0], now, time.Now()
	}
	wg.Wait()
	fmt.Printf("\n%d catch-ups, %d resets\n", listening.Stats().Local.CatchUps, listening.Stats().Local.Resets)
	return float64(written.Load()) / time.Since(begin).Seconds(), nil
}
