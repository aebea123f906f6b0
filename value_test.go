package fastpgcache_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// hostile are the seeds of the fuzz targets.
var hostile = []string{
	"", "k", "'", `"`, `\`, `\x00`, "\x00", "a\x00b", "\xff", "\xed\xa0\x80", "ключ🔑", "\u202e", "%_", "$1", "{user}", "\r\n", " ",
	"null", "true", "-0", "1e999", `"text"`, `"\ud800"`, `{"X":1}`, `{"X":"text"}`, "[1,2]", `{"a":{"b":[null]}}`, "{", strings.Repeat("k", 1025),
}

func newCache(tb testing.TB) *fastpgcache.Cache {
	tb.Helper()
	c, err := fastpgcache.Open(pgtest.Database(tb), fastpgcache.Config{})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	if err := fastpgcache.Setup(tb.Context(), c.DB(), fastpgcache.SetupConfig{}); err != nil {
		tb.Fatal(err)
	}
	return c
}

func FuzzValueRoundTrip(f *testing.F) {
	for _, seed := range hostile {
		f.Add([]byte(seed))
	}
	c := newCache(f)
	f.Fuzz(func(t *testing.T, want []byte) {
		ctx := t.Context()
		if err := c.Set(ctx, "k", want, time.Hour); err != nil {
			t.Fatal(err)
		}
		var got []byte
		if found, err := c.Get(ctx, "k", &got); err != nil || !found || !bytes.Equal(got, want) {
			t.Errorf("got %q, %t, %v, want %q", got, found, err, want)
		}
	})
}

func FuzzKeyRoundTrip(f *testing.F) {
	for _, seed := range hostile {
		f.Add(seed)
	}
	c := newCache(f)
	f.Fuzz(func(t *testing.T, key string) {
		ctx := t.Context()
		err := c.Set(ctx, key, key, time.Hour)
		if key == "" || len(key) > 1024 || !utf8.ValidString(key) || strings.Contains(key, "\x00") {
			if !errors.Is(err, fastpgcache.ErrInvalidKey) {
				t.Errorf("set: got %v, want ErrInvalidKey", err)
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		var got string
		if found, err := c.Get(ctx, key, &got); err != nil || !found || got != key {
			t.Errorf("get: got %q, %t, %v, want %q", got, found, err, key)
		}
		if deleted, err := c.Delete(ctx, key); err != nil || !deleted {
			t.Errorf("delete: got %t, %v, want true", deleted, err)
		}
	})
}

func FuzzDecode(f *testing.F) {
	for _, seed := range hostile {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		v := fastpgcache.Value(b)
		var text string
		var raw []byte
		var message json.RawMessage
		var value fastpgcache.Value
		for _, dest := range []any{&text, &raw, &message, &value, nil} {
			if err := v.Decode(dest); err != nil {
				t.Errorf("%T: %v", dest, err)
			}
		}
		for _, got := range []string{text, string(raw), string(message), string(value), v.String()} {
			if got != string(b) {
				t.Errorf("got %q, want %q", got, b)
			}
		}

		var got, want any
		if json.Unmarshal(b, &want) != nil {
			want = string(b)
		}
		if err := v.Decode(&got); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("any: got %#v, %v, want %#v", got, err, want)
		}

		type point struct{ X, Y int }
		var p, wantPoint point
		wantErr := json.Unmarshal(b, &wantPoint)
		if err := v.Decode(&p); (err == nil) != (wantErr == nil) || p != wantPoint {
			t.Errorf("struct: got %v, %v, want %v, %v", p, err, wantPoint, wantErr)
		}

		if len(b) > 0 { // what was decoded is the caller's own
			raw[0]++
			value[0]++
			message[0]++
			if v.String() != text {
				t.Error("dest shares the value's bytes")
			}
		}
	})
}

type (
	color    string
	shouting string
)

func (s *shouting) UnmarshalText(b []byte) error {
	*s = shouting(strings.ToUpper(string(b)))
	return nil
}

func TestAStringByAnotherNameIsAString(t *testing.T) {
	ctx := t.Context()
	c := newCache(t)
	if err := c.Set(ctx, "k", color("red"), 0); err != nil {
		t.Fatal(err)
	}
	var text string
	var named color
	for _, dest := range []any{&text, &named} {
		if _, err := c.Get(ctx, "k", dest); err != nil {
			t.Fatal(err)
		}
	}
	if text != "red" || named != "red" {
		t.Errorf("got %q and %q, want red", text, named)
	}
	if err := c.Set(ctx, "k", shouting("red"), 0); err != nil { // which has an unmarshaller: JSON both ways
		t.Fatal(err)
	}
	var loud shouting
	if _, err := c.Get(ctx, "k", &text); err != nil || text != `"red"` {
		t.Errorf("got %q, %v, want JSON", text, err)
	}
	if _, err := c.Get(ctx, "k", &loud); err != nil || loud != "RED" {
		t.Errorf("got %q, %v, want RED", loud, err)
	}
}

func TestADecodeErrorNamesTheKeyAndTheType(t *testing.T) {
	ctx := t.Context()
	c := newCache(t)
	if err := c.Set(ctx, "session:7", "no JSON", 0); err != nil {
		t.Fatal(err)
	}
	var n struct{ N int }
	found, err := c.Get(ctx, "session:7", &n)
	if !found || err == nil || !strings.Contains(err.Error(), `"session:7"`) || !strings.Contains(err.Error(), "*struct { N int }") {
		t.Errorf("got %t, %v, want an error with key and type", found, err)
	}
}

func TestAMissingKeysValueSaysSo(t *testing.T) {
	values := map[string]fastpgcache.Value{}
	var text string
	if err := values["k"].Decode(&text); err == nil || !strings.Contains(err.Error(), "the key was missing") {
		t.Errorf("got %v", err)
	}
	if err := (fastpgcache.Value{}).Decode(&text); err != nil {
		t.Errorf("an empty value: %v", err)
	}
}

func TestKeysAreUTF8WithoutNUL(t *testing.T) {
	for length := range 20 {
		for at := range length {
			for c := range 256 {
				b := bytes.Repeat([]byte{'\x7f'}, length)
				b[at] = byte(c)
				for _, s := range []string{string(b), "\u00fc" + string(b), string(b) + "\u00fc"} {
					if got, want := fastpgcache.CheckKey(s) == nil, utf8.ValidString(s) && !strings.Contains(s, "\x00"); got != want {
						t.Fatalf("%q: got %t, want %t", s, got, want)
					}
				}
			}
		}
	}
}
