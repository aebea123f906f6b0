package main

// policy keeps some keys. access reports whether key is there, and puts it there.
type policy interface{ access(key uint64) bool }

// list is a queue of at most cap keys: FIFO, LRU, which moves what is hit to the front, or
// SIEVE, which marks it and passes over what is marked.
type list struct {
	kind  string
	nodes []node // nodes[0] is the sentinel: its next is the newest
	at    map[uint64]int32
	hand  int32
}

type node struct {
	key        uint64
	prev, next int32
	visited    bool
}

func newList(kind string, capacity int) *list {
	return &list{kind: kind, nodes: make([]node, 1, capacity+1), at: make(map[uint64]int32, capacity)}
}

func (l *list) unlink(i int32) {
	n := &l.nodes[i]
	l.nodes[n.prev].next, l.nodes[n.next].prev = n.next, n.prev
}

func (l *list) pushFront(i int32) {
	n, head := &l.nodes[i], l.nodes[0].next
	n.prev, n.next = 0, head
	l.nodes[head].prev, l.nodes[0].next = i, i
}

func (l *list) access(key uint64) bool {
	if i, ok := l.at[key]; ok {
		switch l.kind {
		case "LRU":
			l.unlink(i)
			l.pushFront(i)
		case "SIEVE":
			l.nodes[i].visited = true
		}
		return true
	}
	i := int32(len(l.nodes))
	if len(l.nodes) < cap(l.nodes) {
		l.nodes = append(l.nodes, node{})
	} else {
		i = l.victim()
		delete(l.at, l.nodes[i].key)
		l.unlink(i)
	}
	l.nodes[i].key, l.nodes[i].visited = key, false
	l.at[key] = i
	l.pushFront(i)
	return false
}

func (l *list) victim() int32 {
	if l.kind != "SIEVE" {
		return l.nodes[0].prev
	}
	i := l.hand
	for {
		if i == 0 {
			i = l.nodes[0].prev
		}
		if !l.nodes[i].visited {
			break
		}
		l.nodes[i].visited = false
		i = l.nodes[i].prev
	}
	l.hand = l.nodes[i].prev
	return i
}
