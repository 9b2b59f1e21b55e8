#!/usr/bin/python3
"""host.py RUNTIME CASE stock|ours LOGS: one round in a host of its own; prints its result as one line of JSON.

scripts/runtimes starts it in new network, mount, PID, IPC, UTS and cgroup namespaces, in cgroups of its own. It covers
/etc, /usr and /var with overlays that hold the runtimes, /run and /tmp with file systems in memory, and wires up

    LAN peer 10.77.0.2, fd77::2 ── 10.77.0.1, fd77::1 host ── the container

where nothing of it reaches the machine, and all of it goes with this process.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from kinds import CASES, RUNTIMES, SLOWER, run, sh

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = ROOT / "target/runtimes"
CRIU = Path("/etc/criu")
STREAMS = 50
# Tables and chains that iptables makes when somebody looks at them: their rules count.
BUILT_IN = re.compile(
    r"table ip6? (filter|nat|mangle|raw|security) {|chain (INPUT|OUTPUT|FORWARD|PREROUTING|POSTROUTING) {|type .*|}|"
)
PATIENCE = 10 * SLOWER  # seconds for what goes a little later than the container does


def main():
    runtime_name, case_name, who, logs = sys.argv[1:]
    logs = Path(logs)
    logs.mkdir(parents=True, exist_ok=True)
    sys.stderr = open(logs / "host.log", "w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    make_host(RUNTIMES[runtime_name])
    runtime = RUNTIMES[runtime_name](Path("/run/work"), logs)
    case = CASES[case_name]
    try:
        runtime.set_up()
        before = configure_criu(runtime, case.network)
        if who == "ours":
            enable(runtime)
        result = one_round(runtime, case, logs)
        if who == "ours":
            result["left"] += disable(before)
            if not acted(logs):
                raise RuntimeError(f"the plugin was not in it: {result}")
    except Exception as error:  # whatever it was: this round failed by it
        result = {"alive": 0, "error": f"{type(error).__name__}: {error}"}
    runtime.keep_logs()
    print(json.dumps(result), flush=True)


# --- the host ---


def make_host(kind):
    groups = cgroup_mounts()
    for path in ("/run", "/tmp"):
        if not ROOT.is_relative_to(path):
            mount("-t", "tmpfs", "tmpfs", path)
    for path in ("/run/netns", "/run/lock", "/run/work", "/run/own"):
        os.makedirs(path)
    mount("-t", "sysfs", "sysfs", "/sys")  # shows the links of this network namespace
    if len({version for _, version, _ in groups}) > 1 and not kind.hybrid:
        groups = [each for each in groups if each[1] == "cgroup"]
    own_cgroups(groups)
    for path in ("usr", "etc", "var"):
        cover(f"/{path}", [HERE / tree / path for tree in (*kind.userland, "soccr")])
    # `podman info` asks dpkg whose each of its programs is, which takes minutes in emulation, and here they are nobody's.
    for path in ("/var/lib/containers", "/var/lib/containerd", "/var/lib/lxc", "/var/lib/dpkg/info"):
        os.makedirs(path, exist_ok=True)
        mount("-t", "tmpfs", "tmpfs", path)
    os.environ["PATH"] = f"{ROOT}/target/criu/criu:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/bin"
    os.environ["HOME"] = "/run/work"
    subprocess.run(["ldconfig"], check=True)
    sh("ip link set lo up")
    for setting in ("ipv4.ip_forward=1", "ipv6.conf.all.forwarding=1", "ipv6.conf.default.accept_dad=0"):
        sh(f"sysctl -qw net.{setting}")
    sh("sysctl -qw net.ipv4.tcp_slow_start_after_idle=0")  # the client's windows stay open


def cgroup_mounts():
    """Where each hierarchy is, its version and its options."""
    mounts = (line.split()[1:4] for line in Path("/proc/self/mounts").read_text().splitlines())
    return list({where: (where, kind, options) for where, kind, options in mounts if kind in ("cgroup", "cgroup2")}.values())


def make_group(group):
    """In a hierarchy of version 1 a group may have no processor until it is told."""
    group.mkdir(exist_ok=True)
    for name in ("cpuset.cpus", "cpuset.mems"):
        if (group / name).exists() and (group.parent / name).exists():
            (group / name).write_text((group.parent / name).read_text())


def own_cgroups(mounts):
    """In the cgroup namespace the machine's mounts show the machine's groups; these show ours alone."""
    mount("-t", "tmpfs", "tmpfs", "/sys/fs/cgroup")
    for where, kind, options in mounts:
        hierarchy = [option for option in options.split(",") if option not in ("rw", "relatime")]
        os.makedirs(where, exist_ok=True)
        mount("-t", kind, *(["-o", ",".join(hierarchy)] if kind == "cgroup" else []), kind, where)


def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)


def cover(path, unpacked):
    """An overlay whose changes stay in memory."""
    upper, work = (f"/run/own{path}/{name}" for name in ("upper", "work"))
    os.makedirs(upper)
    os.makedirs(work)
    lower = ":".join(str(folder) for folder in [*unpacked, path] if os.path.isdir(folder))
    mount("-t", "overlay", "-o", f"lowerdir={lower},upperdir={upper},workdir={work}", "overlay", path)


def plug(name, net):
    """A network namespace on a wire to the host: 10.NET.0.2 and fdNET::2 there, .1 and ::1 here."""
    sh(f"ip netns add {name}")
    sh(f"ip link add {name}0 type veth peer name eth0 netns {name}")
    for address in (f"10.{net}.0.1/24", f"fd{net}::1/64 nodad"):
        sh(f"ip addr add {address} dev {name}0")
    sh(f"ip link set {name}0 up")
    wire_up(name, [f"10.{net}.0.2/24", f"fd{net}::2/64"])
    for gateway in (f"10.{net}.0.1", f"fd{net}::1"):
        sh(f"ip -n {name} route add default via {gateway}")


def wire_up(name, addresses):
    """The end of its wire inside a network namespace."""
    inside = f"nsenter --net=/run/netns/{name}"
    sh(f"{inside} sysctl -qw net.ipv6.conf.eth0.accept_dad=0")
    sh(f"{inside} sysctl -qw net.ipv4.tcp_slow_start_after_idle=0")
    sh(f"ip -n {name} link set lo up")
    for address in addresses:
        sh(f"ip -n {name} addr add {address} dev eth0")
    sh(f"ip -n {name} link set eth0 up")


def configure_criu(kind, network):
    """What this runtime needs of CRIU, with the plugin or without, and nothing of the machine's own."""
    shutil.rmtree(CRIU, ignore_errors=True)
    for file, line in kind.criu.get(network, {}).items():
        CRIU.mkdir()
        (CRIU / file).write_text(f"{line}\n")
    return configuration()


