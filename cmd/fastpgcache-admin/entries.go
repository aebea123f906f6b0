package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/fastpgcache/fastpgcache"
)

// openCache logs in and returns the cache as the library's clients see it.
func openCache(ctx context.Context, o *options) (*server, *fastpgcache.Cache, error) {
	all := []*options{o}
	if o.shards > 0 {
		all = o.shardOptions()
	}
	var s *server
	for _, shard := range all { // each is looked at; one login is enough for all of them
		next, err := openShard(ctx, shard)
		if s != nil {
			s.Close()
		}
		if err != nil {
			return nil, nil, err
		}
		s, o.user = next, shard.user
	}
	var cache *fastpgcache.Cache
	var err error
	if o.shards > 0 {
		cache, err = o.sharded(ctx, s, o.label)
	} else {
		cache, err = fastpgcache.New(s.DB, fastpgcache.Config{Schema: s.name, User: o.label, DisableCoalescing: true})
	}
	if err == nil && o.label != "" {
		err = cache.Ping(ctx) // another's entries would not be found, without an error
	}
	if err != nil {
		s.Close()
		return nil, nil, err
	}
	return s, cache, nil
}

// entry is one that was found.
type entry struct {
	User  string   `json:"user"`
	Key   string   `json:"key"`
	Value *string  `json:"value,omitempty"` // or, where that is no text:
	Bytes []byte   `json:"value_base64,omitempty"`
	TTL   *float64 `json:"ttl_seconds"` // null: it does not expire

	value []byte
}

func runGet(ctx context.Context, o *options, out, _ io.Writer) error {
	s, cache, err := openCache(ctx, o)
	if err != nil {
		return err
	}
	defer s.Close()
	defer cache.Close()
	e := &entry{User: o.whose(), Key: o.argument}
	found, err := cache.Get(ctx, e.Key, &e.value)
	if err != nil {
		return err
	}
	if !found {
		return &adviceError{
			fmt.Sprintf("user %s has no entry %s", printable(e.User), printable(e.Key)),
			"Another user's: --label USER. Who has entries: fastpgcache-admin top",
		}
	}
	if !o.json {
		return writeValue(out, e.value)
	}
	ttl, _, err := cache.TTL(ctx, e.Key)
	if err != nil {
		return err
	}
	if ttl != fastpgcache.NoExpiry {
		seconds := ttl.Round(time.Millisecond).Seconds()
		e.TTL = &seconds
	}
	if text := string(e.value); utf8.ValidString(text) {
		e.Value = &text
	} else {
		e.Bytes = e.value
	}
	return o.tell(out, e)
}

func (e *entry) print(io.Writer) {}

// writeValue writes a value as it is, but to a terminal as a line that can do nothing to it.
func writeValue(out io.Writer, value []byte) error {
	if isTerminal(out) {
		lines := strings.Split(strings.TrimSuffix(string(value), "\n"), "\n")
		for i, line := range lines {
			lines[i] = printable(line)
		}
		value = []byte(strings.Join(lines, "\n") + "\n")
	}
	_, err := out.Write(value)
	return err
}

func runKeys(ctx context.Context, o *options, out, _ io.Writer) error {
	s, cache, err := openCache(ctx, o)
	if err != nil {
		return err
	}
	defer s.Close()
	defer cache.Close()
	w := bufio.NewWriter(out)
	defer w.Flush()
	n := 0
	for key, err := range cache.Keys(ctx, o.argument) {
		if err != nil {
			return err
		}
		line := printable(key)
		if o.json {
			b, err := json.Marshal(key)
			if err != nil {
				return err
			}
			line = string(b)
		}
		if _, err := fmt.Fprintln(w, line); err != nil {
			return err
		}
		if n++; n == o.limit {
			break
		}
	}
	return w.Flush()
}

// whose is the user whose entries are meant.
func (o *options) whose() string {
	if o.label != "" {
		return o.label
	}
	return o.user
}
