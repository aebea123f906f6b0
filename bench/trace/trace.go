package main

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
)

// makeTrace makes a trace of n accesses: keys drawn by Zipf's law, of which now and then a
// popular one and another change places; scans of keys that nobody asks for again; and a
// batch job that comes back.
func makeTrace(seed uint64, n, keys int) []uint64 {
	r := rand.New(rand.NewPCG(seed, 1))
	zipf := rand.NewZipf(r, 1.02, 4, uint64(keys-1))
	byRank := r.Perm(keys)
	trace := make([]uint64, 0, n)
	const scans, jobs = uint64(1) << 40, uint64(1) << 41
	scanned, job := uint64(0), uint64(0)
	for len(trace) < n {
		for i := range 5000 {
			if i%200 == 0 {
				a, b := zipf.Uint64(), r.IntN(keys)
				byRank[a], byRank[b] = byRank[b], byRank[a]
			}
			trace = append(trace, uint64(byRank[zipf.Uint64()]))
		}
		switch p := r.IntN(40); {
		case p < 4:
			for range keys / 50 {
				trace = append(trace, scans+scanned)
				scanned++
			}
		case p == 4:
			if r.IntN(4) == 0 {
				job++
			}
			for i := range uint64(keys / 20) {
				trace = append(trace, jobs+job<<20+i)
			}
		}
	}
	return trace[:n]
}

// readTrace reads a trace of 8-byte big-endian keys, at most n of them.
func readTrace(path string, n int) ([]uint64, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if len(raw) == 0 || len(raw)%8 != 0 {
		return nil, fmt.Errorf("%s: %d bytes are no trace of 8-byte keys", path, len(raw))
	}
	trace := make([]uint64, min(n, len(raw)/8))
	for i := range trace {
		trace[i] = binary.BigEndian.Uint64(raw[8*i:])
	}
	return trace, nil
}

func distinct(trace []uint64) int {
	seen := make(map[uint64]struct{}, len(trace)/4)
	for _, key := range trace {
		seen[key] = struct{}{}
	}
	return len(seen)
}
