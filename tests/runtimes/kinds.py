"""The runtimes, the cases, and what each runtime is told to do in each case."""

import json
import os
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ROOTFS = ROOT / "target/runtimes/rootfs"
PORT = 7000
PUBLISHED = 7100
IMAGE = "localhost/server:1"
SLOWER = int(os.environ.get("SOCCR_RUNTIMES_SLOWER", "1"))  # than a real machine, in emulation
LIMIT = 30 * SLOWER  # seconds for one command
HOST = {4: "10.77.0.1", 6: "fd77::1"}


@dataclass(frozen=True)
class Case:
    """Where the container's network comes from, who talks to it over which protocols, and how it is dumped."""

    network: str
    client: str = "lan"
    to: str = "container"
    dump: str = "plain"
    families: tuple = (4,)
    hosts: int = 1

    @property
    def server(self):
        """It makes itself a session, which the first process of a container cannot: the shell is that one."""
        anyone = "0.0.0.0" if self.families == (4,) else "[::]"
        return ["/bin/sh", "-c", f"/bin/soccr-test server --listen {anyone}:{PORT} & wait"]

    def targets(self, container):
        """Where the client connects to; the container's addresses are given by family."""
        return [
            {
                "container": (container[family], PORT),
                "host": (HOST[family], PORT if self.network == "host" else PUBLISHED),
                "loopback": ("127.0.0.1", PUBLISHED),
            }[self.to]
            for family in self.families
        ]


CASES = {
    "own": Case("own"),
    "host": Case("host", to="host"),
    "path": Case("path"),
    "bridge": Case("bridge"),
    "bridge, client on the host": Case("bridge", client="host"),
    "published": Case("published", to="host"),
    "published, client on the host": Case("published", client="host", to="host"),
    "published, client on 127.0.0.1": Case("published", client="host", to="loopback"),
    "bridge, IPv6": Case("bridge", families=(6,)),
    "published, IPv6": Case("published", to="host", families=(6,)),
    "export, rm, import": Case("bridge", dump="export"),
    "keep": Case("bridge", dump="keep"),
    "pre-checkpoint": Case("bridge", dump="pre"),
    "leave running": Case("bridge", dump="leave"),
    "leave running, host": Case("host", to="host", dump="leave"),
    "leave running, own": Case("own", dump="leave"),
    "leave running, path": Case("path", dump="leave"),
    "two hosts, bridge": Case("bridge", families=(4, 6), hosts=2),
    "two hosts, published": Case("published", to="host", families=(4, 6), hosts=2),
}


def sh(command):
    return run(*shlex.split(command))


def run(*command, **more):
    """Its output; an error of ours when it fails."""
    command = [str(word) for word in command]
    more.setdefault("input", "")
    done = subprocess.run(command, check=False, timeout=LIMIT, capture_output=True, text=True, **more)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {(done.stderr or done.stdout).strip()[-600:]}")
    return done.stdout.strip()


# An OCI runtime makes an empty network namespace, and leaves the rest to a hook, at a restore too.
WIRE = """#!/bin/sh -e
pid=$(sed -n 's/.*"pid": *\\([0-9]*\\).*/\\1/p')
if ! [ -e /sys/class/net/br0 ]; then
	ip link add br0 type bridge
	ip addr add 10.79.0.1/24 dev br0
	ip link set br0 up
fi
ip link add own0 type veth peer name eth0 netns "$pid"
ip link set own0 master br0 up
nsenter --net="/proc/$pid/ns/net" sh -ec '
	ip link set lo up
	ip addr add 10.79.0.2/24 dev eth0
	ip link set eth0 up
	ip route add default via 10.79.0.1'
"""


def quiet(log, *command):
    """With nothing open but /dev/null: what it leaves running would hold a pipe, and criu finds no file of the host's."""
    command = [str(word) for word in command]
    null = subprocess.DEVNULL
    done = subprocess.run(command, stdin=null, stdout=null, stderr=null, check=False, timeout=LIMIT)
    with open(log, "a") as file:
        print(done.returncode, *command, file=file)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}; see {log.parent}")


class Clock:
    def __init__(self):
        self.marks = {}
        self.at = time.monotonic()

    def mark(self, name):
        now = time.monotonic()
        self.marks[name] = round(now - self.at, 2)
        self.at = now


