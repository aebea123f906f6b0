package conninfo

import (
	"strings"
	"testing"
)

// FuzzParse gives Parse strings with a secret in them: it does not panic, and no error
// shows the secret.
func FuzzParse(f *testing.F) {
	for _, seed := range [][2]string{
		{"host=h user=u password=", " dbname=d"}, {"postgres://u:", "@h:5432/d"}, {"POSTGRESQL://u:", "@[::1]/d?sslmode=require"}, {"password='", "'"}, {"password='", ""},
		{"postgres://%zz:", "@h"}, {"postgres://u:p@h/d?options=-c%20x=", "&port=many"}, {"host=h port=", ""}, {"options='-c x=", "' sslmode=maybe"}, {"", ""}, {"=", "="}, {"a b", "c"},
	} {
		f.Add(seed[0], seed[1])
	}
	const secret = "s3cr3t-t0k3n"
	f.Fuzz(func(t *testing.T, before, after string) {
		if strings.Contains(before+after, secret) {
			return
		}
		_, err := Parse(before+secret+after, "binary_parameters=yes")
		if err != nil && strings.Contains(err.Error(), secret) {
			t.Errorf("%q: the error shows it: %v", before+secret+after, err)
		}
	})
}
