package conformance

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
	"unsafe"

	"github.com/fastpgcache/fastpgcache"
)

var valueTests = []test{
	{name: "EveryDestIsFilled", run: testDests},
	{name: "AMissLeavesDestAlone", run: testMissLeavesDest},
	{name: "WhatDoesNotDecodeIsFoundAndAnError", run: testUndecodable},
	{name: "AWrongDestIsRefusedBeforeAnyQuery", run: testWrongDest, lone: true},
	{name: "ABadKeyIsRefusedBeforeAnyQuery", run: testBadKeys, lone: true},
	{name: "WhatCannotBeEncodedIsRefusedBeforeAnyQuery", run: testUnencodable, lone: true},
	{name: "MoreThan256MiBIsErrValueTooLarge", run: testTooLarge, once: true},
	{name: "CallerMayReuseItsBytes", run: testReuse},
	{name: "TextIsStoredAsTextAndTheRestAsBytes", run: testColumns},
	{name: "TheLongestKeysWork", run: testLongestKeys, lone: true},
	{name: "AdversarialKeysAndValuesComeBackByteForByte", run: testAdversarial},
	{name: "TenMegabytesComeBackByteForByte", run: testTenMegabytes, once: true},
	{name: "AnOverwriteReplacesValueAndKind", run: testOverwrite},
}

func ptr[T any](v T) *T { return &v }

type point struct{ X, Y int }

func testDests(s *suite, t *testing.T) {
	c := s.cache(t)
	type text string
	for i, tt := range []struct {
		value any
		dest  any // pointer to what is there before
		want  any
	}{
		{"text", ptr("old"), "text"},
		{"text", ptr([]byte("old")), []byte("text")},
		{"text", ptr(json.RawMessage("old")), json.RawMessage("text")},
		{"text", ptr(fastpgcache.Value("old")), fastpgcache.Value("text")},
		{"text", ptr(any("old")), any("text")},
		{[]byte("\x00\xff"), ptr("old"), "\x00\xff"},
		{[]byte("\x00\xff"), ptr([]byte("old")), []byte("\x00\xff")},
		{[]byte("\x00\xff"), ptr(fastpgcache.Value("old")), fastpgcache.Value("\x00\xff")},
		{[]byte("\x00\xff"), ptr(any("old")), any("\x00\xff")},
		{"", ptr("old"), ""},
		{"", ptr([]byte("old")), []byte{}},
		{"", ptr(any("old")), any("")},
		{[]byte(nil), ptr([]byte("old")), []byte{}},
		{json.RawMessage(`{"X": 1}`), ptr(json.RawMessage("old")), json.RawMessage(`{"X": 1}`)},
		{fastpgcache.Value("v"), ptr("old"), "v"},
		{json.RawMessage(`{"X": 1}`), ptr(any("old")), any(map[string]any{"X": 1.0})},
		{json.RawMessage(`{"X": 1}`), ptr(any(&point{Y: 2})), any(map[string]any{"X": 1.0})},
		{json.RawMessage(`{"X": 1}`), &point{X: 5, Y: 2}, point{X: 1, Y: 2}},
		{`[1, "a", null]`, ptr(any("old")), any([]any{1.0, "a", nil})},
		{"42", ptr(0), 42},
		{"42", ptr("old"), "42"},
		{"null", ptr(any("old")), nil},
		{"null", ptr(ptr(1)), (*int)(nil)},
		{point{1, 2}, ptr(point{}), point{1, 2}},
		{&point{1, 2}, ptr(&point{}), &point{1, 2}},
		{point{1, 2}, ptr("old"), `{"X":1,"Y":2}`},
		{[]int{1, 2}, ptr([]int{9}), []int{1, 2}},
		{map[string]int{"a": 1}, ptr(map[string]int{}), map[string]int{"a": 1}},
		{nil, ptr("old"), "null"},
		{nil, ptr(any("old")), nil},
		{true, ptr(false), true},
		{int64(math.MaxInt64), ptr(int64(0)), int64(math.MaxInt64)},
		{1.5, ptr(0.0), 1.5},
		{text("named"), ptr("old"), "named"},
		{text("named"), ptr(text("old")), text("named")},
		{time.Unix(1, 5).UTC(), ptr(time.Time{}), time.Unix(1, 5).UTC()},
		{json.Number("12345678901234567890"), ptr(json.Number("")), json.Number("12345678901234567890")},
		{"1e999", ptr(any("old")), any("1e999")}, // JSON, but no Go number
	} {
		key := fmt.Sprint(i)
		mustSet(t, c, key, tt.value, time.Hour)
		found, err := c.Get(bounded(t), key, tt.dest)
		if got := reflect.ValueOf(tt.dest).Elem().Interface(); err != nil || !found || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("set %#v, got %#v, %t, %v, want %#v", tt.value, got, found, err, tt.want)
		}
		if found, err := c.Get(bounded(t), key, nil); err != nil || !found {
			t.Errorf("nil dest: got %t, %v", found, err)
		}
	}
}

