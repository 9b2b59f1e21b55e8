#!/usr/bin/python3
"""The dump of an epoll with N descriptors takes O(N²): kcmp(KCMP_EPOLL_TFD) walks the epoll's tree.

CRIU asks for each of the epoll's descriptors whether it still is what the epoll watches. The kernel answers by walking the tree from
its first entry to the one in question. /proc/PID/fdinfo/EPFD, which CRIU reads anyhow, names the inode and device of each watched file (`ino`, `sdev`):
where these are the descriptor's own, and no other descriptor of the task has them, there is nothing to ask.
"""

import ctypes
import os
import time

import stage

SYS_KCMP = {"x86_64": 312, "aarch64": 272}[os.uname().machine]
KCMP_EPOLL_TFD = 7

SERVER = """
import os, select, signal
epoll, descriptors = select.epoll(), [os.eventfd(0) for _ in range({number})]
if {watched}:
    for fd in descriptors:
        epoll.register(fd, select.EPOLLIN)
print(epoll.fileno(), *descriptors, flush=True)
signal.pause()
"""


class Slot(ctypes.Structure):
    _fields_ = [("efd", ctypes.c_uint32), ("tfd", ctypes.c_uint32), ("toff", ctypes.c_uint32)]


def kcmp_seconds(pid, epoll, descriptors):
    start = time.monotonic()
    for fd in descriptors:
        slot = Slot(epoll, fd, 0)
        if stage.LIBC.syscall(SYS_KCMP, pid, pid, KCMP_EPOLL_TFD, fd, ctypes.byref(slot)):
            raise OSError(ctypes.get_errno(), "kcmp")
    return time.monotonic() - start


def measure(number, watched):
    server = stage.serve(SERVER.format(number=number, watched=watched))
    epoll, *descriptors = map(int, server.said.split())
    asking = kcmp_seconds(server.pid, epoll, descriptors) if watched else 0
    start = time.monotonic()
    status, log = stage.criu("dump", stage.images(), "-t", str(server.pid))
    assert status == 0, stage.errors(log)
    server.wait()
    return time.monotonic() - start, asking


def main():
    print("descriptors | criu dump: none watched by the epoll | all watched | kcmp alone, for all | for each")
    cost = {}
    for number in (1000, 4000, 16000):
        plain, _ = measure(number, False)
        watched, asking = measure(number, True)
        cost[number] = asking / number
        print(f"{number:11} | {plain:34.2f} s | {watched:9.2f} s | {asking:17.2f} s | {cost[number] * 1e6:5.1f} µs")
    return cost[16000] > 4 * cost[1000]


stage.run(main)
