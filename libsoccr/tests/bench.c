/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * What a save and a restore cost with the library that this is linked with.
 * bench QUEUED ROUNDS: prints the medians, in ns, of pause + save and of restore + resume (with the
 * pause and the set calls before it).
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "connection.h"

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

static uint64_t median(uint64_t *values, int n)
{
	qsort(values, n, sizeof(*values), by_value);
	return values[n / 2];
}

static uint64_t restored(struct connection *c, int fd)
{
	uint64_t start = now();
	struct libsoccr_sk *sk = libsoccr_pause(fd);

	if (!sk || connection_restore(c, sk))
		die("restore");
	libsoccr_resume(sk);
	return now() - start;
}

static uint64_t saved(struct connection *c, int fd)
{
	struct libsoccr_sk_data data;
	uint64_t start = now();
	struct libsoccr_sk *sk = libsoccr_pause(fd);

	if (!sk || libsoccr_save(sk, &data, sizeof(data)) < 0)
		die("save");
	start = now() - start;
	if (data.inq_len != c->data.inq_len || data.outq_len != c->data.outq_len)
		die("another connection");
	libsoccr_release(sk);
	close(fd);
	return start;
}

int main(int argc, char **argv)
{
	uint32_t queued = argc == 3 ? (uint32_t)atol(argv[1]) : 0;
	int rounds = argc == 3 ? atoi(argv[2]) : 0;
	uint64_t *save, *restore;
	struct connection c;

	if (rounds <= 0) {
		fprintf(stderr, "usage: bench QUEUED ROUNDS\n");
		return 2;
	}
	save = calloc(rounds, sizeof(*save));
	restore = calloc(rounds, sizeof(*restore));
	if (!save || !restore)
		die("calloc");
	connection_plain(&c, queued);
	for (int i = 0; i < rounds; i++) {
		int fd = connection_socket(&c);

		restore[i] = restored(&c, fd);
		save[i] = saved(&c, fd);
	}
	printf("%llu %llu\n", (unsigned long long)median(save, rounds),
	       (unsigned long long)median(restore, rounds));
	connection_free(&c);
	free(save);
	free(restore);
	return 0;
}
