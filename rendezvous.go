package fastpgcache

// rendezvous says which of some names a key belongs to: the one with the highest weight
// (Thaler and Ravishankar, A Name-Based Mapping Scheme for Rendezvous, 1996). A name that
// joins takes its share of the keys, and no other key moves. The hash is documented in
// docs/scaling.md: programs in other languages compute it, so it never changes.
type rendezvous []uint64 // what stands for each name

func newRendezvous(names []string) rendezvous {
	r := make(rendezvous, len(names))
	for i, name := range names {
		r[i] = mix(fnv1a(name))
	}
	return r
}

// of returns the index of the name that key belongs to, the first of equal ones.
func (r rendezvous) of(key string) int {
	hash := fnv1a(key)
	best, highest := 0, uint64(0)
	for i, name := range r {
		if weight := mix(hash ^ name); weight > highest {
			best, highest = i, weight
		}
	}
	return best
}

// fnv1a is the 64-bit FNV-1a hash (draft-eastlake-fnv). It is not hash/fnv's, which
// allocates.
func fnv1a(text string) uint64 {
	hash := uint64(0xcbf29ce484222325)
	for i := range len(text) {
		hash = (hash ^ uint64(text[i])) * 0x100000001b3
	}
	return hash
}

// mix is the finalizer of SplitMix64 (Steele, Lea and Flood, 2014): every bit of x changes
// half of its bits.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
