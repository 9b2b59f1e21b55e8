#!/usr/bin/python3
"""criu is killed while the tree has a network namespace of its own: the tree runs on, cut off from everybody, for good.

CRIU locks such a namespace as a whole, by the iptables chain `CRIU` or by a table, and only that criu removes it; nor does anybody but
it end the sockets' repair mode. Here its own post-dump script kills it; the out-of-memory killer or a runtime's timeout
does so as well.
"""

import os
import pathlib
import socket

import stage

SYS_PIDFD_GETFD = 438
TCP_REPAIR, TCP_REPAIR_OFF_NO_WP = 19, -1


def end_repair(pid):
    """How many of its connections were in repair mode."""
    task, ended = os.pidfd_open(pid), 0
    for fd in map(int, os.listdir(f"/proc/{pid}/fd")):
        if os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:"):
            connection = socket.socket(fileno=stage.LIBC.syscall(SYS_PIDFD_GETFD, task, fd, 0))
            if connection.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR) == 1:
                connection.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_OFF_NO_WP)
                ended += 1
    return ended


def main():
    server = stage.serve()
    client = stage.connect()
    print("answered before:", before := stage.answered(client))
    folder = stage.images()
    script = pathlib.Path(folder, "killer")
    script.write_text('#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != post-dump ] || kill -KILL $PPID\n')
    script.chmod(0o700)
    namespace = f"net[{os.stat('/proc/self/ns/net').st_ino}]:server"
    # As container runtimes do it: criu is outside of the tree's namespace.
    with stage.namespace("clients"):
        status, _ = stage.criu(
            "dump", folder, "-t", str(server.pid), "--tcp-established", "--external", namespace, "--action-script", script
        )
    rules = [line for line in stage.output("iptables-save").splitlines() if "CRIU" in line]
    print(f"criu dump ended with {status}; the server {'runs on' if server.poll() is None else 'is dead'}")
    print("left in its namespace:", *rules, sep="\n  ")
    print("left in repair mode:", end_repair(server.pid), "(ended by this script)")
    print("answered now:", during := stage.answered(client))
    stage.output("iptables", "-F")
    print("answered after `iptables -F`:", after := stage.answered(client))
    return before and rules and not during and after


stage.run(main)