func testMissLeavesDest(s *suite, t *testing.T) {
	c := s.cache(t)
	for _, tt := range []struct{ dest, want any }{
		{ptr("old"), ptr("old")},
		{ptr([]byte("old")), ptr([]byte("old"))},
		{ptr(json.RawMessage("old")), ptr(json.RawMessage("old"))},
		{ptr(fastpgcache.Value("old")), ptr(fastpgcache.Value("old"))},
		{ptr(any("old")), ptr(any("old"))},
		{&point{1, 2}, &point{1, 2}},
		{nil, nil},
	} {
		if found, err := c.Get(bounded(t), "absent", tt.dest); err != nil || found {
			t.Errorf("got %t, %v, want a miss", found, err)
		}
		if !reflect.DeepEqual(tt.dest, tt.want) {
			t.Errorf("got dest %#v, want %#v", tt.dest, tt.want)
		}
	}
}

func testUndecodable(s *suite, t *testing.T) {
	c := s.cache(t)
	for _, value := range []string{"", "no JSON", `{"X": "text"}`, "\x00", "{", "[1]"} {
		mustSet(t, c, "k", value, time.Hour)
		var dest point
		found, err := c.Get(bounded(t), "k", &dest)
		if !found {
			t.Errorf("%q: got a miss, want found", value)
		}
		wantForm(t, "get", err)
		wantHit(t, c, "k", value)
	}
	mustSet(t, c, "k", `{"X": "text"}`, time.Hour)
	_, err := c.Get(bounded(t), "k", &point{})
	var cause *json.UnmarshalTypeError
	if !errors.As(err, &cause) {
		t.Errorf("got %v, want it to wrap encoding/json's error", err)
	}
}

func testWrongDest(s *suite, t *testing.T) {
	c, connector := s.offline(t)
	for _, dest := range []any{
		"text", 1, point{}, []byte{}, map[string]int{}, fastpgcache.Value{}, func() {}, make(chan int),
		(*string)(nil), (*[]byte)(nil), (*json.RawMessage)(nil), (*fastpgcache.Value)(nil), (*any)(nil), (*point)(nil),
	} {
		found, err := c.Get(bounded(t), "k", dest)
		wantForm(t, "get", err)
		if found {
			t.Errorf("%T: got found", dest)
		}
	}
	wantUntried(t, connector)
}

func wantUntried(t *testing.T, connector *offlineConnector) {
	t.Helper()
	if n := connector.tried.Load(); n != 0 {
		t.Errorf("got %d attempts to connect, want none", n)
	}
}

func testBadKeys(s *suite, t *testing.T) {
	c, connector := s.offline(t)
	for _, key := range []string{
		"", "a\x00b", "\x00", "\xff", "a\xc3", "\xed\xa0\x80" /* a surrogate */, "\xc0\x80", /* an overlong NUL */
		strings.Repeat("k", 1025), strings.Repeat("é", 513), strings.Repeat("k", 1<<20),
	} {
		for _, op := range operations() {
			if !op.keyed {
				continue
			}
			_, err := op.run(bounded(t), c, key)
			wantError(t, op.name, err, fastpgcache.ErrInvalidKey)
			if len(err.Error()) > 500 {
				t.Errorf("%s: the error is %d bytes long", op.name, len(err.Error()))
			}
		}
	}
	wantUntried(t, connector)
	if _, err := c.Exists(bounded(t), "good"); !errors.Is(err, errOffline) || connector.tried.Load() == 0 {
		t.Errorf("good key: got %v, want it to have tried the server", err)
	}
}

type unencodable struct{}

var errUnencodable = errors.New("cannot be encoded")

func (unencodable) MarshalJSON() ([]byte, error) { return nil, errUnencodable }

func testUnencodable(s *suite, t *testing.T) {
	c, connector := s.offline(t)
	type ring struct{ Next *ring }
	loop := new(ring)
	loop.Next = loop
	for _, value := range []any{make(chan int), func() {}, math.NaN(), math.Inf(1), complex(1, 1), loop, unencodable{}} {
		wantForm(t, "set", c.Set(bounded(t), "k", value, 0))
	}
	wantError(t, "set", c.Set(bounded(t), "k", unencodable{}, 0), errUnencodable)
	wantUntried(t, connector)
}

func testTooLarge(s *suite, t *testing.T) {
	c, connector := s.offline(t)
	zeros := make([]byte, 256<<20+1) // never touched, so that no memory stands behind it
	value := unsafe.String(unsafe.SliceData(zeros), len(zeros))
	wantError(t, "set", c.Set(bounded(t), "k", value, 0), fastpgcache.ErrValueTooLarge)
	wantError(t, "set", c.Set(bounded(t), "k", zeros, 0), fastpgcache.ErrValueTooLarge)
	wantUntried(t, connector)
}

func testReuse(s *suite, t *testing.T) {
	c := s.cache(t)
	for _, want := range []string{"text", "\x00binary"} {
		mine := []byte(want)
		mustSet(t, c, "k", mine, 0)
		clear(mine)
		var got []byte
		if _, err := c.Get(bounded(t), "k", &got); err != nil || string(got) != want {
			t.Errorf("got %q, %v, want %q", got, err, want)
		}
		clear(got)
		wantHit(t, c, "k", want)
	}
}

