// Package migratetest sets the cache up with the tools that services have for migrations.
package migratetest

import (
	"database/sql"
	"os"
	"testing"
	"testing/fstest"

	"github.com/golang-migrate/migrate/v4"
	"github.com/golang-migrate/migrate/v4/database"
	"github.com/golang-migrate/migrate/v4/database/pgx/v5"
	"github.com/golang-migrate/migrate/v4/database/postgres"
	"github.com/golang-migrate/migrate/v4/source/iofs"
	"github.com/pressly/goose/v3"

	"github.com/fastpgcache/fastpgcache"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

// tools run one migration, of the driver's pool.
var tools = map[string]struct {
	driver string
	run    func(t *testing.T, db *sql.DB, text string) error
}{
	"goose": {"postgres", func(t *testing.T, db *sql.DB, text string) error {
		files := fstest.MapFS{"00001_cache.sql": {Data: []byte(text)}}
		provider, err := goose.NewProvider(goose.DialectPostgres, db, files)
		if err != nil {
			return err
		}
		_, err = provider.Up(t.Context())
		return err
	}},
	"golang-migrate, lib/pq": {"postgres", func(t *testing.T, db *sql.DB, text string) error {
		driver, err := postgres.WithInstance(db, &postgres.Config{})
		if err != nil {
			return err
		}
		return golangMigrate(driver, text)
	}},
	"golang-migrate, pgx": {"pgx", func(t *testing.T, db *sql.DB, text string) error {
		driver, err := pgx.WithInstance(db, &pgx.Config{})
		if err != nil {
			return err
		}
		return golangMigrate(driver, text)
	}},
}

func golangMigrate(driver database.Driver, text string) error {
	files, err := iofs.New(fstest.MapFS{"1_cache.up.sql": {Data: []byte(text)}}, ".")
	if err != nil {
		return err
	}
	m, err := migrate.NewWithInstance("iofs", files, "postgres", driver)
	if err != nil {
		return err
	}
	return m.Up()
}

func TestEveryToolSetsUp(t *testing.T) {
	file, err := os.ReadFile("../migrations.sql")
	if err != nil {
		t.Fatal(err)
	}
	for name, tool := range tools {
		for _, what := range []string{"the file", "what sql prints"} {
			t.Run(name+", "+what, func(t *testing.T) {
				t.Parallel()
				admin := pgtest.Database(t)
				login, stranger := pgtest.Role(t, admin), pgtest.Role(t, admin)
				text, schema, err := string(file), "public", error(nil)
				if what != "the file" {
					schema = "cache $1"
					if text, err = fastpgcache.MigrationSQL(fastpgcache.SetupConfig{Schema: schema, Grantee: login}); err != nil {
						t.Fatal(err)
					}
				}
				db := open(t, tool.driver, admin)
				if err := tool.run(t, db, text); err != nil {
					t.Fatal(err)
				}
				for user, may := range map[string]bool{login: true, stranger: what == "the file"} {
					cache, err := fastpgcache.New(open(t, "postgres", pgtest.WithUser(admin, user)), fastpgcache.Config{Schema: schema})
					if err != nil {
						t.Fatal(err)
					}
					defer cache.Close()
					if err := cache.Set(t.Context(), "k", "v", 0); (err == nil) != may {
						t.Errorf("a login stored an entry: %v, want it to be let: %t", err, may)
					}
				}
			})
		}
	}
}

func open(t *testing.T, driver, dsn string) *sql.DB {
	t.Helper()
	db, err := sql.Open(driver, dsn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}