class Runtime:
    userland = ["stable"]
    hybrid = True  # whether it can have cgroup version 2 beside version 1
    unified = False  # whether it must not see version 1 at all
    criu = {}  # lines in files of /etc/criu, by the kind of network
    enable = "runc"  # what it is to `soccr enable`
    checked = "runc"  # and to `soccr check`

    def set_up(self):
        """What is there before any container."""


class Podman(Runtime):
    enable = checked = "podman"
    oci = "runc"
    backend = "netavark"
    cases = [name for name, case in CASES.items() if case.network != "own" and not name.startswith("leave running, ")]

    def __init__(self, work, logs):
        self.work = work
        self.logs = logs

    def set_up(self):
        self.configure()
        self.make_image()

    def configure(self):
        Path("/etc/containers/containers.conf").write_text(
            "[containers]\n"
            'default_ulimits = ["nofile=20000:20000", "nproc=30000:30000"]\n'
            "pids_limit = 0\n"  # a round's group of version 2 has processes, and so no controllers for groups below it
            "[engine]\n"
            'cgroup_manager = "cgroupfs"\n'
            'events_logger = "file"\n'
            f'runtime = "{self.oci}"\n'
            "[network]\n"
            f'network_backend = "{self.backend}"\n'
        )
        Path("/etc/containers/storage.conf").write_text(
            '[storage]\ndriver = "overlay"\nrunroot = "/run/containers"\ngraphroot = "/var/lib/containers/storage"\n'
        )
        run("podman", "network", "create", "--ipv6", "--subnet", "10.79.0.0/24", "--subnet", "fd79::/64", "dual")

    def make_image(self):
        tar = self.work / "server.tar"
        run("tar", "-cf", tar, "-C", ROOTFS, ".")
        run("podman", "import", tar, IMAGE)

    def start(self, case):
        bridge = "podman" if case.families == (4,) else "dual"
        network = {
            "host": ["--network", "host"],
            "path": ["--network", "ns:/run/netns/srv"],
            "bridge": ["--network", bridge],
            "published": ["--network", bridge, "-p", f"{PUBLISHED}:{PORT}"],
        }[case.network]
        run("podman", "run", "-d", "--name", "c", *network, IMAGE, *case.server)
        return self.addresses(case)

    def addresses(self, case):
        if case.network in ("host", "path"):
            return {4: "10.78.0.2"}
        networks = json.loads(run("podman", "inspect", "-f", "{{json .NetworkSettings.Networks}}", "c"))
        [network] = networks.values()
        return {4: network["IPAddress"], 6: network["GlobalIPv6Address"]}

    def export(self, archive):
        """All of the container into a file, and off this host."""
        run("podman", "container", "checkpoint", "--tcp-established", "--export", archive, "c")
        self.keep_logs()
        self.keep_status()
        run("podman", "rm", "c")

    def bring_in(self, archive):
        """It is here from now on."""
        run("podman", "container", "restore", "--tcp-established", "--import", archive)
        self.keep_logs()

    def dump_and_restore(self, case):
        clock = Clock()
        if case.dump == "export":
            archive = self.work / "c.tar.gz"
            self.export(archive)
            clock.mark("export, rm")
            self.bring_in(archive)
            clock.mark("import")
            return clock.marks
        if case.dump == "pre":
            run("podman", "container", "checkpoint", "--tcp-established", "--pre-checkpoint", "c")
            clock.mark("pre-checkpoint")
        more = {"plain": [], "keep": ["--keep"], "leave": ["--leave-running", "--keep"], "pre": ["--with-previous"]}[case.dump]
        run("podman", "container", "checkpoint", "--tcp-established", *more, "c")
        clock.mark("dump")
        self.keep_logs()
        if case.dump != "leave":
            self.keep_status()
            keep = more if case.dump == "keep" else []
            run("podman", "container", "restore", "--tcp-established", *keep, "c")
            clock.mark("restore")
        return clock.marks

    def keep_status(self):
        """Unless it is told to keep them, podman removes CRIU's logs."""
        (self.logs / "status.log").write_text(run("soccr", "status"))

    def pid(self):
        return run("podman", "inspect", "-f", "{{.State.Pid}}", "c")

    def remove(self):
        self.keep_logs()
        run("podman", "rm", "-f", "-t", "0", "c")

    def keep_logs(self):
        for log in Path("/var/lib/containers/storage").glob("overlay-containers/*/userdata/*.log"):
            if log.name in ("dump.log", "restore.log"):
                shutil.copy(log, self.logs)


