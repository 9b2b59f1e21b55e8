#!/usr/bin/python3
"""client.py STREAMS ADDRESS PORT [ADDRESS PORT]…: keeps streams to an echo server going, in turn to each of its
addresses, and looks at every byte that comes back.

Packets shall be on the way at every moment of a freeze. So every other stream has a window wide open and sends new
segments, whether or not the old ones are answered; the others retransmit, each at its own pace.

Prints `ready` once all streams run. Each line on stdin asks for a verdict: a stream is alive when all that it had sent
by then and PROOF bytes more have come back within PATIENCE. A verdict is one line of JSON.
"""

import contextlib
import errno
import json
import os
import random
import selectors
import socket
import sys
import time

BURST = 16 << 10  # to open the window
OPENING = 1 << 20
DRIP = 128
WINDOW = 128 << 10  # bytes on the way at most
PROOF = 4 << 10
TICK = 0.01
SLOWER = int(os.environ.get("SOCCR_RUNTIMES_SLOWER", "1"))
PATIENCE = 20 * SLOWER
CONNECTING = 20 * SLOWER
TCP_RTO_MAX_MS, TCP_RTO_MIN_US = 44, 45  # since Linux 6.15 and 6.17


class Stream:
    def __init__(self, number, address):
        # A prime length: no shift by a chunk or a window shows the same bytes.
        self.pattern = random.Random(number).randbytes(65521) * 2
        self.socket = connect(address)
        set_pace(self.socket, number)
        self.port = self.socket.getsockname()[1]
        self.sent = self.received = 0
        self.goal = None
        self.end = None  # why it is dead
        self.heard = time.monotonic()
        self.silence = 0.0

    def bytes(self, offset, length):
        start = offset % 65521
        return self.pattern[start : start + length]

    def write(self):
        with self.ending():
            length = BURST if self.sent < OPENING else DRIP
            while self.sent - self.received < WINDOW:
                self.sent += self.socket.send(self.bytes(self.sent, length))
                if length == DRIP:
                    break

    def read(self):
        with self.ending():
            data = self.socket.recv(BURST)
            now = time.monotonic()
            self.silence, self.heard = max(self.silence, now - self.heard), now
            if not data:
                self.end = "ended"
            elif data != self.bytes(self.received, len(data)):
                self.end = "wrong content"
            self.received += len(data)

    def ending(self):
        return Ending(self)

    def done(self):
        return self.end or (self.goal is not None and self.received >= self.goal)


class Ending:
    """A socket's error ends its stream."""

    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        pass

    def __exit__(self, kind, error, trace):
        if isinstance(error, BlockingIOError):
            return True
        if isinstance(error, OSError):
            self.stream.end = errno.errorcode.get(error.errno, str(error))
            return True
        return False


def connect(address):
    deadline = time.monotonic() + CONNECTING
    while True:
        try:
            found = socket.create_connection(address, timeout=1)
        except OSError:
            # Nobody listens yet.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
            continue
        found.setblocking(False)
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return found


def set_pace(sock, number):
    """An old kernel has one pace for all."""
    earliest = 1_000_000 if number % 2 else 5000 * (1 + number // 2)
    for option, value in ((TCP_RTO_MIN_US, earliest), (TCP_RTO_MAX_MS, 1000)):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def main():
    count, *words = sys.argv[1:]
    addresses = [(ip, int(port)) for ip, port in zip(words[::2], words[1::2], strict=True)]
    streams = [Stream(number, addresses[number % len(addresses)]) for number in range(int(count))]
    selector = selectors.DefaultSelector()
    for stream in streams:
        selector.register(stream.socket, selectors.EVENT_READ, stream)
    run(selector, streams, lambda: all(stream.received >= OPENING or stream.end for stream in streams))
    print("ready", flush=True)
    while asked(selector, streams):
        for stream in streams:
            stream.goal = stream.sent + PROOF
        deadline = time.monotonic() + PATIENCE
        run(selector, streams, lambda: all(s.done() for s in streams) or time.monotonic() > deadline)  # noqa: B023
        print(json.dumps(verdict(streams)), flush=True)


def asked(selector, streams):
    """Waits for a line on stdin; whether there is one."""
    heard = []
    selector.register(sys.stdin, selectors.EVENT_READ)
    run(selector, streams, lambda: heard, lambda: heard.append(os.read(0, 100)))
    selector.unregister(sys.stdin)
    return heard[0]


def run(selector, streams, done, hear=None):
    tick = 0
    while not done():
        for key, _ in selector.select(TICK):
            if key.data:
                key.data.read()
                if key.data.end:
                    selector.unregister(key.fileobj)
            else:
                hear()
        if (now := time.monotonic()) >= tick:
            tick = now + TICK
            for stream in streams:
                if not stream.end:
                    stream.write()
                    if stream.end:
                        selector.unregister(stream.socket)


def verdict(streams):
    ends = {}
    for stream in streams:
        if not stream.done():
            stream.end = "silent"
        if stream.end:
            ends.setdefault(stream.end, []).append(stream.port)
    alive = [stream for stream in streams if not stream.end]
    silences = [round(stream.silence, 3) for stream in alive]
    for stream in streams:
        stream.silence = 0.0
    return {
        "alive": len(alive),
        "ends": {end: len(ports) for end, ports in ends.items()},
        "ports": ends,
        "silences": silences,
        "bytes": sum(stream.received for stream in streams),
    }


main()
