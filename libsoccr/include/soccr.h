/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * libsoccr: checkpoint and restore of one TCP connection through the kernel's TCP_REPAIR mode.
 * Written by scripts/header from libsoccr/src; change it there.
 *
 * Checkpoint, with the connection's packets kept away from the socket in both directions:
 *
 *     h = libsoccr_pause(fd);
 *     libsoccr_save(h, &data, sizeof(data));
 *     inq = libsoccr_get_queue_bytes(h, TCP_RECV_QUEUE, 0);     data.inq_len bytes
 *     outq = libsoccr_get_queue_bytes(h, TCP_SEND_QUEUE, 0);    data.outq_len bytes
 *     source = libsoccr_get_addr(h, 1, 0);
 *     destination = libsoccr_get_addr(h, 0, 0);
 *     ... store all of it, then either
 *     libsoccr_resume(h);                  the program goes on
 *     libsoccr_release(h); close(fd);      the connection leaves this host: no FIN, no RST
 *
 * Restore, into a fresh socket of the same address family:
 *
 *     h = libsoccr_pause(fd);
 *     libsoccr_set_queue_bytes(h, TCP_RECV_QUEUE, inq, 0);
 *     libsoccr_set_queue_bytes(h, TCP_SEND_QUEUE, outq, 0);
 *     libsoccr_set_addr(h, 1, source, 0);
 *     libsoccr_set_addr(h, 0, destination, 0);
 *     libsoccr_restore(h, &data, sizeof(data));
 *     ... let the packets pass again
 *     libsoccr_resume(h);
 *
 * A handle belongs to one thread at a time; different handles may be used by different threads.
 */

#ifndef SOCCR_H
#define SOCCR_H

#include <netinet/in.h> /* struct sockaddr_in, struct sockaddr_in6 */
#include <stdint.h>
#include <sys/socket.h> /* struct sockaddr */

/*
 * TCP_RECV_QUEUE, TCP_SEND_QUEUE, struct tcp_repair_window and their like come from the system.
 * The kernel's <linux/tcp.h> and libc's <netinet/tcp.h> exclude each other, so the one that the
 * program chose stays alone. A program that needs the kernel's must include it before this header.
 */
#if defined(_LINUX_TCP_H) || defined(_UAPI_LINUX_TCP_H)
#define SOCCR_HAS_REPAIR
#ifdef TCP_REPAIR_WINDOW
#define SOCCR_HAS_REPAIR_WINDOW
#endif
#else
#include <netinet/tcp.h>
#if defined(__GLIBC__) && !defined(__USE_MISC) && !defined(CONFIG_HAS_TCP_REPAIR)
/* A strict -std= mode: here glibc has only the option numbers, and the kernel's header fits in. */
#include <linux/tcp.h>
#define SOCCR_HAS_REPAIR
#define SOCCR_HAS_REPAIR_WINDOW
#elif defined(__GLIBC__)
#define SOCCR_HAS_REPAIR
#endif
/* glibc 2.29 and musl 1.2 brought the structure together with the newer option numbers. */
#if defined(TCP_INQ) && (defined(__USE_MISC) || defined(_GNU_SOURCE))
#define SOCCR_HAS_REPAIR_WINDOW
#endif
#endif

/* What the system lacks. CRIU's CONFIG_HAS_ macros say that it lacks nothing. */
#if !defined(SOCCR_HAS_REPAIR) && !defined(CONFIG_HAS_TCP_REPAIR)
struct tcp_repair_opt {
    uint32_t opt_code;
    uint32_t opt_val;
};
#ifndef TCP_RECV_QUEUE
#define TCP_NO_QUEUE 0
#define TCP_RECV_QUEUE 1
#define TCP_SEND_QUEUE 2
#define TCP_QUEUES_NR 3
#endif
#endif

#if !defined(SOCCR_HAS_REPAIR_WINDOW) && !defined(CONFIG_HAS_TCP_REPAIR_WINDOW)
struct tcp_repair_window {
    uint32_t snd_wl1;
    uint32_t snd_wnd;
    uint32_t max_window;
    uint32_t rcv_wnd;
    uint32_t rcv_wup;
};
#endif

