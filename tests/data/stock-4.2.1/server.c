/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A server with a handful of TCP connections to dump, and its clients.
 *
 * The parent plays the clients and is not dumped. Its child is the server: it becomes a session
 * of its own, accepts, and stops at pause(). Run in a network namespace of its own (see make.sh);
 * when all is in place, the parent prints the server's pid and waits for its end.
 */
#include <arpa/inet.h>
#include <err.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define OK(call)                                                                                   \
	({                                                                                         \
		int ok_ = (int)(call);                                                             \
		if (ok_ < 0)                                                                       \
			err(1, "%s", #call);                                                       \
		ok_;                                                                               \
	})

static const int on = 1;

static struct sockaddr_in6 v6(const char *ip, int port)
{
	struct sockaddr_in6 sa = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	inet_pton(AF_INET6, ip, &sa.sin6_addr);
	return sa;
}

static struct sockaddr_in v4(const char *ip, int port)
{
	struct sockaddr_in sa = { .sin_family = AF_INET, .sin_port = htons(port) };
	inet_pton(AF_INET, ip, &sa.sin_addr);
	return sa;
}

/* One connection: the client's end becomes *client, the server's end is returned. */
static int pair(int listener, struct sockaddr *server, socklen_t len, int client_port, int *client)
{
	union { struct sockaddr sa; struct sockaddr_in v4; struct sockaddr_in6 v6; } own;

	memcpy(&own, server, len);
	if (server->sa_family == AF_INET)
		own.v4.sin_port = htons(client_port);
	else
		own.v6.sin6_port = htons(client_port);
	*client = OK(socket(server->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
	OK(setsockopt(*client, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)));
	OK(bind(*client, &own.sa, len));
	OK(connect(*client, server, len));
	return OK(accept(listener, NULL, NULL));
}

static void sysctl(const char *name, const char *value)
{
	char path[128];
	int fd;

	snprintf(path, sizeof(path), "/proc/sys/net/ipv4/%s", name);
	fd = OK(open(path, O_WRONLY | O_CLOEXEC));
	OK(write(fd, value, strlen(value)));
	close(fd);
}

/* Puts the descriptor into the unix socket, after one packet without any. */
static void send_away(int unix_fd, int fd)
{
	union { char buf[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } ctl = {};
	struct iovec iov = { .iov_base = "take", .iov_len = 4 };
	struct msghdr mh = { .msg_iov = &iov, .msg_iovlen = 1 };
	struct cmsghdr *ch;

	OK(write(unix_fd, "plain", 5));
	mh.msg_control = ctl.buf;
	mh.msg_controllen = sizeof(ctl.buf);
	ch = CMSG_FIRSTHDR(&mh);
	ch->cmsg_level = SOL_SOCKET;
	ch->cmsg_type = SCM_RIGHTS;
	ch->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(ch), &fd, sizeof(int));
	OK(sendmsg(unix_fd, &mh, 0));
}

static void server(int ready, int listener4, int listener6)
{
	struct sockaddr_in a4 = v4("127.0.0.1", 7001), m4 = v4("127.0.0.1", 7002);
	struct sockaddr_in6 a6 = v6("::1", 7002);
	struct sockaddr *sa4 = (void *)&a4, *sam = (void *)&m4, *sa6 = (void *)&a6;
	int busy, half, six, mapped, shared, sent, c[6], u[2], ep, i, null;
	struct epoll_event ev = { .events = EPOLLIN };

	OK(setsid());
	busy = pair(listener4, sa4, sizeof(a4), 8001, &c[0]);
	sysctl("tcp_timestamps", "0");
	sysctl("tcp_window_scaling", "0");
	half = pair(listener4, sa4, sizeof(a4), 8002, &c[1]);
	sysctl("tcp_timestamps", "1");
	sysctl("tcp_window_scaling", "1");
	six = pair(listener6, sa6, sizeof(a6), 8003, &c[2]);
	mapped = pair(listener6, sam, sizeof(m4), 8004, &c[3]);
	shared = pair(listener4, sa4, sizeof(a4), 8005, &c[4]);
	sent = pair(listener4, sa4, sizeof(a4), 8006, &c[5]);

	OK(write(c[0], "unread", 6));
	OK(write(c[1], "last words", 10));
	OK(shutdown(c[1], SHUT_WR));
	OK(setsockopt(six, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)));
	OK(setsockopt(six, SOL_SOCKET, SO_REUSEPORT, &on, sizeof(on)));
	OK(shutdown(mapped, SHUT_RD));

	/* From here on no acknowledgement arrives: the first write stays sent and unacknowledged, and
	 * Nagle's algorithm holds the second back. */
	if (system("nft 'add table inet quiet; add chain inet quiet in { type filter hook input "
		   "priority 0; }; add rule inet quiet in tcp dport 7001 tcp sport 8001 drop "
		   "comment \"}{\"'"))
		errx(1, "nft");
	OK(write(busy, "in flight", 9));
	OK(write(busy, "never sent", 10));

	OK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, u));
	send_away(u[0], sent);
	close(sent);

	ep = OK(epoll_create1(0));
	OK(epoll_ctl(ep, EPOLL_CTL_ADD, busy, &ev));
	OK(socket(AF_INET, SOCK_DGRAM, 0));

	/* The clients' ends go to the parent, which lives on. */
	for (i = 0; i < 6; i++) {
		send_away(ready, c[i]);
		close(c[i]);
	}
	null = OK(open("/dev/null", O_RDWR));
	for (i = 0; i < 3; i++)
		OK(dup2(null, i));
	close(null);

	if (OK(fork()) == 0) { /* a second task with tables of its own */
		close(busy);
		close(half);
		close(ready);
		for (;;)
			pause();
	}
	close(shared);
	if (OK(fork()) == 0) /* a zombie */
		_exit(0);
	close(ready); /* tells the parent that all is in place */
	for (;;)
		pause();
}

int main(void)
{
	struct sockaddr_in a4 = v4("127.0.0.1", 7001);
	struct sockaddr_in6 a6 = v6("::", 7002);
	int listener4, listener6, u[2], status;
	char buf[64];
	pid_t pid;

	listener4 = OK(socket(AF_INET, SOCK_STREAM, 0));
	listener6 = OK(socket(AF_INET6, SOCK_STREAM, 0));
	OK(setsockopt(listener4, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)));
	OK(bind(listener4, (void *)&a4, sizeof(a4)));
	OK(bind(listener6, (void *)&a6, sizeof(a6)));
	OK(listen(listener4, 8));
	OK(listen(listener6, 8));
	OK(socketpair(AF_UNIX, SOCK_STREAM, 0, u));
	pid = OK(fork());
	if (pid == 0) {
		close(u[0]);
		server(u[1], listener4, listener6);
	}
	close(u[1]);
	close(listener4);
	close(listener6);
	/* Read without taking the descriptors out would close them; recvmsg installs them here. */
	for (;;) {
		char ctl[CMSG_SPACE(sizeof(int))];
		struct iovec iov = { .iov_base = buf, .iov_len = sizeof(buf) };
		struct msghdr mh = { .msg_iov = &iov, .msg_iovlen = 1,
				     .msg_control = ctl, .msg_controllen = sizeof(ctl) };
		if (OK(recvmsg(u[0], &mh, 0)) == 0)
			break;
	}
	printf("%d\n", pid);
	fflush(stdout);
	OK(waitpid(pid, &status, 0));
	return 0;
}
