package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// behind starts a process that forwards connections to the addresses, each direction
// half a round trip late, and returns the addresses to use instead. It is a process of
// its own so that it does not share a Go scheduler with what is measured; it ends with ctx.
func behind(ctx context.Context, roundTrip time.Duration, addresses ...string) ([]string, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self, append([]string{"forward", roundTrip.String()}, addresses...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go cmd.Wait()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return nil, fmt.Errorf("the forwarding process: %w", err)
	}
	return strings.Fields(line), nil
}

// forward is that process. It prints its addresses as one line.
func forward(args []string) error {
	roundTrip, err := time.ParseDuration(args[0])
	if err != nil {
		return err
	}
	var addresses []string
	for _, to := range args[1:] {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		addresses = append(addresses, l.Addr().String())
		go serve(l, to, roundTrip/2)
	}
	fmt.Println(strings.Join(addresses, " "))
	select {}
}

func serve(l net.Listener, to string, late time.Duration) {
	for {
		client, err := l.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", to)
		if err != nil {
			client.Close()
			continue
		}
		go pipe(server, client, late)
		go pipe(client, server, late)
	}
}

// piece is bytes on the wire, and when they arrive.
type piece struct {
	bytes []byte
	due   time.Time
}

// pipe carries what comes from one connection to the other. The wire holds any number
// of bytes: it is late, not narrow.
func pipe(to, from net.Conn, late time.Duration) {
	wire := make(chan piece, 1<<14)
	go func() {
		defer close(wire)
		for {
			b := make([]byte, 32<<10)
			n, err := from.Read(b)
			if n > 0 {
				wire <- piece{b[:n:n], time.Now().Add(late)}
			}
			if err != nil {
				return
			}
		}
	}()
	defer from.Close()
	defer to.Close()
	clock, err := newClock()
	if err != nil {
		fmt.Fprintln(os.Stderr, "clock:", err)
		return
	}
	defer clock.Close()
	for p := range wire {
		clock.sleepUntil(p.due)
		if _, err := to.Write(p.bytes); err != nil {
			return
		}
	}
}

// clock sleeps to some ten microseconds. time.Sleep does not where the process is idle:
// it waits in epoll, by the millisecond.
type clock struct{ *os.File }

func newClock() (clock, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	return clock{os.NewFile(uintptr(fd), "timerfd")}, err
}

func (c clock) sleepUntil(due time.Time) {
	left := time.Until(due)
	if left <= 0 {
		return
	}
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(left.Nanoseconds())}
	if err := unix.TimerfdSettime(int(c.Fd()), 0, &spec, nil); err != nil {
		time.Sleep(left)
		return
	}
	var expirations [8]byte
	c.Read(expirations[:])
}
