package fastpgcache

import (
	"database/sql"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/fastpgcache/fastpgcache/internal/pgtest"
)

// In a database where PUBLIC may create in public, anybody can put a function or an
// operator there that fits a call better than PostgreSQL's own, if that takes its
// operands only after a cast. So no call of ours needs one: neither in the statements of
// this package, nor in the functions, whose search path is fixed besides. SQL-NOTES 22.
func TestEveryCallFitsItsOperands(t *testing.T) {
	t.Parallel()
	dsn := pgtest.Database(t)
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	db.SetMaxOpenConns(1)
	if err := Setup(t.Context(), db, SetupConfig{}); err != nil {
		t.Fatal(err)
	}
	texts := map[string]string{}
	for _, label := range []string{"", "label"} {
		c, err := New(db, Config{User: label})
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range c.statements.all {
			texts[fmt.Sprintf("%s, label %q", s.text, label)] = s.text
		}
	}
	check := func(name, prepared string) {
		t.Helper()
		if _, err := db.Exec(`PREPARE p AS ` + prepared); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var types, tree string
		if err := db.QueryRow(`SELECT array_to_string(parameter_types, ', ') FROM pg_prepared_statements WHERE name = 'p'`).Scan(&types); err != nil {
			t.Fatal(err)
		}
		if _, err := db.Exec(`DEALLOCATE p`); err != nil {
			t.Fatal(err)
		}
		tree = treeOf(t, db, types, prepared)
		if calls, coerced := coercions(t, db, tree); len(coerced) > 0 {
			t.Errorf("%s: %d calls, coerced for %q", name, calls, coerced)
		}
	}
	for name, text := range texts {
		check(name, text)
	}
	// Functions in SQL, whose parameters have names. (Those in plpgsql are parsed when they
	// run, with their own search path.)
	rows, err := db.Query(`SELECT proname, pg_get_function_identity_arguments(oid), prosrc FROM pg_proc
		WHERE pronamespace = 'public'::regnamespace AND prolang = (SELECT oid FROM pg_language WHERE lanname = 'sql')`)
	if err != nil {
		t.Fatal(err)
	}
	functions := map[string][2]string{}
	for rows.Next() {
		var name, arguments, body string
		if err := rows.Scan(&name, &arguments, &body); err != nil {
			t.Fatal(err)
		}
		functions[name] = [2]string{arguments, strings.TrimRight(body, "; \n")}
	}
	if err := rows.Err(); err != nil || len(functions) == 0 {
		t.Fatal(functions, err)
	}
	trees := map[string]string{}
	for name, f := range functions {
		trees[name] = treeOf(t, db, f[0], f[1])
	}
	// Policies, checks, triggers and defaults.
	rows, err = db.Query(`SELECT * FROM (SELECT 'policy' || oid, polqual::text FROM pg_policy
		UNION ALL SELECT conname, conbin::text FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND contype = 'c'
		UNION ALL SELECT tgname, tgqual::text FROM pg_trigger WHERE NOT tgisinternal
		UNION ALL SELECT concat(adrelid::regclass, adnum), adbin::text FROM pg_attrdef) x(name, tree) WHERE tree IS NOT NULL`)
	if err != nil {
		t.Fatal(err)
	}
	for rows.Next() {
		var name, tree string
		if err := rows.Scan(&name, &tree); err != nil {
			t.Fatal(err)
		}
		trees[name] = tree
	}
	if err := rows.Err(); err != nil || len(trees) < len(functions)+12 {
		t.Fatal(len(trees), err)
	}
	for name, tree := range trees {
		if _, coerced := coercions(t, db, tree); len(coerced) > 0 {
			t.Errorf("%s: coerced for %q", name, coerced)
		}
	}

	for i, text := range []string{
		`SELECT '5'::bigint * '2'::numeric`, `SELECT FROM cache WHERE length(key) > '1'::numeric`, `SELECT concat_ws(',', 'x'), lower('x'::varchar)`,
	} {
		calls, coerced := coercions(t, db, treeOf(t, db, "", text))
		if want := []int{1, 1, 1}[i]; calls == 0 || len(coerced) != want {
			t.Errorf("%s: found %q of %d calls, want %d", text, coerced, calls, want)
		}
	}
}

