// Package scsstore is a session store for github.com/alexedwards/scs:
//
//	sessions := scs.New()
//	sessions.Store = scsstore.Store{Cache: cache}
package scsstore

import (
	"context"
	"strings"
	"time"

	"github.com/alexedwards/scs/v2"

	"github.com/fastpgcache/fastpgcache"
)

const prefix = "scs/"

// Store keeps sessions in a cache, which removes them when they expire.
type Store struct{ Cache *fastpgcache.Cache }

var (
	_ scs.CtxStore         = Store{}
	_ scs.IterableCtxStore = Store{}
)

func (s Store) FindCtx(ctx context.Context, token string) (b []byte, found bool, err error) {
	found, err = s.Cache.Get(ctx, prefix+token, &b)
	return b, found, err
}

func (s Store) CommitCtx(ctx context.Context, token string, b []byte, expiry time.Time) error {
	ttl := time.Until(expiry)
	if ttl <= 0 {
		return s.DeleteCtx(ctx, token)
	}
	return s.Cache.Set(ctx, prefix+token, b, ttl)
}

func (s Store) DeleteCtx(ctx context.Context, token string) error {
	_, err := s.Cache.Delete(ctx, prefix+token)
	return err
}

func (s Store) AllCtx(ctx context.Context) (map[string][]byte, error) {
	var keys []string
	for key, err := range s.Cache.Keys(ctx, prefix) {
		if err != nil {
			return nil, err
		}
		keys = append(keys, key)
	}
	values, err := s.Cache.GetMany(ctx, keys)
	all := make(map[string][]byte, len(values))
	for key, value := range values {
		all[strings.TrimPrefix(key, prefix)] = value
	}
	return all, err
}

func (s Store) Find(token string) ([]byte, bool, error) {
	return s.FindCtx(context.Background(), token)
}
func (s Store) Delete(token string) error       { return s.DeleteCtx(context.Background(), token) }
func (s Store) All() (map[string][]byte, error) { return s.AllCtx(context.Background()) }
func (s Store) Commit(token string, b []byte, expiry time.Time) error {
	return s.CommitCtx(context.Background(), token, b, expiry)
}
