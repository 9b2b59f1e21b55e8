/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * Connections made up for tests: they exist nowhere but in the socket that they are restored into.
 * The tests run in a network namespace that drops every packet but the marked ones (tests/run).
 */
#ifndef CONNECTION_H
#define CONNECTION_H

#include <stdint.h>

#include "soccr.h"

struct connection {
	int family; /* of the socket: AF_INET or AF_INET6 */
	union libsoccr_addr source, destination;
	struct libsoccr_sk_data data;
	char *inq, *outq; /* data.inq_len and data.outq_len bytes */
};

/* Prints what failed, with errno, and ends the program. */
_Noreturn void die(const char *what);

/* An ESTABLISHED connection with so many bytes in each queue, half of those to send never sent. */
void connection_plain(struct connection *c, uint32_t queued);

/* A connection of any state and shape; the same for the same value of *random. */
void connection_random(struct connection *c, uint64_t *random);

void connection_free(struct connection *c);

/* A fresh non-blocking socket for it, with buffers that hold the queues. */
int connection_socket(const struct connection *c);

/* Restores it into the socket of a paused handle; what libsoccr_restore() returns. */
int connection_restore(struct connection *c, struct libsoccr_sk *sk);

uint64_t random_next(uint64_t *state);

/* One of 0 .. below - 1. */
uint32_t random_below(uint64_t *state, uint32_t below);

#endif
