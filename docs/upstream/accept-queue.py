#!/usr/bin/python3
"""One connection that nobody has accepted yet makes the whole dump fail.

A busy server nearly always has one. `--skip-in-flight` drops them. They can be carried: accept() on a duplicate of the listener takes them out of the
queue, behind the lock; since Linux 6.9 bpf_sk_assign_tcp_reqsk() puts them back into the listener's queue after the restore.
"""

import stage

SERVER = """
import signal, socket
listener = socket.create_server(("10.0.0.1", 7000))
print("ready", flush=True)
signal.pause()
"""


def main():
    server = stage.serve(SERVER)
    clients = stage.connect()
    status, log = stage.criu("dump", stage.images(), "-t", str(server.pid), "--tcp-established")
    print(f"criu dump with {len(clients)} connection in the accept queue ended with {status}:")
    print(*[" " + line.partition("Error ")[2] for line in stage.errors(log)], sep="\n")
    return status == 1 and "In-flight connection" in log


stage.run(main)