#ifndef TCP_TIMESTAMP
#define TCP_TIMESTAMP 24
#endif
#ifndef TCP_REPAIR_WINDOW
#define TCP_REPAIR_WINDOW 29
#endif

#undef SOCCR_HAS_REPAIR
#undef SOCCR_HAS_REPAIR_WINDOW

/**
 * Packets with this mark (0xC114) must pass whatever blocks a connection's packets: the
 * segments that the library forges to bring a FIN into a receive queue carry it.
 */
#define SOCCR_MARK 49428

/**
 * In a call's flags: the memory changes owner. What is got must be free()d by the caller; what
 * is set is free()d by the library, whatever comes of the handle. A call that fails takes
 * nothing.
 */
#define SOCCR_MEM_EXCL 1

/**
 * In libsoccr_sk_data.flags: the five window fields hold data, 0 included (since Linux 4.8).
 */
#define SOCCR_FLAGS_WINDOW 1

/**
 * Level of messages about what went wrong.
 */
#define SOCCR_LOG_ERR 1

/**
 * Level of messages about what is being done.
 */
#define SOCCR_LOG_DBG 2

/**
 * A socket in repair mode, together with what was saved from it or set for its restore.
 */
struct libsoccr_sk;

/**
 * What a connection is, apart from its addresses and the bytes in its queues. Sequences are in
 * host byte order and count a FIN; lengths are in bytes and do not.
 */
struct libsoccr_sk_data {
    /**
     * TCP_ESTABLISHED, TCP_SYN_SENT, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_CLOSE_WAIT,
     * TCP_LAST_ACK, TCP_CLOSING or TCP_CLOSE.
     */
    uint32_t state;
    /**
     * Bytes received and not read yet.
     */
    uint32_t inq_len;
    /**
     * Sequence of the next byte to be received (rcv_nxt).
     */
    uint32_t inq_seq;
    /**
     * Bytes written and not acknowledged yet.
     */
    uint32_t outq_len;
    /**
     * Sequence of the next byte to be written (write_seq).
     */
    uint32_t outq_seq;
    /**
     * How many of outq_len, the last of them, were never sent.
     */
    uint32_t unsq_len;
    /**
     * TCPI_OPT_ bits: what the ends agreed on.
     */
    uint32_t opt_mask;
    /**
     * The largest segment that the peer takes.
     */
    uint32_t mss_clamp;
    /**
     * Shift of the windows that the peer announces, with TCPI_OPT_WSCALE.
     */
    uint32_t snd_wscale;
    /**
     * Shift of the windows that we announce, with TCPI_OPT_WSCALE.
     */
    uint32_t rcv_wscale;
    /**
     * The timestamp clock, with TCPI_OPT_TIMESTAMPS.
     */
    uint32_t timestamp;
    /**
     * SOCCR_FLAGS_ bits: which of the fields below hold data.
     */
    uint32_t flags;
    /**
     * SOCCR_FLAGS_WINDOW: sequence of the segment that last updated snd_wnd.
     */
    uint32_t snd_wl1;
    /**
     * SOCCR_FLAGS_WINDOW: the peer's window.
     */
    uint32_t snd_wnd;
    /**
     * SOCCR_FLAGS_WINDOW: the largest window that the peer ever announced.
     */
    uint32_t max_window;
    /**
     * SOCCR_FLAGS_WINDOW: our window.
     */
    uint32_t rcv_wnd;
    /**
     * SOCCR_FLAGS_WINDOW: rcv_nxt when our window was last announced.
     */
    uint32_t rcv_wup;
};

/**
 * The address of one end: sa.sa_family tells which member holds it, AF_INET v4, AF_INET6 v6.
 */
