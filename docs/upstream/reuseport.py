#!/usr/bin/python3
"""SO_REUSEPORT of a restored connection is 1 where it was 0.

CRIU turns SO_REUSEADDR and SO_REUSEPORT on before bind(), so that sockets can share a port, and puts both back in a listener. In a
connection it puts back the first alone.
"""

import stage

SERVER = """
import socket
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("10.0.0.1", 7000))
listener.listen()
print("ready", flush=True)
stream = listener.accept()[0]
while stream.recv(4096):
    options = [s.getsockopt(socket.SOL_SOCKET, o) for s in (listener, stream) for o in (socket.SO_REUSEADDR, socket.SO_REUSEPORT)]
    stream.sendall("listener: {} {}; connection: {} {}".format(*options).encode())
"""


def main():
    server = stage.serve(SERVER)
    [client] = stage.connect()

    def ask():
        client.send(b"?")
        return client.recv(4096).decode()

    before = ask()
    stage.there_and_back(server, "--tcp-established", "--network-lock", "nftables")
    after = ask()
    print("SO_REUSEADDR and SO_REUSEPORT, asked by the server")
    print(" before the dump:    ", before)
    print(" after the restore:  ", after)
    return before != after and after.endswith(" 1")


stage.run(main)
