/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * Every call of libsoccr and every rule about its memory, to be run under valgrind (tests/run).
 *
 * The system calls that the library makes go through the __wrap_ functions below (ld --wrap), which can
 * make the n-th of them fail: so each step of a save and of a restore fails once.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "connection.h"

static unsigned checks, failures;

#define CHECK(condition)                                                                  \
	do {                                                                              \
		checks++;                                                                 \
		if (!(condition)) {                                                       \
			failures++;                                                       \
			fprintf(stderr, "%s:%d: %s\n", __func__, __LINE__, #condition);   \
		}                                                                         \
	} while (0)

/* ---- failures on demand ---- */

static int calls_until_failure; /* 0: none fails */
static int ignored_failure; /* whether the failed call was one that may fail */
static size_t malloc_to_fail; /* of this size; 0: none */

static int fails(int may_fail)
{
	if (calls_until_failure == 0 || --calls_until_failure > 0)
		return 0;
	ignored_failure = may_fail;
	errno = ENOBUFS;
	return 1;
}

#define WRAP(result, name, parameters, arguments, may_fail)             \
	result __real_##name parameters;                                \
	result __wrap_##name parameters;                                \
	result __wrap_##name parameters                                 \
	{                                                               \
		return fails(may_fail) ? -1 : __real_##name arguments;  \
	}

WRAP(int, getsockopt, (int fd, int level, int name, void *value, socklen_t *len), (fd, level, name, value, len),
     level == SOL_SOCKET)
WRAP(int, setsockopt, (int fd, int level, int name, const void *value, socklen_t len),
     (fd, level, name, value, len), level == SOL_SOCKET || level == SOL_IP)
WRAP(ssize_t, recv, (int fd, void *into, size_t len, int flags), (fd, into, len, flags), 0)
WRAP(ssize_t, send, (int fd, const void *from, size_t len, int flags), (fd, from, len, flags), 1)
WRAP(int, bind, (int fd, const struct sockaddr *addr, socklen_t len), (fd, addr, len), 0)
WRAP(int, connect, (int fd, const struct sockaddr *addr, socklen_t len), (fd, addr, len), 0)
WRAP(int, getsockname, (int fd, struct sockaddr *addr, socklen_t *len), (fd, addr, len), 0)

int __wrap_ioctl(int fd, unsigned long request, void *value);
int __real_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, void *value)
{
	return fails(0) ? -1 : __real_ioctl(fd, request, value);
}

void *__real_malloc(size_t size);
void *__wrap_malloc(size_t size);
void *__wrap_malloc(size_t size)
{
	return malloc_to_fail && size == malloc_to_fail ? NULL : __real_malloc(size);
}

/* ---- the log ---- */

static unsigned messages, messages_of_level[3];
static char last_message[1024];

static void sink(unsigned int level, const char *fmt, ...)
{
	va_list args;

	messages++;
	messages_of_level[level <= 2 ? level : 0]++;
	va_start(args, fmt);
	vsnprintf(last_message, sizeof(last_message), fmt, args);
	va_end(args);
	errno = ENOTTY; /* as a log function may */
}

static void sink_that_sets(unsigned int level, const char *fmt, ...)
{
	(void)level, (void)fmt;
	messages++;
	libsoccr_set_log(0, NULL);
}

/* ---- connections of this host with itself ---- */

struct pair {
	int server, client;
};

static struct pair connected(const char *host)
{
	union libsoccr_addr addr;
	socklen_t len = sizeof(addr);
	struct pair p;
	int listener;

	memset(&addr, 0, sizeof(addr));
	addr.sa.sa_family = strchr(host, ':') ? AF_INET6 : AF_INET;
	if (inet_pton(addr.sa.sa_family, host,
		      addr.sa.sa_family == AF_INET ? (void *)&addr.v4.sin_addr : (void *)&addr.v6.sin6_addr) != 1)
		die(host);
	listener = socket(addr.sa.sa_family, SOCK_STREAM, 0);
	p.client = socket(addr.sa.sa_family, SOCK_STREAM, 0);
	if (listener < 0 || p.client < 0 || bind(listener, &addr.sa, sizeof(addr)) || listen(listener, 1) ||
	    getsockname(listener, &addr.sa, &len) || connect(p.client, &addr.sa, len))
		die("connect");
	p.server = accept(listener, NULL, NULL);
	if (p.server < 0)
		die("accept");
	close(listener);
	return p;
}