union libsoccr_addr {
    /**
     * The family.
     */
    struct sockaddr sa;
    /**
     * An IPv4 address and a port.
     */
    struct sockaddr_in v4;
    /**
     * An IPv6 address, which may be an IPv4 one mapped into IPv6, and a port.
     */
    struct sockaddr_in6 v6;
};



#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Sets where messages go: log is called like printf(), for messages of at most this level. The
 * text ends with a newline. Without log, or at level 0, there are no messages.
 */
void libsoccr_set_log(unsigned int level, void (*log)(unsigned int level, const char *fmt, ...));

/**
 * Puts a TCP socket into repair mode, in which the calls below work and closing it is silent.
 * The descriptor stays the caller's and must stay open as long as the handle is in use. NULL
 * on failure, with errno set; needs CAP_NET_ADMIN in the socket's network namespace.
 */
struct libsoccr_sk *libsoccr_pause(int fd);

/**
 * Leaves repair mode, which wakes the connection, and frees the handle.
 */
void libsoccr_resume(struct libsoccr_sk *sk);

/**
 * Frees the handle and leaves the socket in repair mode.
 */
void libsoccr_release(struct libsoccr_sk *sk);

/**
 * Reads the connection into data and copies both queues into the handle. data_size is the size
 * of the caller's data, at least 68; all of it is zeroed first. Returns the number of bytes
 * filled in (68) or a negative number:
 *   -1 bad arguments
 *   -2 the state cannot be carried, or the lengths of the queues cannot be read
 *   -3 the negotiated options cannot be read
 *   -4 the windows cannot be read
 *   -5 the receive queue cannot be read
 *   -6 the send queue cannot be read
 */
int libsoccr_save(struct libsoccr_sk *sk, struct libsoccr_sk_data *data, unsigned int data_size);

/**
 * The bytes of a queue, TCP_RECV_QUEUE (data.inq_len of them) or TCP_SEND_QUEUE
 * (data.outq_len). NULL for an empty queue, any other queue_id, and unknown flags. They stay
 * the library's and die with the handle, unless flags has SOCCR_MEM_EXCL: then they are the
 * caller's, and the handle has none any more.
 */
char *libsoccr_get_queue_bytes(struct libsoccr_sk *sk, int queue_id, unsigned int flags);

/**
 * The address of one end: the source (ours) if source is not 0, otherwise the destination (the
 * peer's). It is the one that was set, or else the socket's own. NULL for a socket without
 * that address and for unknown flags. It stays the library's and dies with the handle, unless
 * flags has SOCCR_MEM_EXCL: then it is a copy that the caller must free().
 */
union libsoccr_addr *libsoccr_get_addr(struct libsoccr_sk *sk, int source, unsigned int flags);

/**
 * Gives the bytes of a queue for libsoccr_restore(), as many as its data will say; NULL for an
 * empty queue. They must live until libsoccr_restore() is through, unless flags has
 * SOCCR_MEM_EXCL: then they must come from malloc() and are the library's. 0, or -1 for
 * another queue_id or unknown flags.
 */
int libsoccr_set_queue_bytes(struct libsoccr_sk *sk, int queue_id, char *bytes, unsigned int flags);

/**
 * Gives the address of one end for libsoccr_restore(): the source (ours) if source is not 0,
 * otherwise the destination. It must live until libsoccr_restore() is through, unless flags
 * has SOCCR_MEM_EXCL: then it must come from malloc() and is the library's. 0, or -1 for NULL
 * or unknown flags.
 */
int libsoccr_set_addr(struct libsoccr_sk *sk,
                      int source,
                      union libsoccr_addr *addr,
                      unsigned int flags);

/**
 * Builds the connection in the handle's socket, which must be fresh: not bound and not
 * connected. Its buffers keep their sizes, whether the queues fit in or not. data is only read;
 * data_size is its size, at least 68. The socket stays in repair mode. 0, or a negative number:
 * then the socket is good for nothing but close().
 */
int libsoccr_restore(struct libsoccr_sk *sk, struct libsoccr_sk_data *data, unsigned int data_size);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* SOCCR_H */
