package fastpgcache

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"unicode/utf8"
)

// maxValueBytes bounds an encoded value: PostgreSQL sends a bytea in hex, and no
// message may pass 1 GiB.
const maxValueBytes = 256 << 20

// Value is the bytes of an entry, exactly as stored.
type Value []byte

// Decode fills dest as Cache.Get does.
func (v Value) Decode(dest any) error {
	if err := checkDest(dest); err != nil {
		return fmt.Errorf("fastpgcache: decode: %w", err)
	}
	if err := decode(v, dest); err != nil {
		return fmt.Errorf("fastpgcache: decode: %w", err)
	}
	return nil
}

// String returns the value as text.
func (v Value) String() string { return string(v) }

// encoded is a value as the table takes it: in its column value where it is
// text to PostgreSQL, in value_bytes where not.
type encoded struct {
	text   string
	bytes  []byte
	isText bool
}

// columns returns the arguments for value and value_bytes.
func (e encoded) columns() (value, valueBytes any) {
	if e.isText {
		return e.text, nil
	}
	return nil, e.bytes
}

// encode copies what it keeps of value: the caller may reuse its bytes.
func encode(value any) (encoded, error) {
	var b []byte
	switch v := value.(type) {
	case string:
		return encodeText(v)
	case []byte:
		b = v
	case json.RawMessage:
		b = v
	case Value:
		b = v
	default:
		var err error
		if b, err = json.Marshal(value); err != nil {
			return encoded{}, fmt.Errorf("encode value: %w", err)
		}
	}
	if err := checkSize(len(b)); err != nil { // before the copy
		return encoded{}, err
	}
	return encodeText(string(b))
}

func encodeText(s string) (encoded, error) {
	if err := checkSize(len(s)); err != nil {
		return encoded{}, err
	}
	if isText(s) {
		return encoded{text: s, isText: true}, nil
	}
	return encoded{bytes: []byte(s)}, nil
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

// decode fills dest, checked by checkDest, with a copy of the value.
func decode(v []byte, dest any) error {
	switch d := dest.(type) {
	case nil:
	case *string:
		*d = string(v)
	case *[]byte:
		*d = append([]byte{}, v...)
	case *json.RawMessage:
		*d = append(json.RawMessage{}, v...)
	case *Value:
		*d = append(Value{}, v...)
	case *any:
		// Not into d itself: json follows a pointer that it holds.
		var parsed any
		if json.Unmarshal(v, &parsed) != nil {
			parsed = string(v)
		}
		*d = parsed
	default:
		if err := json.Unmarshal(v, dest); err != nil {
			return fmt.Errorf("decode value: %w", err)
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
	case !isText(key):
		return fmt.Errorf("%w: it is not UTF-8 without NUL bytes", ErrInvalidKey)
	}
	return nil
}

// maxKeyBytes keeps a user label and a key together within what an entry of a
// PostgreSQL B-tree may hold, a third of a page.
const maxKeyBytes = 1024