static void closed(struct pair p)
{
	close(p.server);
	close(p.client);
}

static const char TO_SERVER[] = "sent to the server, which has not read it";

/* A connection whose server has bytes to read. */
static struct pair busy(const char *host)
{
	struct pair p = connected(host);

	if (write(p.client, TO_SERVER, sizeof(TO_SERVER)) != sizeof(TO_SERVER))
		die("write");
	return p;
}

static int in_repair(int fd)
{
	int value = -1;
	socklen_t len = sizeof(value);

	if (getsockopt(fd, IPPROTO_TCP, TCP_REPAIR, &value, &len))
		die("TCP_REPAIR");
	return value;
}

static char *copy(const char *bytes, size_t len)
{
	char *block = malloc(len);

	if (!block)
		die("malloc");
	return memcpy(block, bytes, len);
}

/* ---- the tests ---- */

static void null_and_wrong_arguments(void)
{
	struct libsoccr_sk_data data;
	struct pair p = connected("127.0.0.1");
	struct libsoccr_sk *sk = libsoccr_pause(p.server);
	union libsoccr_addr addr;
	char byte;

	libsoccr_resume(NULL);
	libsoccr_release(NULL);
	CHECK(libsoccr_save(NULL, &data, sizeof(data)) == -1);
	CHECK(libsoccr_save(sk, NULL, sizeof(data)) == -1 && errno == EINVAL);
	CHECK(libsoccr_get_queue_bytes(NULL, TCP_RECV_QUEUE, 0) == NULL);
	CHECK(libsoccr_get_addr(NULL, 1, 0) == NULL);
	CHECK(libsoccr_set_queue_bytes(NULL, TCP_RECV_QUEUE, &byte, 0) == -1);
	CHECK(libsoccr_set_addr(NULL, 1, &addr, 0) == -1);
	CHECK(libsoccr_set_addr(sk, 1, NULL, 0) == -1);
	CHECK(libsoccr_restore(NULL, &data, sizeof(data)) == -1);
	CHECK(libsoccr_restore(sk, NULL, sizeof(data)) == -1);
	for (unsigned flags = 2; flags; flags <<= 1) {
		CHECK(libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, flags) == NULL);
		CHECK(libsoccr_get_addr(sk, 1, flags | SOCCR_MEM_EXCL) == NULL);
		/* Not taken: under valgrind a free() of these shows. */
		CHECK(libsoccr_set_queue_bytes(sk, TCP_SEND_QUEUE, &byte, flags | SOCCR_MEM_EXCL) == -1);
		CHECK(libsoccr_set_addr(sk, 0, &addr, flags | SOCCR_MEM_EXCL) == -1);
	}
	CHECK(libsoccr_set_queue_bytes(sk, 0, &byte, SOCCR_MEM_EXCL) == -1);
	CHECK(libsoccr_set_queue_bytes(sk, 3, &byte, SOCCR_MEM_EXCL) == -1);
	CHECK(libsoccr_set_queue_bytes(sk, -1, &byte, SOCCR_MEM_EXCL) == -1);
	libsoccr_release(sk);
	closed(p);
}

static void what_cannot_be_paused(void)
{
	int pipes[2], udp = socket(AF_INET, SOCK_DGRAM, 0), listener = socket(AF_INET, SOCK_STREAM, 0);

	if (pipe(pipes) || udp < 0 || listen(listener, 1))
		die("sockets");
	CHECK(libsoccr_pause(-1) == NULL && errno == EBADF);
	CHECK(libsoccr_pause(-7) == NULL && errno == EBADF);
	CHECK(libsoccr_pause(12345) == NULL && errno == EBADF);
	CHECK(libsoccr_pause(pipes[0]) == NULL && errno == ENOTSOCK);
	CHECK(libsoccr_pause(udp) == NULL);
	CHECK(libsoccr_pause(listener) == NULL && errno == EPERM);
	close(pipes[0]);
	close(pipes[1]);
	close(udp);
	close(listener);
}

