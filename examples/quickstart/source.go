package main

import (
	_ "embed"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"reflect"
	"runtime"
	"strings"
)

//go:embed steps.go
var stepsFile string

// source returns the code of a step as it runs, from the very file that was compiled,
// without its narration, which is what only calls a method of t, and without its last return.
func source(step any) (string, error) {
	name := runtime.FuncForPC(reflect.ValueOf(step).Pointer()).Name()
	name = name[strings.LastIndex(name, ".")+1:]
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, "steps.go", stepsFile, 0)
	if err != nil {
		return "", err
	}
	for _, d := range file.Decls {
		if f, ok := d.(*ast.FuncDecl); ok && f.Name.Name == name {
			return code(fset, f.Body), nil
		}
	}
	return "", fmt.Errorf("steps.go has no %s", name)
}

func code(fset *token.FileSet, body *ast.BlockStmt) string {
	left := map[int]bool{} // lines that are left out
	ast.Inspect(body, func(n ast.Node) bool {
		if s, ok := n.(*ast.ExprStmt); ok && narrates(s) {
			for line := fset.Position(s.Pos()).Line; line <= fset.Position(s.End()).Line; line++ {
				left[line] = true
			}
		}
		return true
	})
	var b strings.Builder
	lines := strings.Split(stepsFile, "\n")
	last := fset.Position(body.Rbrace).Line - 1
	for line := fset.Position(body.Lbrace).Line + 1; line <= last; line++ {
		text := lines[line-1]
		if left[line] || line == last && strings.HasPrefix(text, "\treturn ") {
			continue
		}
		b.WriteString(strings.TrimPrefix(text, "\t") + "\n")
	}
	return b.String()
}

// narrates reports whether s is a call of a method of t.
func narrates(s *ast.ExprStmt) bool {
	call, ok := s.X.(*ast.CallExpr)
	if !ok {
		return false
	}
	method, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	receiver, ok := method.X.(*ast.Ident)
	return ok && receiver.Name == "t"
}
