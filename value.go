package fastpgcache

import (
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"unicode/utf8"
)

// maxValueBytes bounds an encoded value: PostgreSQL sends a bytea in hex, and no
// message may pass 1 GiB.
const maxValueBytes = 256 << 20

// Value is the bytes of an entry, exactly as stored.
type Value []byte

// Decode fills dest as Cache.Get does. A nil Value, which GetMany's map gives for a key that
// it lacks, is an error.
func (v Value) Decode(dest any) error {
	if v == nil {
		return prefixed("decode", errors.New("there is no value: the key was missing"))
	}
	if err := checkDest(dest); err != nil {
		return prefixed("decode", err)
	}
	if err := (stored{bytes: v}).decode(dest); err != nil {
		return prefixed("decode", err)
	}
	return nil
}

// String returns the value as text.
func (v Value) String() string { return string(v) }

// stored is a value as the table holds it: in the column value where it is text to
// PostgreSQL, in value_bytes where not.
type stored struct {
	text   string
	bytes  []byte
	isText bool
}

// encode copies what it keeps of value: the caller may reuse its bytes.
func encode(value any) (stored, error) {
	var b []byte
	switch v := value.(type) {
	case string:
		return store(v)
	case []byte:
		b = v
	case json.RawMessage:
		b = v
	case Value:
		b = v
	default:
		if isString(reflect.TypeOf(value)) {
			return store(reflect.ValueOf(value).String())
		}
		var err error
		if b, err = json.Marshal(value); err != nil {
			return stored{}, fmt.Errorf("encode value: %w", err)
		}
	}
	if err := checkSize(len(b)); err != nil { // before the copy
		return stored{}, err
	}
	return store(string(b))
}

// isString reports whether t is a string by another name, without a marshaller of its
// own in either direction.
func isString(t reflect.Type) bool {
	if t == nil || t.Kind() != reflect.String {
		return false
	}
	p := reflect.PointerTo(t) // whose methods include those of t
	for _, marshals := range marshallers {
		if p.Implements(marshals) {
			return false
		}
	}
	return true
}

var marshallers = []reflect.Type{
	reflect.TypeFor[json.Marshaler](), reflect.TypeFor[encoding.TextMarshaler](),
	reflect.TypeFor[json.Unmarshaler](), reflect.TypeFor[encoding.TextUnmarshaler](),
}

func store(s string) (stored, error) {
	if err := checkSize(len(s)); err != nil {
		return stored{}, err
	}
	if isText(s) {
		return stored{text: s, isText: true}, nil
	}
	return stored{bytes: []byte(s)}, nil
}

// arguments returns the columns value and value_bytes.
func (s stored) arguments() (value, valueBytes any) {
	if s.isText {
		return s.text, nil
	}
	return nil, s.bytes
}

// fromColumns makes a value of what a driver gave for value and value_bytes; ok is
// false if both are NULL.
func fromColumns(value, valueBytes any) (s stored, ok bool) {
	if value == nil {
		value = valueBytes
	}
	switch v := value.(type) {
	case string:
		return stored{text: v, isText: true}, true
	case []byte:
		return stored{bytes: v}, true
	}
	return stored{}, false
}

func (s stored) len() int { return len(s.text) + len(s.bytes) }

// value returns the bytes, not shared with anybody.
func (s stored) value() Value {
	if s.isText {
		return Value(s.text)
	}
	return append(Value{}, s.bytes...)
}

func (s stored) string() string {
	if s.isText {
		return s.text
	}
	return string(s.bytes)
}

func checkSize(n int) error {
	if n > maxValueBytes {
		return fmt.Errorf("%w: %d bytes, at most %d", ErrValueTooLarge, n, maxValueBytes)
	}
	return nil
}

// isText reports whether PostgreSQL can hold s as text.
func isText(s string) bool {
	return utf8.ValidString(s) && strings.IndexByte(s, 0) < 0
}

// checkDest refuses, before anything is sent, a dest that nothing could be
// decoded into.
func checkDest(dest any) error {
	switch d := dest.(type) {
	case nil:
		return nil
	case *string:
		if d != nil {
			return nil
		}
	case *[]byte:
		if d != nil {
			return nil
		}
	default:
		if v := reflect.ValueOf(dest); v.Kind() == reflect.Pointer && !v.IsNil() {
			return nil
		}
	}
	return fmt.Errorf("dest is %T: want a pointer that is not nil, or nil", dest)
}

// decode fills dest, checked by checkDest, and shares no bytes with it.
func (s stored) decode(dest any) error {
	switch d := dest.(type) {
	case nil:
	case *string:
		*d = s.string()
	case *[]byte:
		*d = s.value()
	case *json.RawMessage:
		*d = json.RawMessage(s.value())
	case *Value:
		*d = s.value()
	case *any:
		// Not into d itself: json follows a pointer that it holds.
		var parsed any
		if json.Unmarshal(s.value(), &parsed) != nil {
			parsed = s.string()
		}
		*d = parsed
	default:
		if v := reflect.ValueOf(dest).Elem(); isString(v.Type()) {
			v.SetString(s.string())
		} else if err := json.Unmarshal(s.value(), dest); err != nil {
			return fmt.Errorf("decode into %T: %w", dest, err)
		}
	}
	return nil
}

// checkKey applies the rule for keys and user labels.
func checkKey(key string) error {
	switch {
	case key == "":
		return fmt.Errorf("%w: it is empty", ErrInvalidKey)
	case len(key) > maxKeyBytes:
		return fmt.Errorf("%w: %d bytes, at most %d", ErrInvalidKey, len(key), maxKeyBytes)
	case !isASCII(key) && !isText(key):
		return fmt.Errorf("%w: it is not UTF-8 without NUL bytes", ErrInvalidKey)
	}
	return nil
}

// isASCII reports whether s is of the bytes 1 to 127, as most keys are. It looks at eight
// at once: none has its highest bit, nor gets it by taking 1 away, as a 0 would. Of a key
// isText takes twice as long, a tenth of an answer from memory; of a long value less.
func isASCII(s string) bool {
	const ones, highest = 0x0101010101010101, 0x8080808080808080
	for ; len(s) >= 8; s = s[8:] {
		w := uint64(s[0]) | uint64(s[1])<<8 | uint64(s[2])<<16 | uint64(s[3])<<24 |
			uint64(s[4])<<32 | uint64(s[5])<<40 | uint64(s[6])<<48 | uint64(s[7])<<56 // one load
		if (w|(w-ones))&highest != 0 {
			return false
		}
	}
	for i := range len(s) {
		if s[i] == 0 || s[i] > 127 {
			return false
		}
	}
	return true
}

// shorten quotes a key for an error.
func shorten(key string) string {
	const most = 64
	if len(key) > most {
		return strconv.Quote(key[:most]) + "..."
	}
	return strconv.Quote(key)
}

// maxKeyBytes keeps a user label and a key together within what an entry of a
// PostgreSQL B-tree may hold, a third of a page.
const maxKeyBytes = 1024