func testColumns(s *suite, t *testing.T) {
	c := s.cache(t)
	user := one[string](t, c.DB(), `SELECT current_user`)
	for _, value := range []string{"", "text", "ключ🔑", "a\x00b", "\xff", "\xed\xa0\x80"} {
		mustSet(t, c, "k", value, 0)
		var text *string
		var binary []byte
		row := s.admin.QueryRow(`SELECT value, value_bytes FROM `+s.union(`SELECT value, value_bytes FROM {schema}.cache WHERE user_id = $1 AND key = 'k'`), user)
		if err := row.Scan(&text, &binary); err != nil {
			t.Fatal(err)
		}
		if isText := utf8.ValidString(value) && !strings.Contains(value, "\x00"); isText {
			if text == nil || *text != value || binary != nil {
				t.Errorf("%q: got value %v, value_bytes %q", value, text, binary)
			}
		} else if text != nil || string(binary) != value {
			t.Errorf("%q: got value %v, value_bytes %q", value, text, binary)
		}
	}
}

func testLongestKeys(s *suite, t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	random := func() string { // incompressible, for an index entry has its limit
		b := make([]byte, 1024)
		for i := range b {
			b[i] = byte('!' + r.IntN('~'-'!'))
		}
		return string(b)
	}
	dsn, role := s.role(t)
	s.exec(t, `ALTER ROLE `+role+` BYPASSRLS`)
	c := s.open(t, dsn, asUser(random()))
	for _, key := range []string{random(), random(), strings.Repeat("🔑", 256)} {
		mustSet(t, c, key, key, time.Hour)
		wantHit(t, c, key, key)
	}
}

// adversarial is the i-th hostile string.
func adversarial(r *rand.Rand, i int) string {
	pieces := []string{
		"'", `"`, `\`, `''`, `\'`, `\x`, `\000`, "`", "$1", "$$", "%", "_", `\%`, `%s`, "{", "}", "{}", ",", "(", ")", ";", "--", "/*", "NULL", "null",
		"\x00", "\xff", "\xfe\xff", "\xc3", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xc0\x80",
		"\U0001F511", "\U0010FFFF", "\uFFFD", "\uFEFF", "\u200F", "\u202E", "\u2066", "e\u0301", "é", "ß", "İ", "ı", "Ω", "שלום",
		" ", "\t", "\n", "\r\n", "\v", "\x01", "\x7f", "\u0085", "\u00a0", "\u2028",
		"true", "0", "-1", "1e999", `{"a":1}`, `"\u0000"`, "a", "A", "E'", "{schema}", "{user}", "crowd", "\\x6162",
	}
	if i < len(pieces) {
		return pieces[i]
	}
	var b strings.Builder
	for range r.IntN(12) {
		b.WriteString(pieces[r.IntN(len(pieces))])
	}
	if r.IntN(20) == 0 {
		for range r.IntN(1200) {
			b.WriteByte(byte(r.Uint32()))
		}
	}
	return b.String()
}

func testAdversarial(s *suite, t *testing.T) {
	cases := 1000
	if !s.cfg.DisablePrepare || s.callers > 0 { // unprepared, a driver may have to quote them
		cases = 200
	}
	c := s.cache(t)
	r := rand.New(rand.NewPCG(3, 4))
	stored := make(map[string]string)
	for i := range cases {
		key, value := adversarial(r, i), adversarial(r, cases-i)
		err := c.Set(bounded(t), key, value, time.Hour)
		if valid := key != "" && len(key) <= 1024 && utf8.ValidString(key) && strings.IndexByte(key, 0) < 0; !valid {
			wantError(t, "set", err, fastpgcache.ErrInvalidKey)
			continue
		}
		if err != nil {
			t.Fatalf("set %q to %q: %v", key, value, err)
		}
		stored[key] = value
	}
	if len(stored) < cases/4 {
		t.Errorf("got %d keys stored of %d: this test sees too little", len(stored), cases)
	}
	for key, want := range stored {
		wantHit(t, c, key, want)
	}
	for key := range stored {
		if deleted, err := c.Delete(bounded(t), key); err != nil || !deleted {
			t.Errorf("delete %q: got %t, %v, want true", key, deleted, err)
		}
	}
}

func testTenMegabytes(s *suite, t *testing.T) {
	c := s.cache(t)
	binary := make([]byte, 10<<20)
	r := rand.NewChaCha8([32]byte{})
	r.Read(binary)
	for _, want := range [][]byte{binary, bytes.Repeat([]byte("мегабайт"), 1<<16)} {
		mustSet(t, c, "k", want, 0)
		var got []byte
		if found, err := c.Get(bounded(t), "k", &got); err != nil || !found || !bytes.Equal(got, want) {
			t.Errorf("got %d bytes, %t, %v, want the %d that were set", len(got), found, err, len(want))
		}
	}
}

func testOverwrite(s *suite, t *testing.T) {
	c := s.cache(t)
	for _, value := range []string{"text", "\x00binary", "", "\xff", "text"} {
		mustSet(t, c, "k", value, 0)
		wantHit(t, c, "k", value)
	}
}
