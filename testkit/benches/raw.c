/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * The system calls that the engine makes for one connection, and nothing around them: an ESTABLISHED one over IPv4, with as
 * many bytes in either queue, half of those to send never sent. Each function returns 0, or -1 where a call failed.
 * (How many bytes are unread is asked for by SIOCINQ, which needs no page of memory as the engine's call does.)
 */
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

enum { SEND_SEQ = 2000000000, RECV_SEQ = 1000000000 };

struct raw_connection {
	struct sockaddr_in local, remote;
	char *recv, *send;
	uint32_t queued; /* bytes of each */
};

static int set(int fd, int name, int value)
{
	return setsockopt(fd, IPPROTO_TCP, name, &value, sizeof(value));
}

static int get(int fd, int name)
{
	int value;
	socklen_t len = sizeof(value);

	return getsockopt(fd, IPPROTO_TCP, name, &value, &len);
}

static int choose(int fd, int queue, uint32_t seq)
{
	return set(fd, TCP_REPAIR_QUEUE, queue) || set(fd, TCP_QUEUE_SEQ, (int)seq);
}

static int append(int fd, const char *bytes, uint32_t len)
{
	return send(fd, bytes, len, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)len ? 0 : -1;
}

static int negotiated(int fd)
{
	struct tcp_repair_opt options[] = {
		{ 4, 0 }, /* TCPOPT_SACK_PERMITTED */
		{ 3, 7 | 7 << 16 }, /* TCPOPT_WINDOW */
		{ 8, 0 }, /* TCPOPT_TIMESTAMP */
		{ 2, 1460 }, /* TCPOPT_MAXSEG */
	};

	return setsockopt(fd, IPPROTO_TCP, TCP_REPAIR_OPTIONS, options, sizeof(options)) ||
	       set(fd, TCP_TIMESTAMP, (int)3000000000) || setsockopt(fd, IPPROTO_IP, 4 /* IP_OPTIONS */, "", 0);
}

static int queues(int fd, const struct raw_connection *c)
{
	uint32_t sent = c->queued - c->queued / 2, memory[4];
	socklen_t len = sizeof(memory);

	if (!c->queued)
		return 0;
	return getsockopt(fd, SOL_SOCKET, SO_MEMINFO, memory, &len) || append(fd, c->recv, c->queued) ||
	       set(fd, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE) || append(fd, c->send, sent) ||
	       set(fd, TCP_REPAIR, TCP_REPAIR_OFF_NO_WP) || append(fd, c->send + sent, c->queued - sent) ||
	       set(fd, TCP_REPAIR, TCP_REPAIR_ON);
}

/* Into a fresh socket, which leaves repair mode then. */
int raw_restore(int fd, const struct raw_connection *c)
{
	struct tcp_repair_window window = { RECV_SEQ, 65536, 65536, 65536, RECV_SEQ };
	struct sockaddr_in name;
	socklen_t len = sizeof(name);

	if (set(fd, TCP_REPAIR, TCP_REPAIR_ON) || bind(fd, (const struct sockaddr *)&c->local, sizeof(c->local)) ||
	    choose(fd, TCP_SEND_QUEUE, SEND_SEQ - c->queued) || choose(fd, TCP_RECV_QUEUE, RECV_SEQ - c->queued) ||
	    connect(fd, (const struct sockaddr *)&c->remote, sizeof(c->remote)) ||
	    getsockname(fd, (struct sockaddr *)&name, &len) || negotiated(fd) || queues(fd, c) ||
	    setsockopt(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &window, sizeof(window)))
		return -1;
	return set(fd, TCP_REPAIR, TCP_REPAIR_OFF);
}

static int peek(int fd, char *bytes, uint32_t len)
{
	/* One more, which shows that there are no more. */
	return recv(fd, bytes, len + 1, MSG_PEEK | MSG_DONTWAIT) == (ssize_t)len ? 0 : -1;
}

/* Out of the socket, which stays in repair mode; both buffers have room for one byte more. */
int raw_save(int fd, const struct raw_connection *c)
{
	char ulp[16];
	struct tcp_info info;
	struct tcp_repair_window window;
	socklen_t ulp_len = sizeof(ulp), info_len = 148, window_len = sizeof(window);
	int unread, unacked, at_mark;

	if (set(fd, TCP_REPAIR, TCP_REPAIR_ON) || getsockopt(fd, IPPROTO_TCP, TCP_ULP, ulp, &ulp_len) ||
	    getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &info_len) ||
	    getsockopt(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &window, &window_len) ||
	    set(fd, TCP_REPAIR_QUEUE, TCP_RECV_QUEUE) || get(fd, TCP_QUEUE_SEQ) || ioctl(fd, SIOCINQ, &unread))
		return -1;
	if (unread && (peek(fd, c->recv, unread) || get(fd, TCP_QUEUE_SEQ)))
		return -1;
	if (info.tcpi_unacked && ioctl(fd, SIOCOUTQ, &unacked))
		return -1;
	if (get(fd, TCP_MAXSEG) || get(fd, TCP_TIMESTAMP) || set(fd, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE) ||
	    get(fd, TCP_QUEUE_SEQ))
		return -1;
	if (c->queued && peek(fd, c->send, c->queued))
		return -1;
	return unread ? ioctl(fd, SIOCATMARK, &at_mark) : 0;
}
