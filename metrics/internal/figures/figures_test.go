package figures

import (
	"reflect"
	"testing"
	"time"

	"github.com/fastpgcache/fastpgcache"
)

// elsewhere are the fields of Stats that no Figure is made of, and why.
var elsewhere = map[string]string{
	"Latency.Counts": "the histogram",
	"Latency.Sum":    "the histogram",
	"LocalHits":      "the same as Local.Hits",
	"FilterAnswers":  "the same as Local.Misses",
}

func TestEveryFieldOfStatsIsOneFigure(t *testing.T) {
	var s fastpgcache.Stats
	used := make([]bool, len(All))
	var walk func(name string, v reflect.Value)
	walk = func(name string, v reflect.Value) {
		_, isTime := v.Interface().(time.Time)
		if v.Kind() == reflect.Struct && !isTime {
			for i := range v.NumField() {
				walk(name+"."+v.Type().Field(i).Name, v.Field(i))
			}
			return
		}
		name = name[1:]
		if elsewhere[name] != "" {
			return
		}
		before := make([]float64, len(All))
		for i, figure := range All {
			before[i] = figure.Value(&s)
		}
		switch {
		case isTime:
			v.Set(reflect.ValueOf(time.Unix(3, 0)))
		default:
			v.SetInt(3)
		}
		changed := 0
		for i, figure := range All {
			if figure.Value(&s) != before[i] {
				changed++
				if used[i] {
					t.Errorf("%s is made of %s and of another field", figure.Name, name)
				}
				used[i] = true
			}
		}
		if changed != 1 {
			t.Errorf("Stats.%s changes %d figures, want 1: add it to All", name, changed)
		}
	}
	walk("", reflect.ValueOf(&s).Elem())
	for i, figure := range All {
		if !used[i] {
			t.Errorf("%s is made of no field of Stats", figure.Name)
		}
	}
}
