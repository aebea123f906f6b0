package fastpgcache

import "time"

// Two statements keep two processors busy, a third helps only behind a crowd:
// measured with bench/load.
const (
	fewPlaces = 2
	crowd     = 32 // calls
)

// processing is about what the smallest statement costs processors, ours and an idle
// server's: a server this near is kept busy by few statements.
const processing = 40 * time.Microsecond

// baseWindow is how long a shortest statement is remembered: for one to two windows.
const baseWindow = 2 * time.Second

// places says how many statements of one kind may be in flight, by how long they take.
//
// A statement's time is the network's, which every statement has to itself, and the
// server's, which they share. The shortest statement of the last seconds, base, met an
// idle server. What others take beyond it they spend at the server, queueing or being
// large. So of f in flight about f*(took-base)/took are at the server at once, and the
// rest are on the wire. One more may go as long as about one is at the server then: far
// from it many, near it two. The more calls wait, the larger their statements are, and
// the longer they take without queueing; so a crowd may have up to three there.
//
// took is the shortest of the last few. Their mean, or the last one alone, would take
// one large statement for a busy server.
//
// It is a function of what it is told. It has no clock, no lock and no setting.
type places struct {
	last    [8]time.Duration // statements, a ring
	ended   int              // statements, ever
	current time.Duration    // the shortest of this window, which ends at end
	before  time.Duration    // the shortest of the window before; 0 if there was none
	end     time.Time
}

// free reports whether one more statement may go out, with inFlight on their way and
// waiting calls to send.
func (p *places) free(inFlight, waiting int) bool {
	if inFlight < fewPlaces || inFlight == fewPlaces && waiting >= crowd {
		return true
	}
	if p.ended == 0 {
		return false
	}
	took := p.took()
	busy := float64(inFlight+1) * float64(took-p.base()+processing)
	return busy <= min(3, 1+float64(waiting)/64)*float64(took)
}

// done notes a statement that ended now.
func (p *places) done(now time.Time, took time.Duration) {
	switch late := now.Sub(p.end); {
	case p.ended == 0 || late >= baseWindow: // nothing ended for a while: another server, perhaps
		p.current, p.before, p.end = took, 0, now.Add(baseWindow)
	case late >= 0:
		p.current, p.before, p.end = took, p.current, now.Add(baseWindow)
	default:
		p.current = min(p.current, took)
	}
	p.last[p.ended%len(p.last)] = took
	p.ended++
}

// took is how long statements take.
func (p *places) took() time.Duration {
	took := p.last[0]
	for _, t := range p.last[:min(p.ended, len(p.last))] {
		took = min(took, t)
	}
	return took
}

// base is how long they take at an idle server.
func (p *places) base() time.Duration {
	if p.before > 0 {
		return min(p.before, p.current)
	}
	return p.current
}
