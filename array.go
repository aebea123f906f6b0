package fastpgcache

import (
	"database/sql/driver"
	"encoding/binary"
	"encoding/hex"
	"strconv"
	"strings"
)

// array is a PostgreSQL array as a parameter. As a driver.Valuer it is the array's
// text form, which every driver takes. BinaryValue is the binary form, which costs
// neither side an escape: lib/pq asks for it with binary_parameters=yes. pgx makes
// that itself, of a slice.
type array interface {
	driver.Valuer
	BinaryValue() ([]byte, error)
	slice() any
}

// textArray is a text[].
type textArray []string

func (a textArray) size() (bytes int) {
	for _, s := range a {
		bytes += len(s)
	}
	return bytes
}

func (a textArray) Value() (driver.Value, error) {
	return arrayText(len(a), a.size(), func(b []byte, i int) []byte { return appendQuoted(b, a[i]) }), nil
}

func (a textArray) BinaryValue() ([]byte, error) {
	return arrayBinary(textOID, len(a), a.size(), func(b []byte, i int) []byte { return appendSized(b, a[i]) }), nil
}

func (a textArray) slice() any { return []string(a) }

// valueArray is the text[] of the column value, NULL where an entry is no text.
type valueArray []entry

func (a valueArray) size() (bytes int) {
	for i := range a {
		bytes += len(a[i].value.text)
	}
	return bytes
}

func (a valueArray) Value() (driver.Value, error) {
	return arrayText(len(a), a.size(), func(b []byte, i int) []byte {
		if !a[i].value.isText {
			return append(b, "NULL"...)
		}
		return appendQuoted(b, a[i].value.text)
	}), nil
}

func (a valueArray) BinaryValue() ([]byte, error) {
	return arrayBinary(textOID, len(a), a.size(), func(b []byte, i int) []byte {
		if !a[i].value.isText {
			return append(b, null...)
		}
		return appendSized(b, a[i].value.text)
	}), nil
}

func (a valueArray) slice() any {
	values := make([]*string, len(a))
	for i := range a {
		if a[i].value.isText {
			values[i] = &a[i].value.text
		}
	}
	return values
}

// valueBytesArray is the bytea[] of the column value_bytes, NULL where an entry is
// text, and empty, which unnest takes for as many NULLs, where all are.
type valueBytesArray []entry

func (a valueBytesArray) len() int {
	for i := range a {
		if !a[i].value.isText {
			return len(a)
		}
	}
	return 0
}

func (a valueBytesArray) size() (bytes int) {
	for i := range a {
		bytes += len(a[i].value.bytes)
	}
	return bytes
}

func (a valueBytesArray) Value() (driver.Value, error) {
	return arrayText(a.len(), 2*a.size(), func(b []byte, i int) []byte {
		if a[i].value.isText {
			return append(b, "NULL"...)
		}
		return append(hex.AppendEncode(append(b, `"\\x`...), a[i].value.bytes), '"')
	}), nil
}

func (a valueBytesArray) BinaryValue() ([]byte, error) {
	return arrayBinary(byteaOID, a.len(), a.size(), func(b []byte, i int) []byte {
		if a[i].value.isText {
			return append(b, null...)
		}
		return appendSized(b, a[i].value.bytes)
	}), nil
}

func (a valueBytesArray) slice() any {
	values := make([][]byte, a.len())
	for i := range values {
		if !a[i].value.isText {
			values[i] = a[i].value.bytes
		}
	}
	return values
}

// ttlArray is the bigint[] of TTLs in microseconds, NULL where there is none.
type ttlArray []entry

func (a ttlArray) Value() (driver.Value, error) {
	return arrayText(len(a), 8*len(a), func(b []byte, i int) []byte {
		if a[i].micros == noTTL {
			return append(b, "NULL"...)
		}
		return strconv.AppendInt(b, a[i].micros, 10)
	}), nil
}

func (a ttlArray) BinaryValue() ([]byte, error) {
	return arrayBinary(int8OID, len(a), 8*len(a), func(b []byte, i int) []byte {
		if a[i].micros == noTTL {
			return append(b, null...)
		}
		return binary.BigEndian.AppendUint64(append(b, 0, 0, 0, 8), uint64(a[i].micros))
	}), nil
}

func (a ttlArray) slice() any {
	ttls := make([]*int64, len(a))
	for i := range a {
		if a[i].micros != noTTL {
			ttls[i] = &a[i].micros
		}
	}
	return ttls
}

// arrayText is the text form of n elements, of some size in bytes in all
// (PostgreSQL's manual, section 8.15.2).
func arrayText(n, size int, element func(b []byte, i int) []byte) string {
	b := append(make([]byte, 0, 2+6*n+size), '{')
	for i := range n {
		if i > 0 {
			b = append(b, ',')
		}
		b = element(b, i)
	}
	return string(append(b, '}'))
}

func appendQuoted(b []byte, s string) []byte {
	b = append(b, '"')
	for {
		i := strings.IndexAny(s, `"\`)
		if i < 0 {
			return append(append(b, s...), '"')
		}
		b = append(append(append(b, s[:i]...), '\\'), s[i])
		s = s[i+1:]
	}
}

// OIDs of element types (PostgreSQL's pg_type.dat).
const (
	byteaOID = 17
	int8OID  = 20
	textOID  = 25
)

var null = []byte{0xff, 0xff, 0xff, 0xff}

// arrayBinary is the binary form of n elements, of size bytes in all: dimensions, a
// flag for NULLs, the element type, then the one dimension's length and lower bound,
// and each element behind its length (array_recv in PostgreSQL's arrayfuncs.c).
func arrayBinary(elementOID uint32, n, size int, element func(b []byte, i int) []byte) []byte {
	b := make([]byte, 0, 20+4*n+size)
	if n == 0 {
		return binary.BigEndian.AppendUint32(append(b, make([]byte, 8)...), elementOID)
	}
	b = binary.BigEndian.AppendUint32(b, 1)
	b = binary.BigEndian.AppendUint32(b, 1)
	b = binary.BigEndian.AppendUint32(b, elementOID)
	b = binary.BigEndian.AppendUint32(b, uint32(n))
	b = binary.BigEndian.AppendUint32(b, 1)
	for i := range n {
		b = element(b, i)
	}
	return b
}

func appendSized[T string | []byte](b []byte, s T) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
}
