/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "connection.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SOURCE_PORT = 40000, DESTINATION_PORT = 50000 };

void die(const char *what)
{
	perror(what);
	exit(2);
}

/* splitmix64: small, and the same everywhere */
uint64_t random_next(uint64_t *state)
{
	uint64_t z = (*state += 0x9e3779b97f4a7c15);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
	return z ^ (z >> 31);
}

uint32_t random_below(uint64_t *state, uint32_t below)
{
	return (uint32_t)(random_next(state) % below);
}

static char *random_bytes(uint64_t *random, uint32_t len)
{
	char *bytes = len ? malloc(len) : NULL;

	if (len && !bytes)
		die("malloc");
	for (uint32_t i = 0; i < len; i++)
		bytes[i] = (char)random_next(random);
	return bytes;
}

static void fill_queues(struct connection *c, uint64_t *random)
{
	c->inq = random_bytes(random, c->data.inq_len);
	c->outq = random_bytes(random, c->data.outq_len);
}

static void address(union libsoccr_addr *addr, const char *text, uint16_t port)
{
	memset(addr, 0, sizeof(*addr));
	if (inet_pton(AF_INET, text, &addr->v4.sin_addr) == 1) {
		addr->v4.sin_family = AF_INET;
		addr->v4.sin_port = htons(port);
	} else if (inet_pton(AF_INET6, text, &addr->v6.sin6_addr) == 1) {
		addr->v6.sin6_family = AF_INET6;
		addr->v6.sin6_port = htons(port);
	} else {
		die(text);
	}
}

static void addresses(struct connection *c, const char *host)
{
	address(&c->source, host, SOURCE_PORT);
	address(&c->destination, host, DESTINATION_PORT);
	c->family = c->source.sa.sa_family;
}

void connection_plain(struct connection *c, uint32_t queued)
{
	uint64_t random = queued;

	memset(c, 0, sizeof(*c));
	addresses(c, "127.0.0.1");
	c->data = (struct libsoccr_sk_data){
		.state = TCP_ESTABLISHED,
		.inq_len = queued,
		.inq_seq = 1000000000,
		.outq_len = queued,
		.outq_seq = 2000000000,
		.unsq_len = queued / 2,
		.opt_mask = TCPI_OPT_TIMESTAMPS | TCPI_OPT_SACK | TCPI_OPT_WSCALE,
		.mss_clamp = 1460,
		.snd_wscale = 7,
		.rcv_wscale = 7,
		.timestamp = 3000000000,
		.flags = SOCCR_FLAGS_WINDOW,
		.snd_wl1 = 1000000000,
		.snd_wnd = 65536,
		.max_window = 65536,
		.rcv_wnd = 65536,
		.rcv_wup = 1000000000,
	};
	fill_queues(c, &random);
}

static uint32_t random_length(uint64_t *random)
{
	static const uint32_t limits[] = { 1, 2, 100, 1500, 20000, 200000 };

	return random_below(random, limits[random_below(random, sizeof(limits) / sizeof(*limits))]);
}

static void random_options(struct libsoccr_sk_data *d, uint64_t *random)
{
	d->opt_mask = random_below(random, 8);
	d->mss_clamp = 536 + random_below(random, 9000);
	if (d->opt_mask & TCPI_OPT_WSCALE) {
		d->snd_wscale = random_below(random, 15);
		d->rcv_wscale = random_below(random, 15);
	}
	if (d->opt_mask & TCPI_OPT_TIMESTAMPS)
		d->timestamp = (uint32_t)random_next(random);
}

/* Windows as the kernel keeps them: rcv_nxt lies in ours, snd_wl1 is not beyond rcv_nxt. */
static void random_window(struct libsoccr_sk_data *d, uint64_t *random)
{
	uint32_t unannounced;

	if (random_below(random, 8) == 0)
		return; /* as from a kernel before 4.8 */
	d->flags = SOCCR_FLAGS_WINDOW;
	if (d->state == TCP_SYN_SENT) {
		d->rcv_wnd = random_below(random, 1000000);
		return; /* the peer has not said anything yet */
	}
	unannounced = 1 + random_below(random, 3000);
	d->snd_wl1 = d->inq_seq - random_below(random, 5000);
	d->max_window = 1000 + random_below(random, 1000000);
	d->snd_wnd = random_below(random, d->max_window + 1);
	d->rcv_wup = d->inq_seq - unannounced;
	d->rcv_wnd = unannounced + random_below(random, 1000000);
}

void connection_random(struct connection *c, uint64_t *random)
{
	static const char *const hosts[] = { "127.0.0.1", "::1", "::ffff:127.0.0.1" };
	static const int states[] = { TCP_ESTABLISHED, TCP_SYN_SENT,   TCP_FIN_WAIT1, TCP_FIN_WAIT2,
				      TCP_CLOSE,       TCP_CLOSE_WAIT, TCP_LAST_ACK,  TCP_CLOSING };
	struct libsoccr_sk_data *d = &c->data;

	memset(c, 0, sizeof(*c));
	addresses(c, hosts[random_below(random, 3)]);
	d->state = states[random_below(random, 8)];
	d->inq_seq = d->state == TCP_SYN_SENT ? 0 : (uint32_t)random_next(random);
	d->outq_seq = (uint32_t)random_next(random);
	if (d->state != TCP_SYN_SENT)
		d->inq_len = random_length(random);
	/* In FIN_WAIT2 and CLOSE all that was sent is acknowledged. */
	if (d->state != TCP_SYN_SENT && d->state != TCP_FIN_WAIT2 && d->state != TCP_CLOSE)
		d->outq_len = random_length(random);
	d->unsq_len = random_below(random, 2) ? random_below(random, d->outq_len + 1) : 0;
	random_options(d, random);
	random_window(d, random);
	fill_queues(c, random);
}

void connection_free(struct connection *c)
{
	free(c->inq);
	free(c->outq);
	c->inq = c->outq = NULL;
}

int connection_socket(const struct connection *c)
{
	int fd = socket(c->family, SOCK_STREAM | SOCK_NONBLOCK, IPPROTO_TCP);
	int room = 1 << 20;

	if (fd < 0)
		die("socket");
	room += 4 * (int)(c->data.inq_len > c->data.outq_len ? c->data.inq_len : c->data.outq_len);
	if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof(room)) ||
	    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room)))
		die("SO_SNDBUFFORCE");
	return fd;
}

int connection_restore(struct connection *c, struct libsoccr_sk *sk)
{
	/* The library may change its copy. */
	struct libsoccr_sk_data data = c->data;

	libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, c->inq, 0);
	libsoccr_set_queue_bytes(sk, TCP_SEND_QUEUE, c->outq, 0);
	libsoccr_set_addr(sk, 1, &c->source, 0);
	libsoccr_set_addr(sk, 0, &c->destination, 0);
	return libsoccr_restore(sk, &data, sizeof(data));
}
