#!/usr/bin/python3
"""`--network-lock nftables` and a thousand connections: criu aborts, and what it did until then stays.

CRIU holds a descriptor for each socket in repair mode. libnftables, which it asks for each connection's rules, waits with select(),
whose sets end at descriptor 1023.
"""

import stage

CONNECTIONS = 1050


def main():
    server = stage.serve()
    clients = stage.connect(CONNECTIONS)
    before = stage.answered(clients)
    status, log = stage.criu(
        "dump", stage.images(), "-t", str(server.pid), "--tcp-established", "--network-lock", "nftables"
    )
    after = stage.answered(clients)
    tables = [line for line in stage.output("nft", "list", "tables").splitlines() if "CRIU" in line]
    print(f"answered before: {before} of {CONNECTIONS}")
    print(f"criu dump ended with {status}:", *[line for line in log.splitlines() if "FD_SETSIZE" in line])
    print(f"the server {'runs on' if server.poll() is None else 'is dead'}; answered: {after} of {CONNECTIONS}")
    print("left on the host:", *tables)
    return before == CONNECTIONS and status == -6 and tables and after < CONNECTIONS


stage.run(main)
