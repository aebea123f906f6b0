package conninfo

import (
	"strings"
	"testing"
)

func TestErrorsShowNothingOfTheConnectionString(t *testing.T) {
	for _, variable := range []string{"PGHOST", "PGPORT", "PGSERVICE", "PGSSLMODE"} {
		t.Setenv(variable, "")
	}
	for _, dsn := range []string{
		"POSTGRES://u:s3cret@h/%zz", " postgres://u:s3cret@h:port/d", "postgres://u:s3cret@h:99999/d", "postgres://u:s3cret@h/d?sslmode=s3cret",
		"mysql://u:s3cret@h/d", "mysql://u:s3cret@h/d?a=b", "https://s3cret", "postgres//u:s3cret@h/d?x=y", "s3cret", "password=abc s3cret", "password=abc s3cret/x=y",
		"password='s3cret", `password=s3cret\`, "host=h port=s3cret", "host=h sslmode=s3cret", "host=h connect_timeout=s3cret", "hostaddr=s3cret",
		"postgres://u:s3cret@h/d?sslmode=%zz", "postgres://u:%s3cret@h/d", "postgres://u:s3cret@[::1/d", "p\x00s3cret=x", "postgres://u:s3 cret@h/d",
	} {
		cfg, err := Parse(dsn)
		if err == nil {
			t.Errorf("%q: taken, as %+v", dsn, cfg)
			continue
		}
		if text := err.Error(); strings.Contains(text, "s3") || strings.Contains(text, "cret") {
			t.Errorf("%q: %s", dsn, text)
		}
	}
}

func TestConnectionStringsAreTakenAsTheyAreMeant(t *testing.T) {
	for _, dsn := range []string{
		"POSTGRES://u:pw@h:5433/d?sslmode=require&work_mem=4MB", " postgresql://u:pw@h:5433/d?sslmode=require&work_mem=4MB\n",
		" host=h port=5433 user=u password=pw dbname=d sslmode=require work_mem=4MB ",
	} {
		cfg, err := Parse(dsn, "sslmode=verify-full", "binary_parameters=yes")
		if err != nil || cfg.Host != "h" || cfg.Port != 5433 || cfg.User != "u" || cfg.Password != "pw" || cfg.Database != "d" || cfg.SSLMode != "require" ||
			!cfg.BinaryParameters || cfg.Runtime["work_mem"] != "4MB" {
			t.Errorf("%q: %+v, %v", dsn, cfg, err)
		}
	}
}

func TestLocal(t *testing.T) {
	for dsn, want := range map[string]bool{
		"host=localhost": true, "host=127.0.0.1": true, "host=::1": true, "host=/tmp": true, "host=db.example.org": false, "host=10.0.0.1": false,
		"host=localhost hostaddr=10.0.0.1": false, "host=localhost,db": false, "host=db hostaddr=127.0.0.1": true,
	} {
		cfg, err := Parse(dsn)
		if err != nil || Local(cfg) != want {
			t.Errorf("%s: got %t, %v", dsn, !want, err)
		}
	}
}