static void pause_resume_release(void)
{
	struct pair p = connected("127.0.0.1");
	struct libsoccr_sk *sk = libsoccr_pause(p.server);
	char byte = 'x';

	CHECK(sk != NULL && in_repair(p.server) == 1);
	libsoccr_release(sk);
	CHECK(in_repair(p.server) == 1);
	sk = libsoccr_pause(p.server);
	CHECK(sk != NULL);
	libsoccr_resume(sk);
	CHECK(in_repair(p.server) == 0);
	CHECK(write(p.server, &byte, 1) == 1 && read(p.client, &byte, 1) == 1);
	closed(p);
}

static void the_log(void)
{
	struct pair p = connected("127.0.0.1");
	struct libsoccr_sk *sk = libsoccr_pause(p.server);
	struct libsoccr_sk_data data;

	messages = 0;
	libsoccr_set_log(0, sink);
	CHECK(libsoccr_pause(-1) == NULL && messages == 0);
	libsoccr_set_log(SOCCR_LOG_DBG, NULL);
	CHECK(libsoccr_pause(-1) == NULL && messages == 0);

	libsoccr_set_log(SOCCR_LOG_ERR, sink);
	CHECK(libsoccr_save(sk, &data, sizeof(data)) == 68 && messages == 0);
	CHECK(libsoccr_pause(-1) == NULL && errno == EBADF);
	CHECK(messages == 1 && messages_of_level[SOCCR_LOG_ERR] == 1);
	CHECK(strlen(last_message) > 20 && last_message[strlen(last_message) - 1] == '\n');
	CHECK(strchr(last_message, '%') == NULL && strchr(last_message, '\n') == last_message + strlen(last_message) - 1);

	libsoccr_set_log(10, sink);
	CHECK(libsoccr_save(sk, &data, sizeof(data)) == 68 && messages_of_level[SOCCR_LOG_DBG] > 0);
	CHECK(messages_of_level[0] == 0);

	messages = 0;
	libsoccr_set_log(SOCCR_LOG_ERR, sink_that_sets);
	CHECK(libsoccr_pause(-1) == NULL && messages == 1);
	CHECK(libsoccr_pause(-1) == NULL && messages == 1);
	libsoccr_release(sk);
	closed(p);
}

static void sizes_of_the_data(void)
{
	struct pair p = busy("127.0.0.1");
	struct libsoccr_sk *sk = libsoccr_pause(p.server);
	struct libsoccr_sk_data exact;
	union {
		struct libsoccr_sk_data data;
		unsigned char bytes[200];
	} larger;

	CHECK(sizeof(struct libsoccr_sk_data) == 68);
	memset(&larger, 0xaa, sizeof(larger));
	CHECK(libsoccr_save(sk, &larger.data, 0) == -1 && libsoccr_save(sk, &larger.data, 67) == -1);
	CHECK(larger.bytes[0] == 0xaa && larger.bytes[66] == 0xaa);
	CHECK(libsoccr_save(sk, &exact, 68) == 68);
	CHECK(exact.state == TCP_ESTABLISHED && exact.inq_len == sizeof(TO_SERVER) && exact.outq_len == 0);
	CHECK(exact.flags == SOCCR_FLAGS_WINDOW);
	CHECK(libsoccr_save(sk, &larger.data, sizeof(larger) - 10) == 68);
	exact.timestamp = larger.data.timestamp = 0; /* it goes on */
	CHECK(memcmp(&exact, &larger.data, 68) == 0);
	for (size_t i = 68; i < sizeof(larger); i++)
		CHECK(larger.bytes[i] == (i < sizeof(larger) - 10 ? 0 : 0xaa));
	CHECK(libsoccr_restore(sk, &exact, 67) == -1);
	libsoccr_release(sk);
	closed(p);
}

static void states_that_are_refused(void)
{
	static const uint32_t states[] = { 0, TCP_SYN_RECV, TCP_TIME_WAIT, TCP_LISTEN, 12, 255, 257, UINT32_MAX };
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	struct libsoccr_sk *sk = libsoccr_pause(fd);
	struct connection c;
	struct libsoccr_sk_data data;

	connection_plain(&c, 0);
	for (size_t i = 0; i < sizeof(states) / sizeof(*states); i++) {
		c.data.state = states[i];
		CHECK(connection_restore(&c, sk) == -1);
	}
	CHECK(listen(fd, 1) == 0);
	memset(&data, 0xaa, sizeof(data));
	CHECK(libsoccr_save(sk, &data, sizeof(data)) == -2);
	CHECK(data.state == 0 && data.rcv_wup == 0);
	libsoccr_release(sk);
	close(fd);
}

