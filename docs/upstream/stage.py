"""Namespaces of a script's own, with a server, its clients and stock CRIU in them.

Nothing else is needed than root, python3, iproute2, nftables and iptables; $CRIU names another criu. The server is in the
script's network namespace, 10.0.0.1:7000; its clients are in another, 10.0.0.2, behind a veth pair. The script ends
with 0 if what it is about was seen.
"""

import contextlib
import ctypes
import os
import pathlib
import resource
import select
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
CRIU = os.environ.get("CRIU", ROOT / "target/criu/criu/criu")
ADDRESS = ("10.0.0.1", 7000)
CLONE_NEWNET = 0x40000000
PATIENCE = 2
LIBC = ctypes.CDLL(None, use_errno=True)

# Sends back what it gets, over any number of connections.
ECHO = """
import select, socket
listener = socket.create_server(("10.0.0.1", 7000), backlog=4096)
epoll, streams = select.epoll(), {}
epoll.register(listener, select.EPOLLIN)
print("ready", flush=True)
while True:
    for fd, _ in epoll.poll():
        if fd == listener.fileno():
            stream = listener.accept()[0]
            streams[stream.fileno()] = stream
            epoll.register(stream, select.EPOLLIN)
        elif data := streams[fd].recv(4096):
            streams[fd].sendall(data)
        else:
            del streams[fd]
"""


def run(main):
    """Calls main() in fresh network, mount and PID namespaces, and exits with whether it returned true."""
    if os.getpid() != 1:
        # CRIU refuses tasks that have a file from a mount outside of their namespace.
        os.closerange(3, 1 << 16)
        shell = 'mount -t tmpfs tmpfs /run && exec "$@"'
        unshare = "unshare --net --mount --pid --fork --kill-child --mount-proc --propagation private sh -c".split()
        os.execvp("unshare", [*unshare, shell, "sh", sys.executable, *sys.argv])
    os.environ["PATH"] = "/usr/bin:/usr/sbin:/sbin:" + os.environ["PATH"]
    os.environ["TMPDIR"] = "/run"
    many = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (many, many))
    for line in (
        "link set lo up",
        "netns add clients",
        "link add server type veth peer name client netns clients",
        "-n clients link set lo up",
        "addr add 10.0.0.1/24 dev server",
        "link set server up",
        "-n clients addr add 10.0.0.2/24 dev client",
        "-n clients link set client up",
    ):
        subprocess.run(["ip", *line.split()], check=True)
    shown = main()
    print("shown" if shown else "NOT shown")
    sys.exit(not shown)


def serve(program=ECHO, before=()):
    """A python program as the tree to dump; returns once it has printed a line, `said`."""
    server = subprocess.Popen(
        [*before, "/usr/bin/python3", "-c", program],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    server.said = server.stdout.readline().decode()
    return server


@contextlib.contextmanager
def namespace(name):
    here = os.open("/proc/self/ns/net", os.O_RDONLY)
    with open(f"/run/netns/{name}") as there:
        enter(there.fileno())
    try:
        yield
    finally:
        enter(here)
        os.close(here)


def enter(descriptor):
    if LIBC.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def connect(number=1):
    with namespace("clients"):
        return [socket.create_connection(ADDRESS, timeout=PATIENCE) for _ in range(number)]


def answered(clients):
    """How many of them get back what they send now."""
    poll, waiting = select.poll(), {}
    for client in clients:
        with contextlib.suppress(OSError):
            client.send(b"?")
            poll.register(client, select.POLLIN)
            waiting[client.fileno()] = client
    alive, deadline = 0, time.monotonic() + PATIENCE
    while waiting and (left := deadline - time.monotonic()) > 0:
        for fd, _ in poll.poll(left * 1000):
            poll.unregister(fd)
            with contextlib.suppress(OSError):
                alive += bool(waiting.pop(fd).recv(4096))
    return alive


def criu(action, images, *options):
    """Runs it, and returns how it ended and its log."""
    command = [CRIU, action, "-D", images, "-v4", "-o", f"{action}.log", *options]
    ended = subprocess.run(command, capture_output=True, text=True)
    log = pathlib.Path(images, f"{action}.log").read_text(errors="replace")
    return ended.returncode, log + ended.stderr


def images():
    return tempfile.mkdtemp()


def errors(log):
    return [line for line in log.splitlines() if "Error (" in line]


def there_and_back(server, *options):
    """Dumps and restores the server, which CRIU kills in between."""
    folder = images()
    for action, more in (("dump", ["-t", str(server.pid)]), ("restore", ["-d"])):
        status, log = criu(action, folder, *more, *options)
        if status:
            sys.exit(f"criu {action} ended with {status}:\n" + "\n".join(errors(log)))
        if action == "dump":
            server.wait()  # its pid is needed again


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
