package main

import (
	"context"
	"slices"
	"time"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

var settingsScenarios = []scenario{
	{name: "timeouts of PostgreSQL", run: timeouts,
		what: "statement_timeout, lock_timeout, idle_in_transaction_session_timeout, idle_session_timeout and the rest, short, for the role, while locks are held that they run into."},
	{name: "isolation levels", run: isolationLevels,
		what: "Every level as the role's default, and read-only transactions. Serialization failures are retried: but for read-only, there are no errors."},
	{name: "odd role settings", run: oddSettings,
		what: "Settings that change what SQL means or how it is planned, one after the other. No answer changes, and nothing fails."},
}

// set gives the role a setting, for all its sessions from now on; nothing, to take it away.
func (t *trial) set(setting, value string) error {
	statement := `ALTER ROLE app RESET ALL`
	if setting != "" {
		statement = `ALTER ROLE app SET ` + setting + ` = ` + value
	}
	return t.exec(statement, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'`)
}

// settings tries one setting after the other, calls during while it holds, and judges the
// errors that came.
func (t *trial) settings(all [][2]string, during func(setting [2]string, round int) error) error {
	if err := t.start(pgtest.Config{}); err != nil {
		return err
	}
	if err := t.usual(t.dsn()); err != nil {
		return err
	}
	return t.each(3*len(all), func(round int) error {
		s := all[round%len(all)]
		if err := t.set(s[0], s[1]); err != nil {
			return err
		}
		// Sessions are killed by ourselves; in his transaction a caller is on his own.
		killed := []string{"57P01", "connection", "WithTx 57P01", "WithTx connection", "WithTx 40001", "WithTx 40P01"}
		before := t.errorsBut(killed...)
		time.Sleep(time.Second)
		if err := during(s, round); err != nil {
			return err
		}
		if expected := s[0] == "default_transaction_read_only" || s[0] == "row_security" || bringsErrors[s[0]]; !expected {
			if n := t.errorsBut(killed...) - before; n > 0 {
				t.failf("%s = %s: %d errors", s[0], s[1], n)
			}
		}
		return t.set("", "")
	})
}

// bringsErrors are settings that bring errors.
var bringsErrors = map[string]bool{"statement_timeout": true, "lock_timeout": true, "idle_in_transaction_session_timeout": true, "idle_session_timeout": true,
	"extra_float_digits": true, "transaction_timeout": true, "deadlock_timeout": true, "tcp_user_timeout": true, "client_connection_check_interval": true}

func (t *trial) errorCount() int64 { return t.errorsBut() }

// errorsBut counts the errors of other kinds.
func (t *trial) errorsBut(kinds ...string) (n int64) {
	t.result.mu.Lock()
	defer t.result.mu.Unlock()
	for kind, count := range t.result.Errors {
		if !slices.Contains(kinds, kind) {
			n += count
		}
	}
	return n
}

func timeouts(t *trial) error {
	all := [][2]string{{"statement_timeout", "'20ms'"}, {"lock_timeout", "'20ms'"}, {"idle_in_transaction_session_timeout", "'20ms'"},
		{"idle_session_timeout", "'20ms'"}, {"deadlock_timeout", "'1ms'"}, {"tcp_user_timeout", "'100ms'"}, {"client_connection_check_interval", "'10ms'"}}
	return t.settings(all, func([2]string, int) error {
		for range 5 {
			tx, err := t.admin.Begin()
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			_, err = tx.ExecContext(ctx, `LOCK TABLE cache`)
			cancel()
			if err == nil {
				time.Sleep(60 * time.Millisecond)
			}
			tx.Rollback()
			time.Sleep(100 * time.Millisecond)
		}
		return nil
	})
}

func isolationLevels(t *trial) error {
	all := [][2]string{{"default_transaction_isolation", "'serializable'"}, {"default_transaction_isolation", "'repeatable read'"},
		{"default_transaction_isolation", "'read uncommitted'"}, {"default_transaction_isolation", "'read committed'"},
		{"default_transaction_deferrable", "on"}, {"default_transaction_read_only", "on"}}
	return t.settings(all, func([2]string, int) error { return nil })
}

func oddSettings(t *trial) error {
	all := [][2]string{{"search_path", "'nowhere'"}, {"search_path", "''"}, {"DateStyle", "'German, DMY'"}, {"IntervalStyle", "'iso_8601'"}, {"TimeZone", "'Asia/Kathmandu'"},
		{"bytea_output", "'escape'"}, {"standard_conforming_strings", "off"}, {"backslash_quote", "off"}, {"array_nulls", "off"}, {"extra_float_digits", "'-15'"},
		{"transform_null_equals", "on"}, {"quote_all_identifiers", "on"}, {"plan_cache_mode", "'force_generic_plan'"}, {"plan_cache_mode", "'force_custom_plan'"},
		{"enable_indexscan", "off"}, {"enable_seqscan", "off"}, {"enable_nestloop", "off"}, {"work_mem", "'64kB'"}, {"jit_above_cost", "0"}, {"lc_numeric", "'C'"},
		{"geqo_threshold", "2"}, {"synchronous_commit", "on"}, {"row_security", "off"}, {"track_activities", "off"}, {"constraint_exclusion", "on"},
		{"default_table_access_method", "'heap'"}, {"gin_fuzzy_search_limit", "1"}, {"xmloption", "'document'"}, {"client_min_messages", "'debug5'"}, {"debug_print_plan", "on"}}
	return t.settings(all, func([2]string, int) error { return nil })
}