static void data_that_is_refused(void)
{
	struct connection c;
	struct libsoccr_sk *sk;
	int fd;

	connection_plain(&c, 1000);
	fd = connection_socket(&c);
	sk = libsoccr_pause(fd);
	c.data.unsq_len = 1001;
	CHECK(connection_restore(&c, sk) == -1);
	c.data.unsq_len = 500;
	c.data.snd_wscale = 15;
	CHECK(connection_restore(&c, sk) == -1);
	c.data.snd_wscale = 256;
	CHECK(connection_restore(&c, sk) == -1);
	c.data.snd_wscale = 7;
	c.data.rcv_wscale = 15;
	CHECK(connection_restore(&c, sk) == -1);
	c.data.rcv_wscale = 7;
	c.source.sa.sa_family = AF_UNIX;
	CHECK(connection_restore(&c, sk) == -1);
	c.source.sa.sa_family = AF_INET;
	c.destination.sa.sa_family = AF_UNSPEC;
	CHECK(connection_restore(&c, sk) == -1);
	c.destination.sa.sa_family = AF_INET;
	libsoccr_set_queue_bytes(sk, TCP_SEND_QUEUE, NULL, 0);
	CHECK(libsoccr_restore(sk, &c.data, sizeof(c.data)) == -1);
	/* None of them has touched the socket. */
	CHECK(connection_restore(&c, sk) == 0);
	libsoccr_release(sk);
	close(fd);

	fd = connection_socket(&c);
	sk = libsoccr_pause(fd);
	CHECK(libsoccr_restore(sk, &c.data, sizeof(c.data)) == -1);
	CHECK(libsoccr_set_addr(sk, 1, &c.source, 0) == 0);
	CHECK(libsoccr_restore(sk, &c.data, sizeof(c.data)) == -1);
	libsoccr_resume(sk);
	close(fd);
	connection_free(&c);
}

static void got_queues(void)
{
	struct pair p = busy("::1");
	struct libsoccr_sk *sk = libsoccr_pause(p.server);
	struct libsoccr_sk_data data;
	char *bytes, *again;

	CHECK(libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, SOCCR_MEM_EXCL) == NULL);
	CHECK(libsoccr_save(sk, &data, sizeof(data)) == 68);
	CHECK(libsoccr_get_queue_bytes(sk, TCP_SEND_QUEUE, 0) == NULL);
	CHECK(libsoccr_get_queue_bytes(sk, 0, 0) == NULL && libsoccr_get_queue_bytes(sk, 3, 0) == NULL);
	CHECK(libsoccr_get_queue_bytes(sk, -1, 0) == NULL);
	bytes = libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, 0);
	CHECK(bytes && data.inq_len == sizeof(TO_SERVER) && memcmp(bytes, TO_SERVER, data.inq_len) == 0);
	CHECK(libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, 0) == bytes);

	/* Taken by us: the handle has none any more, and its end does not free it. */
	CHECK(libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, SOCCR_MEM_EXCL) == bytes);
	CHECK(libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, 0) == NULL);
	CHECK(libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, SOCCR_MEM_EXCL) == NULL);

	/* A second save, and a third that replaces what nobody took. */
	CHECK(libsoccr_save(sk, &data, sizeof(data)) == 68 && libsoccr_save(sk, &data, sizeof(data)) == 68);
	again = libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, 0);
	CHECK(again && again != bytes && memcmp(again, bytes, data.inq_len) == 0);
	libsoccr_resume(sk);
	CHECK(memcmp(bytes, TO_SERVER, sizeof(TO_SERVER)) == 0);
	free(bytes);
	closed(p);
}