// treeOf returns what PostgreSQL parses a statement into: the body of a function of this
// form is kept as a tree.
func treeOf(t *testing.T, db *sql.DB, parameters, text string) (tree string) {
	t.Helper()
	if _, err := db.Exec(`CREATE FUNCTION pg_temp.f(` + parameters + `) RETURNS void LANGUAGE sql BEGIN ATOMIC ` + text + `; END`); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	if err := db.QueryRow(`SELECT prosqlbody FROM pg_proc WHERE proname = 'f' AND pronamespace = pg_my_temp_schema()`).Scan(&tree); err != nil {
		t.Fatal(err)
	}
	if _, err := db.Exec(`DROP FUNCTION pg_temp.f`); err != nil {
		t.Fatal(err)
	}
	return tree
}

// treeNode is a node of PostgreSQL's parse trees: a name and fields, or a list.
type treeNode struct {
	name   string
	fields map[string][]any // of string and *treeNode
	list   []any
}

// parseTree reads what PostgreSQL's outfuncs.c writes.
func parseTree(tokens []string, at int) (any, int) {
	switch tokens[at] {
	case "{":
		n := &treeNode{name: tokens[at+1], fields: map[string][]any{}}
		field := ""
		for at += 2; tokens[at] != "}"; {
			if strings.HasPrefix(tokens[at], ":") {
				field = tokens[at][1:]
				at++
				continue
			}
			var v any
			v, at = parseTree(tokens, at)
			n.fields[field] = append(n.fields[field], v)
		}
		return n, at + 1
	case "(", "[":
		n := &treeNode{}
		for at++; tokens[at] != ")" && tokens[at] != "]"; {
			var v any
			v, at = parseTree(tokens, at)
			n.list = append(n.list, v)
		}
		return n, at + 1
	}
	return tokens[at], at + 1
}

func tokensOf(tree string) (tokens []string) {
	var word strings.Builder
	end := func() {
		if word.Len() > 0 {
			tokens = append(tokens, word.String())
			word.Reset()
		}
	}
	for i := 0; i < len(tree); i++ {
		switch c := tree[i]; {
		case c == '\\' && i+1 < len(tree):
			word.WriteString(tree[i : i+2])
			i++
		case strings.IndexByte("(){}[]", c) >= 0:
			end()
			tokens = append(tokens, string(c))
		case c == ' ' || c == '\n':
			end()
		default:
			word.WriteByte(c)
		}
	}
	end()
	return tokens
}

// coercions counts the calls of functions and operators in a tree, and returns those of
// which an operand is cast without being told to.
func coercions(t *testing.T, db *sql.DB, tree string) (calls int, coerced []string) {
	t.Helper()
	implicit := func(v any) bool {
		n, ok := v.(*treeNode)
		if !ok {
			return false
		}
		if n.name == "TARGETENTRY" {
			n, _ = n.fields["expr"][0].(*treeNode)
		}
		format := map[string]string{"FUNCEXPR": "funcformat", "RELABELTYPE": "relabelformat", "COERCEVIAIO": "coerceformat", "ARRAYCOERCEEXPR": "coerceformat"}[n.name]
		return format != "" && slices.Contains(n.fields[format], any("2"))
	}
	var walk func(v any)
	walk = func(v any) {
		n, ok := v.(*treeNode)
		if !ok {
			return
		}
		kind, field := "", "args"
		switch n.name {
		case "OPEXPR", "SCALARARRAYOPEXPR", "DISTINCTEXPR", "NULLIFEXPR":
			kind, field = "oper", "opno"
		case "FUNCEXPR":
			if slices.Contains(n.fields["funcformat"], any("0")) {
				kind, field = "procedure", "funcid"
			}
		case "AGGREF":
			kind, field = "procedure", "aggfnoid"
		case "WINDOWFUNC":
			kind, field = "procedure", "winfnoid"
		}
		if kind != "" {
			calls++
			for _, args := range n.fields["args"] {
				list, _ := args.(*treeNode)
				if list != nil && slices.ContainsFunc(list.list, implicit) {
					var name string
					if err := db.QueryRow(fmt.Sprintf(`SELECT %s::reg%s::text`, n.fields[field][0], map[string]string{"oper": "operator", "procedure": "procedure"}[kind])).Scan(&name); err != nil {
						t.Fatal(err)
					}
					coerced = append(coerced, name)
				}
			}
		}
		for _, values := range n.fields {
			for _, v := range values {
				walk(v)
			}
		}
		for _, v := range n.list {
			walk(v)
		}
	}
	root, _ := parseTree(tokensOf(tree), 0)
	walk(root)
	return calls, coerced
}
