package main

import (
	"context"
	"fmt"
	"net"
	"strings"
	"time"

	toxiproxy "github.com/Shopify/toxiproxy/v2"
	"github.com/Shopify/toxiproxy/v2/toxics"
	"github.com/fastpgcache/fastpgcache/internal/pgtest"
	"github.com/rs/zerolog"
)

var networkScenarios = []scenario{
	{name: "black hole", run: blackHole,
		what: "All that is sent vanishes for two seconds, in both directions, then in one. Each call ends with its context."},
	{name: "latency", run: latency,
		what: "Packets take 5 to 80 ms, varying, and bandwidth is 200 kB/s at times."},
	{name: "resets in mid-answer", run: resets,
		what: "Connections break after some 100 to 3,000 bytes of an answer, or are reset."},
	{name: "half-open connections", run: halfOpen,
		what: "Connections go dead without a word, as behind a firewall that forgot them; new ones work."},
	{name: "server unreachable", run: unreachable,
		what: "Nobody listens for a second, again and again."},
}

// proxy stands between the processes and the server.
type proxy struct {
	*toxiproxy.Proxy
	names int
}

func newProxy(t *trial, upstream string) (*proxy, error) {
	zerolog.SetGlobalLevel(zerolog.Disabled)
	server := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	p := &proxy{Proxy: toxiproxy.NewProxy(server, t.result.Name, "127.0.0.1:0", upstream)}
	if err := p.Start(); err != nil {
		return nil, err
	}
	t.cleanup(func() {
		p.Toxics.ResetToxics(context.Background())
		p.Stop()
	})
	return p, nil
}

// options are those of a connection string that leads through the proxy.
func (p *proxy) options() []string {
	host, port, _ := net.SplitHostPort(p.Listen)
	return []string{"host=" + host, "port=" + port}
}

// leadTo cuts all connections and leads new ones to another server.
func (p *proxy) leadTo(upstream string) error {
	return p.Update(&toxiproxy.Proxy{Listen: p.Listen, Upstream: upstream, Enabled: true})
}

// add adds a toxic, of a type and with attributes in JSON, and returns what removes it.
func (p *proxy) add(kind, stream, attributes string) (*toxics.ToxicWrapper, func(), error) {
	p.names++
	name := fmt.Sprint(kind, p.names)
	w, err := p.Toxics.AddToxicJson(strings.NewReader(fmt.Sprintf(`{"name": %q, "type": %q, "stream": %q, "attributes": {%s}}`, name, kind, stream, attributes)))
	return w, func() { p.Toxics.RemoveToxic(context.Background(), name) }, err
}

// proxied starts a server and the usual processes, through a proxy.
func (t *trial) proxied() (*proxy, error) {
	if err := t.start(pgtest.Config{}); err != nil {
		return nil, err
	}
	p, err := newProxy(t, addr(t.server))
	if err != nil {
		return nil, err
	}
	t.patience = time.Second
	return p, t.usual(t.dsn(p.options()...))
}

func blackHole(t *trial) error {
	p, err := t.proxied()
	if err != nil {
		return err
	}
	return t.each(40, func(round int) error {
		var remove []func()
		for i, stream := range []string{"upstream", "downstream"} {
			if round%3 > 0 && round%3 != i+1 {
				continue
			}
			_, f, err := p.add("timeout", stream, `"timeout": 0`)
			if err != nil {
				return err
			}
			remove = append(remove, f)
		}
		time.Sleep(2 * time.Second)
		for _, f := range remove {
			f()
		}
		return nil
	})
}

func latency(t *trial) error {
	p, err := t.proxied()
	if err != nil {
		return err
	}
	t.patience = 3 * time.Second
	return t.each(30, func(round int) error {
		kind, attributes := "latency", fmt.Sprintf(`"latency": %d, "jitter": %d`, 5+round*7%40, 5+round*7%40)
		if round%4 == 3 {
			kind, attributes = "bandwidth", `"rate": 200`
		}
		_, remove, err := p.add(kind, "downstream", attributes)
		if err != nil {
			return err
		}
		defer remove()
		time.Sleep(2 * time.Second)
		return nil
	})
}

func resets(t *trial) error {
	p, err := t.proxied()
	if err != nil {
		return err
	}
	return t.each(40, func(round int) error {
		for i := range 6 {
			kind, attributes := "limit_data", fmt.Sprintf(`"bytes": %d`, 400+(round*131+i*977)%3000)
			if i%3 == 2 {
				kind, attributes = "reset_peer", `"timeout": 20`
			}
			_, remove, err := p.add(kind, "downstream", attributes)
			if err != nil {
				return err
			}
			time.Sleep(300 * time.Millisecond)
			remove()
		}
		return nil
	})
}

func halfOpen(t *trial) error {
	p, err := t.proxied()
	if err != nil {
		return err
	}
	var remove []func()
	err = t.each(30, func(int) error {
		for _, stream := range []string{"upstream", "downstream"} {
			w, f, err := p.add("timeout", stream, `"timeout": 0`)
			if err != nil {
				return err
			}
			w.Toxicity = 0 // of connections that come
			remove = append(remove, f)
		}
		return nil
	})
	for _, f := range remove {
		f()
	}
	return err
}

func unreachable(t *trial) error {
	p, err := t.proxied()
	if err != nil {
		return err
	}
	return t.each(40, func(int) error {
		p.Stop()
		time.Sleep(time.Second)
		return p.Start()
	})
}