static void set_queues(void)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	struct libsoccr_sk *sk = libsoccr_pause(fd);
	char ours[] = "ours", *first = copy("first", 6), *second = copy("second", 7);

	/* Ours stays ours. */
	CHECK(libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, ours, 0) == 0);
	CHECK(libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, 0) == ours);
	/* Given twice, given again, replaced: each is freed once. */
	CHECK(libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, first, SOCCR_MEM_EXCL) == 0);
	CHECK(libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, first, SOCCR_MEM_EXCL) == 0);
	CHECK(libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, first, 0) == 0);
	CHECK(strcmp(first, "first") == 0);
	CHECK(libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, second, SOCCR_MEM_EXCL) == 0);
	/* Given and taken back. */
	CHECK(libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, SOCCR_MEM_EXCL) == second);
	CHECK(libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, ours, 0) == 0);
	free(second);
	/* Given, then none. */
	CHECK(libsoccr_set_queue_bytes(sk, TCP_SEND_QUEUE, copy("third", 6), SOCCR_MEM_EXCL) == 0);
	CHECK(libsoccr_set_queue_bytes(sk, TCP_SEND_QUEUE, NULL, SOCCR_MEM_EXCL) == 0);
	CHECK(libsoccr_get_queue_bytes(sk, TCP_SEND_QUEUE, 0) == NULL);
	/* Left to the library's end. */
	CHECK(libsoccr_set_queue_bytes(sk, TCP_SEND_QUEUE, copy("fourth", 7), SOCCR_MEM_EXCL) == 0);
	libsoccr_release(sk);
	CHECK(strcmp(ours, "ours") == 0);
	close(fd);
}

static int same_address(const union libsoccr_addr *addr, int fd, int (*get)(int, struct sockaddr *, socklen_t *))
{
	union libsoccr_addr real;
	socklen_t len = sizeof(real);

	memset(&real, 0, sizeof(real));
	return addr && get(fd, &real.sa, &len) == 0 && memcmp(addr, &real, len) == 0;
}

static void addresses_of_a_checkpoint(const char *host)
{
	struct pair p = connected(host);
	struct libsoccr_sk *sk = libsoccr_pause(p.server);
	union libsoccr_addr *source = libsoccr_get_addr(sk, 1, 0), *destination = libsoccr_get_addr(sk, 0, 0);
	union libsoccr_addr *taken = libsoccr_get_addr(sk, 1, SOCCR_MEM_EXCL);

	CHECK(same_address(source, p.server, getsockname));
	CHECK(same_address(destination, p.server, getpeername));
	CHECK(source != destination && libsoccr_get_addr(sk, 1, 0) == source);
	CHECK(libsoccr_get_addr(sk, -1, 0) == source && libsoccr_get_addr(sk, 0, 0) == destination);
	CHECK(taken && taken != source && same_address(taken, p.server, getsockname));
	libsoccr_resume(sk);
	CHECK(same_address(taken, p.server, getsockname));
	free(taken);

	/* Only to take it. */
	sk = libsoccr_pause(p.server);
	taken = libsoccr_get_addr(sk, 0, SOCCR_MEM_EXCL);
	CHECK(same_address(taken, p.server, getpeername));
	libsoccr_release(sk);
	free(taken);
	closed(p);
}

static void addresses_of_a_restore(void)
{
	struct connection c;
	struct libsoccr_sk *sk;
	union libsoccr_addr *given = malloc(sizeof(*given)), *other = malloc(sizeof(*other)), *taken;
	int fd;

	connection_plain(&c, 0);
	fd = connection_socket(&c);
	sk = libsoccr_pause(fd);
	CHECK(libsoccr_get_addr(sk, 0, 0) == NULL && errno == ENOTCONN);
	CHECK(libsoccr_set_addr(sk, 1, &c.source, 0) == 0);
	CHECK(libsoccr_get_addr(sk, 1, 0) == &c.source);
	taken = libsoccr_get_addr(sk, 1, SOCCR_MEM_EXCL);
	CHECK(taken && taken != &c.source && memcmp(taken, &c.source, sizeof(taken->v4)) == 0);
	free(taken);
	if (!given || !other)
		die("malloc");
	*given = *other = c.destination;
	CHECK(libsoccr_set_addr(sk, 0, other, SOCCR_MEM_EXCL) == 0);
	CHECK(libsoccr_set_addr(sk, 0, given, SOCCR_MEM_EXCL) == 0);
	CHECK(libsoccr_set_addr(sk, 0, given, SOCCR_MEM_EXCL) == 0);
	CHECK(libsoccr_get_addr(sk, 0, 0) == given);
	taken = libsoccr_get_addr(sk, 0, SOCCR_MEM_EXCL);
	/* A copy: the restore still has the address. */
	CHECK(taken && taken != given && libsoccr_restore(sk, &c.data, sizeof(c.data)) == 0);
	CHECK(same_address(taken, fd, getpeername) && same_address(libsoccr_get_addr(sk, 1, 0), fd, getsockname));
	free(taken);
	libsoccr_release(sk);
	close(fd);
}

