"""Sends back what it gets, over connections that it accepts, and over those that were handed to it: as systemd does
(LISTEN_FDS), or over a unix socket at the path that is its argument. Says a word of what has happened in a line each."""
import os
import selectors
import socket
import sys

FIRST = 3
events = selectors.DefaultSelector()


def add(connection):
    connection.setblocking(True)
    events.register(connection, selectors.EVENT_READ, echo)


def accept(listener):
    add(listener.accept()[0])


def echo(connection):
    data = connection.recv(1 << 16)
    if data:
        connection.sendall(data)
    else:
        events.unregister(connection)
        connection.close()
        say("end")


def receive(unix):
    text, descriptors, _, _ = socket.recv_fds(unix, 1 << 16, 253)
    if not text:
        events.unregister(unix)
        say("received")
    for descriptor in descriptors:
        add(socket.socket(fileno=descriptor))


def say(word):
    print(word, flush=True)


if os.environ.get("LISTEN_PID") == str(os.getpid()):
    for number, _ in enumerate(os.environ["LISTEN_FDNAMES"].split(":")):
        add(socket.socket(fileno=FIRST + number))
    assert number + 1 == int(os.environ["LISTEN_FDS"])
    say("ready")
elif len(sys.argv) > 1:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    say("ready")
    events.register(listener.accept()[0], selectors.EVENT_READ, receive)
else:
    listener = socket.create_server(("192.0.2.1", 0))
    events.register(listener, selectors.EVENT_READ, accept)
    say("ready %s:%d" % listener.getsockname())
while True:
    for key, _ in events.select():
        key.data(key.fileobj)
