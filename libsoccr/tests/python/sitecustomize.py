"""Lets CRIU's soccr/test/run.py and tcp-test.py, written for Python 2, run on Python 3 as they are.

Python imports this by itself from PYTHONPATH. Where they hand text to pipes, sockets and hashes, it becomes bytes.
"""

import functools
import hashlib
import socket
import subprocess


class Digest:
    """A hashlib object that takes text, too."""

    def __init__(self, digest):
        self._digest = digest
        self.hexdigest = digest.hexdigest

    def update(self, data):
        self._digest.update(data.encode() if isinstance(data, str) else data)


class Socket(socket.socket):
    """A socket that sends text, too; all of it, as a blocking socket of Python 2 did."""

    def send(self, data, *flags):
        data = data.encode() if isinstance(data, str) else data
        self.sendall(data, *flags)
        return len(data)


md5 = hashlib.md5
hashlib.md5 = lambda: Digest(md5())
socket.fromfd = lambda fd, *kind: Socket(*kind, fileno=fd)
subprocess.Popen = functools.partial(subprocess.Popen, text=True)