def configuration():
    return {str(path): path.is_file() and path.read_text() for path in (CRIU, *CRIU.rglob("*")) if path.exists()}


def enable(kind):
    """What README has a user do, and no more."""
    run("soccr", "enable", kind.enable)
    report = json.loads(run("soccr", "check", "--json"))
    [found] = [each for each in report["runtimes"] if each["kind"] == kind.checked]
    if found["outcome"] != "carried":
        raise RuntimeError(f"soccr check: {found}")


def disable(before):
    """What it has left of what was enabled, or taken of what was there before."""
    run("soccr", "disable")
    after = configuration()
    return [f"soccr disable: {path}" for path in sorted(before.keys() | after.keys()) if before.get(path) != after.get(path)]


def acted(logs):
    """By CRIU's log, or by what `soccr status` said when the container was gone: podman removes that log."""
    said = {"dump.log": "TCP connections saved", "status.log": "dumped"}
    return any(words in log.read_text(errors="replace") for name, words in said.items() for log in logs.glob(name))


# --- a round ---


def one_round(runtime, case, logs):
    plug("lan", 77)
    plug("srv", 78)
    # What a runtime sets up once and keeps, it has set up before the round begins.
    runtime.start(case)
    runtime.remove()
    before = settled()
    addresses = runtime.start(case)
    with client(case.targets(addresses), case.client, logs) as streams, watched(logs):
        seconds = runtime.dump_and_restore(case)
        result = streams.verdict() | {"seconds": seconds}
        if (after := runtime.addresses(case)) != addresses:
            result["error"] = f"the container's addresses were {addresses} and are {after}"
        left = [f"while it runs: {line}" for line in locks(runtime.pid())]
    runtime.remove()
    result["left"] = left + still_new(before)
    return result


