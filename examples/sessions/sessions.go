// Package sessions keeps the sessions of an HTTP service in the cache: a random
// token in a cookie, and what belongs to it in an entry that expires when it is not
// used for a while.
package sessions

import (
	"context"
	"crypto/rand"
	"errors"
	"net/http"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

const (
	cookie = "session"
	idle   = 30 * time.Minute
)

// Session is what the service remembers of a visitor.
type Session struct {
	User string
	Cart []string
}

// Store keeps sessions.
type Store struct{ Cache *fastpgcache.Cache }

func key(token string) string { return "session/" + token }

// Start begins a session and hands its token to the visitor.
func (s Store) Start(ctx context.Context, w http.ResponseWriter, session Session) error {
	token := rand.Text()
	if err := s.Cache.Set(ctx, key(token), session, idle); err != nil {
		return err
	}
	http.SetCookie(w, &http.Cookie{
		Name: cookie, Value: token, Path: "/",
		HttpOnly: true, Secure: true, SameSite: http.SameSiteLaxMode,
	})
	return nil
}

// Session returns the visitor's session, and keeps it alive for another while.
func (s Store) Session(r *http.Request) (session Session, found bool, err error) {
	c, err := r.Cookie(cookie)
	if errors.Is(err, http.ErrNoCookie) || c.Value == "" || len(c.Value) > 100 {
		return Session{}, false, nil
	}
	if found, err = s.Cache.Get(r.Context(), key(c.Value), &session); err != nil || !found {
		return Session{}, false, err
	}
	found, err = s.Cache.Expire(r.Context(), key(c.Value), idle)
	return session, found, err
}

// End ends the visitor's session.
func (s Store) End(w http.ResponseWriter, r *http.Request) error {
	c, err := r.Cookie(cookie)
	if err != nil {
		return nil
	}
	http.SetCookie(w, &http.Cookie{Name: cookie, Path: "/", MaxAge: -1})
	_, err = s.Cache.Delete(r.Context(), key(c.Value))
	return err
}