class PodmanCni(Podman):
    backend = "cni"
    cases = [name for name in Podman.cases if CASES[name].families == (4,)]


class PodmanCrun(Podman):
    """Debian sid's. On cgroup version 1 this pair has put a restored container into the root group, and killed all of a
    machine's processes."""

    userland = ["podman", "sid", "stable"]
    oci = "crun"
    unified = True


class Oci(Runtime):
    """A runtime of the OCI's command line, driven by hand."""

    cases = ["own", "host", "path", "leave running, path"]
    name = "runc"
    wired_by_hook = True

    def __init__(self, work, logs):
        self.logs = logs
        self.bundle = work / "bundle"
        self.images = work / "images"
        self.wire = work / "wire"

    def make_bundle(self, case):
        shutil.rmtree(self.bundle, ignore_errors=True)
        self.bundle.mkdir()
        shutil.copytree(ROOTFS, self.bundle / "rootfs", symlinks=True)
        run(self.name, "spec", cwd=self.bundle)
        path = self.bundle / "config.json"
        config = json.loads(path.read_text())
        config["process"] |= {"args": case.server, "terminal": False, "rlimits": []}
        config["root"]["readonly"] = False
        spaces = [space for space in config["linux"]["namespaces"] if space["type"] != "network"]
        if case.network != "host":
            spaces.append({"type": "network"} | ({"path": "/run/netns/srv"} if case.network == "path" else {}))
        config["linux"]["namespaces"] = spaces
        config["linux"]["cgroupsPath"] = "/c"
        if case.network == "own":
            self.wire.write_text(WIRE)
            self.wire.chmod(0o755)
            if self.wired_by_hook:
                config["hooks"] = {"createRuntime": [{"path": str(self.wire)}]}
        path.write_text(json.dumps(config))

    def start(self, case):
        self.make_bundle(case)
        self.call("run", "-d", "--bundle", self.bundle, "c")
        if case.network == "own" and not self.wired_by_hook:
            run(self.wire, input=run(self.name, "state", "c"))
        return self.addresses(case)

    def addresses(self, case):
        return {4: "10.79.0.2" if case.network == "own" else "10.78.0.2"}

    def dump_and_restore(self, case):
        clock = Clock()
        self.images.mkdir()
        common = ["--tcp-established", "--image-path", self.images, "--work-path", self.logs]
        leave = ["--leave-running"] if case.dump == "leave" else []
        self.call("checkpoint", *common, *leave, "c")
        clock.mark("dump")
        if case.dump != "leave":
            if case.network == "own":
                self.wait_for_end("own0")
            self.call("restore", "-d", *common, "--bundle", self.bundle, "c")
            clock.mark("restore")
        return clock.marks

    @staticmethod
    def wait_for_end(link):
        """The kernel takes a network namespace down a little after its last process ended."""
        deadline = time.monotonic() + LIMIT
        while Path("/sys/class/net", link).exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    def call(self, *words):
        quiet(self.logs / "runtime.log", self.name, "--log", self.logs / f"{self.name}.log", *words)

    def pid(self):
        return json.loads(run(self.name, "state", "c"))["pid"]

    def remove(self):
        self.call("delete", "--force", "c")

    def keep_logs(self):
        pass


class Runc(Oci):
    pass


class Crun(Oci):
    userland = ["sid", "stable"]
    name = enable = checked = "crun"
    # It has criu bring the network namespace back, with the wire, of which nobody else tells criu; a hook that made
    # the wire at a restore as well would be in criu's way.
    wired_by_hook = False
    criu = {"own": {"crun.conf": "external veth[eth0]:own0@br0"}}


