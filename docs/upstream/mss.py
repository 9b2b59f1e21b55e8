#!/usr/bin/python3
"""The segment size of a restored connection is 524, for good, where it was 1448.

The kernel computes the size to send (mss_cache) in connect(), when a socket in repair mode knows nothing of the peer yet and so takes
536. TCPOPT_MAXSEG among the repair options, later, changes the bound and does not compute anew. Either of these cures it:
TCP_MAXSEG = the bound before connect() and the program's own value after (at most 32767, too little for lo), or, on IPv4, an empty
IP_OPTIONS after the repair options.
"""

import re

import stage


def segment_size():
    return int(re.search(r" mss:(\d+)", stage.output("ss", "-tinH", "state", "established", "sport = :7000"))[1])


def main():
    server = stage.serve()
    clients = stage.connect()
    assert stage.answered(clients)
    before = segment_size()
    stage.there_and_back(server, "--tcp-established", "--network-lock", "nftables")
    assert stage.answered(clients)
    after = segment_size()
    print(f"segment size of the server's socket: {before} before the dump, {after} after the restore")
    return after < before


stage.run(main)