/* A program's socket is replaced by another under its peer's eyes. */
static void a_connection_moves(const char *host)
{
	struct pair p = busy(host);
	struct libsoccr_sk *from = libsoccr_pause(p.server), *to;
	struct libsoccr_sk_data data, before;
	union libsoccr_addr *source, *destination;
	char buf[256];
	int fd = socket(strchr(host, ':') ? AF_INET6 : AF_INET, SOCK_STREAM, 0);

	CHECK(libsoccr_save(from, &data, sizeof(data)) == 68);
	source = libsoccr_get_addr(from, 1, SOCCR_MEM_EXCL);
	destination = libsoccr_get_addr(from, 0, SOCCR_MEM_EXCL);
	to = libsoccr_pause(fd);
	CHECK(libsoccr_set_queue_bytes(to, TCP_RECV_QUEUE, libsoccr_get_queue_bytes(from, TCP_RECV_QUEUE, SOCCR_MEM_EXCL),
				       SOCCR_MEM_EXCL) == 0);
	CHECK(libsoccr_set_queue_bytes(to, TCP_SEND_QUEUE, libsoccr_get_queue_bytes(from, TCP_SEND_QUEUE, SOCCR_MEM_EXCL),
				       SOCCR_MEM_EXCL) == 0);
	libsoccr_release(from);
	close(p.server);
	p.server = fd;
	CHECK(libsoccr_set_addr(to, 1, source, SOCCR_MEM_EXCL) == 0);
	CHECK(libsoccr_set_addr(to, 0, destination, SOCCR_MEM_EXCL) == 0);
	before = data;
	CHECK(libsoccr_restore(to, &data, sizeof(data)) == 0);
	CHECK(memcmp(&before, &data, sizeof(data)) == 0);
	CHECK(in_repair(fd) == 1);
	libsoccr_resume(to);
	CHECK(in_repair(fd) == 0);
	CHECK(read(fd, buf, sizeof(buf)) == sizeof(TO_SERVER) && memcmp(buf, TO_SERVER, sizeof(TO_SERVER)) == 0);
	CHECK(write(fd, "answer", 7) == 7 && read(p.client, buf, sizeof(buf)) == 7 && strcmp(buf, "answer") == 0);
	CHECK(shutdown(p.client, SHUT_WR) == 0 && read(fd, buf, sizeof(buf)) == 0);
	closed(p);
}

/* Each call that a save makes fails once; the handle stays good. */
static void a_save_fails_anywhere(void)
{
	struct pair p = busy("127.0.0.1");
	struct libsoccr_sk *sk = libsoccr_pause(p.server);
	struct libsoccr_sk_data data;
	unsigned seen = 0;
	int queue = TCP_SEND_QUEUE, ret, n;

	if (setsockopt(p.server, IPPROTO_TCP, TCP_REPAIR_QUEUE, &queue, sizeof(queue)) || write(p.server, "x", 1) != 1)
		die("write");
	for (n = 1; n < 100; n++) {
		calls_until_failure = n;
		ignored_failure = 0;
		ret = libsoccr_save(sk, &data, sizeof(data));
		if (calls_until_failure)
			break; /* it made fewer calls */
		CHECK(ret == 68 ? ignored_failure : ret <= -2 && ret >= -6);
		if (ret < 0) {
			seen |= 1u << -ret;
			CHECK(errno == ENOBUFS && data.state == 0 && data.inq_len == 0);
		}
	}
	calls_until_failure = 0;
	CHECK(n > 8 && n < 100 && ret == 68);
	CHECK(seen == 0x7c); /* -2 to -6 */
	malloc_to_fail = sizeof(TO_SERVER) + 1;
	CHECK(libsoccr_save(sk, &data, sizeof(data)) == -5 && errno == ENOMEM);
	malloc_to_fail = 0;
	CHECK(libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, 0) == NULL);
	CHECK(libsoccr_save(sk, &data, sizeof(data)) == 68 && data.inq_len == sizeof(TO_SERVER));
	CHECK(data.outq_len == 1 && *libsoccr_get_queue_bytes(sk, TCP_SEND_QUEUE, 0) == 'x');
	libsoccr_resume(sk);
	closed(p);
}