class Lxc(Runtime):
    """lxc-checkpoint, which dumps the network namespace too and names the wire to criu."""

    cases = ["own", "host", "leave running, own"]
    enable, checked = "default", "lxc"
    # lxc-checkpoint 5.0 gives criu a --cgroup-root without a value there.
    hybrid = False

    def __init__(self, work, logs):
        self.work = work
        self.logs = logs
        self.path = work / "lxc"

    def configure(self, case):
        shutil.rmtree(self.path, ignore_errors=True)
        rootfs = self.path / "c/rootfs"
        shutil.copytree(ROOTFS, rootfs, symlinks=True)
        (rootfs / "serve").write_text(case.server[2] + "\n")
        lines = [
            "uts.name = c",
            f"rootfs.path = dir:{rootfs}",
            "init.cmd = /bin/sh /serve",
            "mount.auto = proc:rw sys:rw",
            "console.path = none",
            "tty.max = 0",
            "pty.max = 1",
        ]
        if case.network == "host":
            lines += ["net.0.type = none"]
        else:
            lines += ["net.0.type = veth", "net.0.link = br0", "net.0.name = eth0", "net.0.flags = up"]
            lines += ["net.0.ipv4.address = 10.79.0.2/24", "net.0.ipv4.gateway = 10.79.0.1"]
        (self.path / "c/config").write_text("".join(f"lxc.{line}\n" for line in lines))

    def start(self, case):
        if not Path("/sys/class/net/br0").exists():
            sh("ip link add br0 type bridge")
            sh("ip addr add 10.79.0.1/24 dev br0")
            sh("ip link set br0 up")
        self.configure(case)
        self.call("lxc-start", "-d")
        return self.addresses(case)

    def addresses(self, case):
        return {4: "10.79.0.2"}

    def dump_and_restore(self, case):
        clock = Clock()
        images = self.work / "images"
        self.call("lxc-checkpoint", "-v", "-D", images, *([] if case.dump == "leave" else ["-s"]))
        clock.mark("dump")
        self.keep_logs()
        if case.dump != "leave":
            self.call("lxc-checkpoint", "-v", "-r", "-D", images)
            clock.mark("restore")
        return clock.marks

    def call(self, program, *words):
        words = ["-P", self.path, "-n", "c", "-l", "INFO", "-o", self.logs / f"{program}.log", *words]
        quiet(self.logs / "runtime.log", program, *words)

    def pid(self):
        return sh(f"lxc-info -P {self.path} -n c -p -H")

    def remove(self):
        self.call("lxc-stop", "-k")

    def keep_logs(self):
        for log in (self.work / "images").glob("*.log"):
            shutil.copy(log, self.logs)


class Ctr(Runtime):
    """containerd's own command. It has no way to bring back on the same host what it has dumped and ended."""

    cases = ["leave running, host", "leave running, path"]
    checked = "containerd"
    # ctr has no --tcp-established.
    criu = {"host": {"runc.conf": "tcp-established"}, "path": {"runc.conf": "tcp-established"}}

    def __init__(self, work, logs):
        self.work = work
        self.logs = logs

    def set_up(self):
        config = self.work / "containerd.toml"
        config.write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n')
        with open(self.logs / "containerd.log", "w") as log:
            subprocess.Popen(["containerd", "-c", config], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        run("ctr", "--connect-timeout", f"{LIMIT}s", "version")

    def start(self, case):
        rootfs = self.work / "rootfs"
        shutil.copytree(ROOTFS, rootfs, symlinks=True, dirs_exist_ok=True)
        network = ["--net-host"] if case.network == "host" else ["--with-ns", "network:/run/netns/srv"]
        run("ctr", "run", "-d", "--null-io", "--cgroup", "/c", *network, "--rootfs", rootfs, "c", *case.server)
        return self.addresses(case)

    def addresses(self, _case):
        return {4: "10.78.0.2"}

    def dump_and_restore(self, _case):
        clock = Clock()
        run("ctr", "tasks", "checkpoint", "--image-path", self.work / "images", "--work-path", self.logs, "c")
        clock.mark("dump")
        return clock.marks

    def pid(self):
        return run("ctr", "tasks", "ls").splitlines()[1].split()[1]

    def remove(self):
        run("ctr", "tasks", "rm", "-f", "c")
        run("ctr", "containers", "rm", "c")

    def keep_logs(self):
        pass


RUNTIMES = {
    "podman-runc": Podman,
    "podman-cni": PodmanCni,
    "podman-crun": PodmanCrun,
    "runc": Runc,
    "crun": Crun,
    "lxc": Lxc,
    "ctr": Ctr,
}

assert os.geteuid() == 0, "a container runtime needs root"
