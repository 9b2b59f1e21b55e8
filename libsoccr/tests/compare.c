/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * compare SEED COUNT: restores, saves, restores and saves again COUNT made-up connections with the
 * library that this is linked with, and prints all there is to see of each, a line for each field:
 *
 *     NUMBER PHASE FIELD VALUE
 *
 * PHASE is "given" (what was restored), "built" and "rebuilt" (the kernel's own words about the socket
 * after each restore) or "saved" and "resaved" (the library's). compare.py compares two such outputs.
 */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <linux/sockios.h>

#include "connection.h"

static unsigned number;
static const char *phase;

static void field(const char *name, uint32_t value)
{
	printf("%u %s %s %u\n", number, phase, name, value);
}

static void text(const char *name, const char *value)
{
	printf("%u %s %s %s\n", number, phase, name, value);
}

static void print_data(const struct libsoccr_sk_data *d)
{
	field("state", d->state);
	field("inq_len", d->inq_len);
	field("inq_seq", d->inq_seq);
	field("outq_len", d->outq_len);
	field("outq_seq", d->outq_seq);
	field("unsq_len", d->unsq_len);
	field("opt_mask", d->opt_mask);
	field("mss_clamp", d->mss_clamp);
	field("snd_wscale", d->snd_wscale);
	field("rcv_wscale", d->rcv_wscale);
	field("timestamp", d->timestamp);
	field("flags", d->flags);
	field("snd_wl1", d->snd_wl1);
	field("snd_wnd", d->snd_wnd);
	field("max_window", d->max_window);
	field("rcv_wnd", d->rcv_wnd);
	field("rcv_wup", d->rcv_wup);
}

static void print_bytes(const char *name, const char *bytes, const char *given, uint32_t len)
{
	uint32_t same = 0;
	char value[64];

	while (same < len && bytes && bytes[same] == given[same])
		same++;
	snprintf(value, sizeof(value), "%u-of-%u-bytes-as-given", same, len);
	text(name, value);
}

static uint32_t option(int fd, int name)
{
	uint32_t value = 0;
	socklen_t len = sizeof(value);

	if (getsockopt(fd, IPPROTO_TCP, name, &value, &len))
		die("getsockopt");
	return value;
}

static uint32_t sequence(int fd, int queue)
{
	if (setsockopt(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, &queue, sizeof(queue)))
		die("TCP_REPAIR_QUEUE");
	return option(fd, TCP_QUEUE_SEQ);
}

static uint32_t length(int fd, unsigned long request)
{
	int value;

	if (ioctl(fd, request, &value))
		die("ioctl");
	return (uint32_t)value;
}

static void print_name(const char *name, int fd, int (*get)(int, struct sockaddr *, socklen_t *))
{
	struct sockaddr_storage addr;
	socklen_t len = sizeof(addr);
	char hex[2 * sizeof(addr) + 1] = "none";

	memset(&addr, 0, sizeof(addr));
	if (get(fd, (struct sockaddr *)&addr, &len) == 0)
		for (socklen_t i = 0; i < len; i++)
			sprintf(hex + 2 * i, "%02x", ((unsigned char *)&addr)[i]);
	text(name, hex);
}

/* What the kernel says, without the library's help. */
static void print_socket(int fd)
{
	struct tcp_repair_window w;
	struct tcp_info info;
	socklen_t len = sizeof(info);

	memset(&info, 0, sizeof(info));
	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len))
		die("TCP_INFO");
	field("state", info.tcpi_state);
	field("opt_mask", info.tcpi_options);
	field("snd_wscale", info.tcpi_snd_wscale);
	field("rcv_wscale", info.tcpi_rcv_wscale);
	field("tcpi_snd_mss", info.tcpi_snd_mss);
	field("tcpi_advmss", info.tcpi_advmss);
	field("SIOCINQ", length(fd, SIOCINQ));
	field("SIOCOUTQ", length(fd, SIOCOUTQ));
	field("SIOCOUTQNSD", length(fd, SIOCOUTQNSD));
	field("mss_clamp", option(fd, TCP_MAXSEG));
	field("timestamp", option(fd, TCP_TIMESTAMP));
	field("inq_seq", sequence(fd, TCP_RECV_QUEUE));
	field("outq_seq", sequence(fd, TCP_SEND_QUEUE));
	len = sizeof(w);
	if (getsockopt(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &w, &len))
		die("TCP_REPAIR_WINDOW");
	field("snd_wl1", w.snd_wl1);
	field("snd_wnd", w.snd_wnd);
	field("max_window", w.max_window);
	field("rcv_wnd", w.rcv_wnd);
	field("rcv_wup", w.rcv_wup);
	print_name("getsockname", fd, getsockname);
	print_name("getpeername", fd, getpeername);
}