class Client:
    def __init__(self, process):
        self.process = process

    def verdict(self):
        self.process.stdin.write("now\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@contextlib.contextmanager
def client(targets, where, logs):
    enter = ["nsenter", "--net=/run/netns/lan"] if where == "lan" else []
    words = [str(word) for target in targets for word in target]
    command = [*enter, "/usr/bin/python3", Path(__file__).with_name("client.py"), str(STREAMS), *words]
    with open(logs / "client.log", "w") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"the streams to {' '.join(words)} do not run")
        yield Client(process)
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def watched(logs):
    """With SOCCR_RUNTIMES_WATCH=1, what happens on the host meanwhile, each line with its time, in watch.log."""
    if os.environ.get("SOCCR_RUNTIMES_WATCH") != "1":
        yield
        return
    sources = {
        "tcp": "tcpdump -Z root -l -n -t -i any tcp",
        "ip": "ip -o monitor link addr route",
        "conntrack": "conntrack -E -p tcp",
        "nft": "nft monitor",
    }
    with open(logs / "watch.log", "w", buffering=1) as log:
        processes = [watch(name, command, log) for name, command in sources.items()]
        time.sleep(1)  # none of them says when it has begun
        print(f"{time.time():.6f} begin", file=log)
        ended = threading.Event()
        threading.Thread(target=watch_criu, args=(log, ended), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            print(f"{time.time():.6f} end", file=log)
            for process in processes:
                process.kill()
                process.wait()


def watch(name, command, log):
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command.split(), stdin=subprocess.DEVNULL, **pipe)

    def copy():
        for line in process.stdout:
            print(f"{time.time():.6f} {name}: {line.rstrip()}", file=log)

    threading.Thread(target=copy, daemon=True).start()
    return process


def watch_criu(log, ended):
    running = set()
    while not ended.wait(0.005):
        now = set(subprocess.run(["pgrep", "-ax", "criu"], capture_output=True, text=True, check=False).stdout.splitlines())
        for words, lines in (("starts", now - running), ("ends", running - now)):
            for line in lines:
                print(f"{time.time():.6f} criu {words}: {line}", file=log)
        running = now


# --- what is left ---


def locks(container=None):
    """Tables and chains of a lock, in the host and in the running container, and records: there must be none."""
    found = []
    places = {"host": []} | ({"container": ["nsenter", f"--net=/proc/{container}/ns/net"]} if container else {})
    for where, enter in places.items():
        rules = subprocess.run([*enter, "nft", "list", "ruleset"], capture_output=True, text=True, check=False).stdout
        found += [f"{where}: {line.strip()}" for line in rules.splitlines() if "CRIU" in line or "soccr" in line]
    found += [f"soccr status: {line}" for line in records()]
    return found


def records():
    done = subprocess.run(["soccr", "status"], capture_output=True, text=True, check=False)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line]
    return [] if lines == ["nothing is left behind"] else lines


def snapshot():
    """Rules, links, addresses, namespaces, processes and records of the host."""
    found = set()
    for command in ("nft -s list ruleset", "ip -o addr", "ip -br link", "ip netns list", "ip rule", "ps -eo comm="):
        output = subprocess.run(command.split(), capture_output=True, text=True, check=False).stdout
        chain = ""
        for line in output.splitlines():
            if command.startswith("nft"):
                line = line.strip()
                if BUILT_IN.fullmatch(line):
                    continue
                if line.startswith(("table", "chain")):
                    chain = line
                line = f"{chain} {line}"
            elif command == "ip -o addr":
                line = " ".join(line.split()[1:4])
            elif command == "ip -br link":
                line = line.split()[0]
            found.add(f"{command.split()[0]}: {line}")
    return found | {f"soccr status: {line}" for line in records()}


def settled():
    """A snapshot that stays the same for a moment: a runtime's helpers end after it does."""
    last = snapshot()
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = snapshot()
        if now == last:
            break
        last = now
    return last


def still_new(before):
    deadline = time.monotonic() + PATIENCE
    while (new := snapshot() - before) and time.monotonic() < deadline:
        time.sleep(0.2)
    return sorted(new)


if __name__ == "__main__":
    main()
