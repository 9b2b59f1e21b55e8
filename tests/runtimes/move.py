#!/usr/bin/python3
"""move.py RUNTIME CASE stock|ours LOGS: a container goes from host A to host B and back, twice; one line of JSON.

scripts/runtimes starts it as it does host.py. Here are the bridge and, in a namespace of its own, the client:

    client 10.77.0.2, fd77::2 ── bridge ── host A 10.77.0.11, fd77::11
                                       └── host B 10.77.0.12, fd77::12

Each host is a process of this program in namespaces and cgroups of its own, and does as it is told, line by line. The
container goes as the runtime's archive. With a published port the service's address, 10.77.0.1 and fd77::1, goes with
it from host to host; else the client's route to the container's network does.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from host import (
    ROOT,
    cgroup_mounts,
    client,
    configure_criu,
    disable,
    enable,
    locks,
    make_group,
    make_host,
    mount,
    own_cgroups,
    settled,
    still_new,
    wire_up,
)
from kinds import CASES, HOST, IMAGE, RUNTIMES, run, sh

MOVES = 4
NUMBERS = {"lan": 2, "a": 11, "b": 12}
SHARED = Path("/mnt")  # between the hosts
ARCHIVE = SHARED / "c.tar.gz"
NAMESPACES = "--mount --pid --ipc --uts --cgroup --fork --kill-child --mount-proc --propagation private".split()
RESETS = "table inet watch { chain resets { type filter hook prerouting priority raw; tcp flags & rst == rst counter; }; }"


def main():
    words, name = sys.argv[1:5], sys.argv[5:]
    logs = Path(words.pop(), *name)
    logs.mkdir(parents=True, exist_ok=True)
    sys.stderr = open(logs / "host.log", "w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    if name:
        Host(*words, logs).serve()
    else:
        print(json.dumps(one_round(*words, logs)), flush=True)


# --- from outside ---


def one_round(runtime, case, who, logs):
    result = {"alive": 0, "moves": [], "resets": 0, "left": []}
    try:
        make_lan()
        hosts = [Remote(name, [runtime, case, who, logs]) for name in ("a", "b")]
        [host.ask("set_up") for host in hosts]
        go_to_and_fro(Service(CASES[case], hosts), who == "ours", logs, result)
    except Exception as error:  # whatever it was: this round failed by it
        result |= {"alive": 0, "error": f"{type(error).__name__}: {error}"}
    return result


def go_to_and_fro(service, hold, logs, result):
    with client(service.targets(), "lan", logs) as streams:
        earlier = resets()
        for number in range(1, MOVES + 1):
            begin = time.monotonic()
            service.move(hold)
            seconds = round(time.monotonic() - begin, 3)
            result |= streams.verdict() | {"resets": resets() - earlier}
            move = {"seconds": seconds, "resets": result["resets"] - sum(move["resets"] for move in result["moves"])}
            result["moves"].append(move | {"silences": result.pop("silences")})
            result["left"] += [f"after move {number}: {line}" for host in service.hosts for line in host.ask("locks")]
            if not result["alive"]:
                break
    service.leave()
    service.here.ask("remove")
    result["left"] += [f"host {host.name}: {line}" for host in service.hosts for line in host.ask("left")]


def make_lan():
    groups = cgroup_mounts()
    for path in ("/run", "/tmp", SHARED):
        if not ROOT.is_relative_to(path):
            mount("-t", "tmpfs", "tmpfs", path)
    os.makedirs("/run/netns")
    mount("-t", "sysfs", "sysfs", "/sys")
    own_cgroups(groups)
    sh("ip link add br0 type bridge mcast_snooping 0")
    sh("ip link set br0 up")
    for name, number in NUMBERS.items():
        sh(f"ip netns add {name}")
        sh(f"ip link add {name}0 type veth peer name eth0 netns {name}")
        sh(f"ip link set {name}0 master br0 up")
        wire_up(name, [f"10.77.0.{number}/24", f"fd77::{number}/64"])
    run("nsenter", "--net=/run/netns/lan", "nft", "-f", "-", input=RESETS)


def resets():
    """How many RSTs the client has received."""
    words = sh("nsenter --net=/run/netns/lan nft list table inet watch").split()
    return int(words[words.index("packets") + 1])


class Service:
    """A container with what its client connects to, on one of two hosts."""

    def __init__(self, case, hosts):
        self.case = case
        self.hosts = hosts
        self.here, self.there = hosts
        self.container = {int(family): address for family, address in self.here.ask("start").items()}
        self.arrive()

    def targets(self):
        return self.case.targets(self.container)

    def move(self, hold):
        self.here.ask("export")
        if hold:
            self.there.ask("soccr", "hold")
        self.leave()
        self.here, self.there = self.there, self.here
        self.arrive()
        self.here.ask("bring_in")
        if hold:
            self.there.ask("soccr", "release")

    def leave(self):
        if self.case.to == "host":
            for address in self.alone(HOST):
                sh(f"ip -n {self.here.name} addr del {address} dev eth0")

    def arrive(self):
        """The addresses are here from now on, and the client knows."""
        if self.case.to == "container":
            gateways = (f"10.77.0.{NUMBERS[self.here.name]}", f"fd77::{NUMBERS[self.here.name]}")
            for address, gateway in zip(self.alone(self.container), gateways, strict=True):
                sh(f"ip -n lan route replace {address} via {gateway}")
            return
        for address in self.alone(HOST):
            sh(f"ip -n {self.here.name} addr add {address} dev eth0")
        inside = ["nsenter", f"--net=/run/netns/{self.here.name}"]
        run(*inside, ROOT / "target/release/soccr-test", "announce", "eth0", *HOST.values())

    @staticmethod
    def alone(addresses):
        return [f"{addresses[4]}/32", f"{addresses[6]}/128"]


class Remote:
    """A host, as it is told what to do."""

    def __init__(self, name, words):
        self.name = name
        groups = [Path(where, name) for where, _, _ in cgroup_mounts()]
        for group in groups:
            make_group(group)
        command = ["nsenter", f"--net=/run/netns/{name}", "unshare", *NAMESPACES, "/bin/bash", "-c", '"$@"; exit $?', "host"]
        self.process = subprocess.Popen(
            [*command, "/usr/bin/python3", "-B", __file__, *words, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: [(group / "cgroup.procs").write_text("0") for group in groups],
        )

    def ask(self, *words):
        print(json.dumps(words), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"host {self.name} has ended")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"host {self.name}: {answer['error']}")
        return answer["is"]


# --- inside ---


class Host:
    """One of the two."""

    def __init__(self, runtime, case, who, logs):
        kind = RUNTIMES[runtime]
        make_host(kind)
        self.case = CASES[case]
        self.is_here = False
        self.who = who
        self.runtime = kind(Path("/run/work"), logs)

    def serve(self):
        for line in sys.stdin:
            verb, *words = json.loads(line)
            try:
                answer = {"is": getattr(self, verb)(*words)}
            except Exception as error:  # for whoever asked
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)

    def set_up(self):
        """The same image on both: a container knows the one that it was made of. What a runtime keeps, it has then."""
        self.runtime.configure()
        self.configuration = configure_criu(self.runtime, self.case.network)
        if self.who == "ours":
            enable(self.runtime)
        image = SHARED / "image.tar"
        if image.exists():
            run("podman", "load", "-i", image)
        else:
            self.runtime.make_image()
            run("podman", "save", "-o", image, IMAGE)
        self.runtime.start(self.case)
        self.runtime.remove()
        self.before = settled()

    def start(self):
        self.is_here = True
        return self.runtime.start(self.case)

    def export(self):
        self.is_here = False
        self.runtime.export(ARCHIVE)

    def bring_in(self):
        self.runtime.bring_in(ARCHIVE)
        self.is_here = True

    def remove(self):
        self.is_here = False
        self.runtime.remove()

    def soccr(self, verb):
        run("soccr", verb, ARCHIVE)

    def locks(self):
        return locks(self.runtime.pid() if self.is_here else None)

    def left(self):
        return still_new(self.before) + (disable(self.configuration) if self.who == "ours" else [])


main()