static struct libsoccr_sk *built(struct connection *c, const char *name, int *fd)
{
	struct libsoccr_sk *sk;
	int ret;

	phase = name;
	*fd = connection_socket(c);
	sk = libsoccr_pause(*fd);
	if (!sk)
		die("libsoccr_pause");
	ret = connection_restore(c, sk);
	text("restore", ret ? "failed" : "0");
	if (ret == 0) {
		print_socket(*fd);
		return sk;
	}
	libsoccr_release(sk);
	close(*fd);
	return NULL;
}

/* Replaces c's data and bytes by those that the library saves; whether it could. */
static int saved(struct connection *c, const char *name, struct libsoccr_sk *sk)
{
	struct libsoccr_sk_data data;
	char *inq, *outq;
	char value[16];
	int ret;

	phase = name;
	ret = libsoccr_save(sk, &data, sizeof(data));
	snprintf(value, sizeof(value), "%d", ret);
	text("save", value);
	if (ret < 0)
		return 0;
	print_data(&data);
	inq = libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, SOCCR_MEM_EXCL);
	outq = libsoccr_get_queue_bytes(sk, TCP_SEND_QUEUE, SOCCR_MEM_EXCL);
	if (data.inq_len == c->data.inq_len && data.outq_len == c->data.outq_len) {
		print_bytes("inq", inq, c->inq, data.inq_len);
		print_bytes("outq", outq, c->outq, data.outq_len);
	}
	connection_free(c);
	c->inq = inq;
	c->outq = outq;
	c->data = data;
	return 1;
}

static void gone(struct libsoccr_sk *sk, int fd)
{
	libsoccr_release(sk);
	close(fd);
}

static void once(uint64_t *random)
{
	struct libsoccr_sk *sk;
	struct connection c;
	int fd, again;

	connection_random(&c, random);
	phase = "given";
	print_data(&c.data);
	/* Without windows the kernel is left with a snd_wl1 of 0, which it would not take back. */
	again = c.data.flags & SOCCR_FLAGS_WINDOW;
	sk = built(&c, "built", &fd);
	if (sk) {
		again = saved(&c, "saved", sk) && again;
		gone(sk, fd);
		sk = again ? built(&c, "rebuilt", &fd) : NULL;
	}
	if (sk) {
		saved(&c, "resaved", sk);
		gone(sk, fd);
	}
	connection_free(&c);
}

static void complain(unsigned int level, const char *fmt, ...)
{
	va_list args;

	(void)level;
	fprintf(stderr, "connection %u, %s: ", number, phase);
	va_start(args, fmt);
	vfprintf(stderr, fmt, args);
	va_end(args);
}

int main(int argc, char **argv)
{
	uint64_t random;
	unsigned count;

	if (argc != 3) {
		fprintf(stderr, "usage: compare SEED COUNT\n");
		return 2;
	}
	libsoccr_set_log(SOCCR_LOG_ERR, complain);
	random = strtoull(argv[1], NULL, 0);
	count = (unsigned)strtoul(argv[2], NULL, 0);
	for (number = 0; number < count; number++)
		once(&random);
	return 0;
}