/* Each call that a restore makes fails once; all memory is the library's. */
static void a_restore_fails_anywhere(void)
{
	int ret = -1, n;

	for (n = 1; n < 100 && ret; n++) {
		union libsoccr_addr *source = malloc(sizeof(*source)), *destination = malloc(sizeof(*destination));
		struct libsoccr_sk *sk;
		struct connection c;
		int fd;

		connection_plain(&c, 3000);
		fd = connection_socket(&c);
		sk = libsoccr_pause(fd);
		if (!sk || !source || !destination)
			die("libsoccr_pause");
		*source = c.source;
		*destination = c.destination;
		libsoccr_set_queue_bytes(sk, TCP_RECV_QUEUE, c.inq, SOCCR_MEM_EXCL);
		libsoccr_set_queue_bytes(sk, TCP_SEND_QUEUE, c.outq, SOCCR_MEM_EXCL);
		libsoccr_set_addr(sk, 1, source, SOCCR_MEM_EXCL);
		libsoccr_set_addr(sk, 0, destination, SOCCR_MEM_EXCL);
		calls_until_failure = n;
		ignored_failure = 0;
		ret = libsoccr_restore(sk, &c.data, sizeof(c.data));
		CHECK(ret ? calls_until_failure == 0 && errno == ENOBUFS : calls_until_failure || ignored_failure);
		if (ret == 0 && calls_until_failure == 0)
			ret = 1; /* that one may fail: on to the next */
		calls_until_failure = 0;
		if (n % 2)
			libsoccr_release(sk);
		else
			libsoccr_resume(sk);
		close(fd);
	}
	CHECK(ret == 0 && n > 12);
}

static int send_buffer(int fd)
{
	int size = 0;
	socklen_t len = sizeof(size);

	CHECK(getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, &len) == 0);
	return size;
}

/* A queue that does not fit into the socket's buffer goes in all the same, and the buffer is what it was. */
static void a_buffer_that_is_too_small(void)
{
	struct connection c;
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	struct libsoccr_sk *sk = libsoccr_pause(fd);
	int size = send_buffer(fd);

	connection_plain(&c, 0);
	c.data.outq_len = 16 << 20;
	CHECK(size < (16 << 20));
	CHECK(libsoccr_set_queue_bytes(sk, TCP_SEND_QUEUE, calloc(1, c.data.outq_len), SOCCR_MEM_EXCL) == 0);
	CHECK(libsoccr_set_addr(sk, 1, &c.source, 0) == 0 && libsoccr_set_addr(sk, 0, &c.destination, 0) == 0);
	CHECK(libsoccr_restore(sk, &c.data, sizeof(c.data)) == 0);
	CHECK(send_buffer(fd) >= size && send_buffer(fd) < (16 << 20));
	libsoccr_release(sk);
	close(fd);
}

static void closed_under_the_handle(void)
{
	struct pair p = busy("127.0.0.1");
	struct libsoccr_sk *sk = libsoccr_pause(p.server);
	struct libsoccr_sk_data data;
	char *bytes;

	CHECK(libsoccr_save(sk, &data, sizeof(data)) == 68);
	close(p.server);
	bytes = libsoccr_get_queue_bytes(sk, TCP_RECV_QUEUE, 0);
	CHECK(bytes && memcmp(bytes, TO_SERVER, sizeof(TO_SERVER)) == 0);
	CHECK(libsoccr_save(sk, &data, sizeof(data)) == -2 && errno == EBADF);
	CHECK(libsoccr_get_addr(sk, 1, 0) == NULL);
	libsoccr_resume(sk);
	close(p.client);
}

int main(void)
{
	null_and_wrong_arguments();
	what_cannot_be_paused();
	pause_resume_release();
	the_log();
	libsoccr_set_log(0, NULL);
	sizes_of_the_data();
	states_that_are_refused();
	data_that_is_refused();
	got_queues();
	set_queues();
	addresses_of_a_checkpoint("127.0.0.1");
	addresses_of_a_checkpoint("::1");
	addresses_of_a_checkpoint("::ffff:127.0.0.1");
	addresses_of_a_restore();
	a_connection_moves("127.0.0.1");
	a_connection_moves("::1");
	a_connection_moves("::ffff:127.0.0.1");
	a_save_fails_anywhere();
	a_restore_fails_anywhere();
	a_buffer_that_is_too_small();
	closed_under_the_handle();
	printf("api: %u checks, %u failed\n", checks, failures);
	return failures != 0;
}
