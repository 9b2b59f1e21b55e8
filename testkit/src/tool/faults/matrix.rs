//! What else may go wrong: disks, kernels, administrators, and callers that are not what criu expects.

use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use soccr_testkit::criu::{Call, last_errors};
use soccr_testkit::netns::{End, veth};
use soccr_testkit::server::sibling_binary;
use soccr_testkit::sockets::{TaskSocket, tcp_sockets};
use soccr_testkit::stage::{PATIENCE, V4, V6};
use soccr_testkit::task::{Task, children, name_and_state, pid_of, run as run_command, wait_until};
use soccr_testkit::{Client, Fleet, NetNs, Pace, Place, Server, interrupt};

use crate::faults::kernel;
use crate::faults::outcome::{self, Kind};
use crate::faults::prefix;
use crate::faults::report::Report;
use crate::faults::scene::{PLUGIN, Scene, Tools};

/// How many connections were checked, and what is worth telling.
type Told = Result<(usize, String)>;
type Case = fn(&Scene) -> Told;

/// Gone through twice: with criu in the server's namespace, and outside of it.
const CASES: [(&str, Case); 19] = [
    ("the disk is full", full_disk),
    ("the image folder is read-only", read_only),
    ("no nf_tables, dump", |scene| crippled_dump(scene, CONNECTIONS, without_nftables, &["nf_tables"])),
    ("no nf_tables, restore", |scene| crippled_restore(scene, CONNECTIONS, without_nftables, &["nf_tables"])),
    ("netlink answers ENOBUFS, dump", |scene| crippled_dump(scene, CONNECTIONS, without_buffers, &["net:["])),
    ("netlink answers ENOBUFS, restore", |scene| {
        crippled_restore(scene, CONNECTIONS, without_buffers, &["net:["])
    }),
    ("too few descriptors, dump", |scene| {
        crippled_dump(scene, 100, few_descriptors, &["Too many open files"])
    }),
    ("too few descriptors, restore", few_descriptors_restore),
    ("an image hits a limit in the middle", limited_file),
    ("an option cannot be read", |scene| {
        crippled_dump(scene, CONNECTIONS, without_option, &["→", "TCP_NOTSENT_LOWAT", "EACCES"])
    }),
    ("the lock is deleted from outside", lock_deleted),
    ("two dumps at once", two_at_once),
    ("restored twice", restored_twice),
    ("the records are gone (reboot)", records_gone),
    ("criu is a child subreaper", subreaper),
    ("criu is PID 1", first_process),
    ("left stopped, then continued", left_stopped_continued),
    ("left stopped, then killed", left_stopped_killed),
    ("a dump that is given up: clean --all", given_up),
];

/// Criu's own namespace cannot go away before criu does.
const OUTSIDE_ONLY: [(&str, Case); 2] = [
    ("the namespace goes away, clean", namespace_gone),
    ("the namespace goes away, restore", namespace_made_anew),
];

const CONNECTIONS: usize = 8;
const FULL: usize = 4;
const PERIOD: Duration = Duration::from_millis(40);
const LIMIT: Duration = Duration::from_secs(30);

pub fn run(tools: &Tools, place: Place, report: &mut Report, only: Option<&str>) -> Result<()> {
    // What criu itself asks the kernel for is remembered from here on.
    let mut check = Command::new(tools.criu.bin());
    check.arg("check").stdout(Stdio::null()).stderr(Stdio::null()).status().context("criu check")?;
    let outside_only = if place == Place::Host { &[][..] } else { &OUTSIDE_ONLY };
    for (name, case) in CASES.iter().chain(outside_only) {
        let name = format!("{}{name}", prefix(place));
        if only.is_some_and(|only| !name.contains(only)) {
            continue;
        }
        interrupt::check()?;
        let scene = Scene::new(tools, place)?;
        report.case(&name, &case(&scene));
        scene.reap(None)?;
    }
    Ok(())
}

fn busy(scene: &Scene, count: usize, full: usize) -> Result<(Server, Fleet<Client>)> {
    let (server, clients) = scene.small(count)?;
    let fleet = scene.busy(&server, clients, full, PERIOD)?;
    Ok((server, fleet))
}

fn both(scene: &Scene) -> Result<(Server, Fleet<Client>)> {
    busy(scene, CONNECTIONS, FULL)
}

/// Runs a criu that must fail; what it said, which must have each of `words` in it.
fn fails(mut command: Command, log: &Path, words: &[&str]) -> Result<String> {
    let status = run_command(&mut command, LIMIT).with_context(|| last_errors(log))?.status;
    ensure!(!status.success(), "criu succeeds");
    let text = String::from_utf8_lossy(&fs::read(log)?).into_owned();
    let errors: Vec<&str> = text.lines().filter(|line| line.contains("Error (soccr)")).collect();
    let Some(first) = errors.iter().find(|line| words.iter().all(|word| line.contains(word))) else {
        bail!("nothing of {words:?} in the errors:\n{}", last_errors(log));
    };
    Ok(first.split_once("): ").map_or(*first, |(_, said)| said).to_owned())
}

fn lives(scene: &Scene, server: Server, fleet: Fleet<Client>, images: &Path) -> Result<usize> {
    ends(scene, server, fleet, images, Kind::Lives)
}

fn comes_back(scene: &Scene, server: Server, fleet: Fleet<Client>, images: &Path) -> Result<usize> {
    ends(scene, server, fleet, images, Kind::Restored)
}

fn ends(scene: &Scene, server: Server, fleet: Fleet<Client>, images: &Path, kind: Kind) -> Result<usize> {
    let mut verdict = outcome::of_dump(scene, server, fleet, images, false)?;
    verdict.left.take().map_or(Ok(()), Err)?;
    ensure!(verdict.lost.is_empty(), "lost:\n{}", verdict.lost.join("\n"));
    ensure!(verdict.kind == kind, "{:?} instead of {kind:?}", verdict.kind);
    Ok(verdict.connections)
}

/// After a dump and a failed restore: a second one brings all back. It needs the pids of tasks that the first had begun.
fn second_try(scene: &Scene, address: SocketAddr, fleet: Fleet<Client>, images: &Path) -> Result<usize> {
    scene.wait_until_quiet()?;
    wait_until("the first try's tasks are gone", PATIENCE, || {
        scene.reap(None)?;
        let keepers = scene.keepers()?;
        Ok(children()?.iter().all(|pid| keepers.iter().any(|keeper| keeper.pid == *pid)))
    })?;
    let server = scene.restore_all(images, address)?;
    all_alive(scene, &server, fleet)
}

fn all_alive(scene: &Scene, server: &Server, fleet: Fleet<Client>) -> Result<usize> {
    let alive = fleet.stop(PATIENCE).whole()?;
    scene.wait_until_quiet()?;
    scene.check_spotless(Some(server))?;
    Ok(alive.len())
}

fn dump(scene: &Scene, server: Server, images: &Path) -> Result<SocketAddr> {
    let address = server.address;
    scene.dump(PLUGIN, server.pid(), images).dump_and_wait(server.task)?;
    Ok(address)
}

/// A file system is unmounted when the case is over.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn full_disk(scene: &Scene) -> Told {
    let images = scene.images()?;
    mount(Some("none"), &images, Some("tmpfs"), MsFlags::empty(), Some("size=64k"))?;
    unwritable(scene, &Mounted(images), "No space left")
}

/// Of a folder that is read-only from the start CRIU itself complains before any hook.
fn read_only(scene: &Scene) -> Told {
    let images = scene.images()?;
    let flags = MsFlags::MS_BIND;
    mount(Some(&images), &images, None::<&str>, flags, None::<&str>)?;
    let mounted = Mounted(images.clone());
    let read_only = flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, &images, None::<&str>, read_only, None::<&str>)?;
    unwritable(scene, &mounted, "Read-only file system")
}

fn unwritable(scene: &Scene, Mounted(images): &Mounted, word: &str) -> Told {
    let (server, fleet) = both(scene)?;
    let log = scene.dir().join("elsewhere.log");
    let call = scene.dump(PLUGIN, server.pid(), images).arg("-o").arg(&log);
    let said = fails(call.command(), &log, &["tcp-stream-", "→", word])?;
    Ok((lives(scene, server, fleet, images)?, said))
}

/// `socket(AF_NETLINK, …, NETLINK_NETFILTER)` fails as in a kernel without nf_tables.
fn without_nftables(command: &mut Command) {
    let arguments = [(0, libc::AF_NETLINK), (2, libc::NETLINK_NETFILTER)];
    kernel::fail(command, libc::SYS_socket, &arguments, libc::EPROTONOSUPPORT);
}

/// The only messages that are sent without an address and without flags are those to netlink.
fn without_buffers(command: &mut Command) {
    kernel::fail(command, libc::SYS_sendto, &[(3, 0), (4, 0), (5, 0)], libc::ENOBUFS);
}

/// `getsockopt(…, SOL_TCP, TCP_NOTSENT_LOWAT, …)` fails as where a security module forbids it. CRIU does not ask.
fn without_option(command: &mut Command) {
    const TCP_NOTSENT_LOWAT: i32 = 25;
    let arguments = [(1, libc::SOL_TCP), (2, TCP_NOTSENT_LOWAT)];
    kernel::fail(command, libc::SYS_getsockopt, &arguments, libc::EACCES);
}

/// Part of an image is written, and the next call of write() fails: with EFBIG, since no file system here fails with EIO when
/// it is told to.
fn limited_file(scene: &Scene) -> Told {
    const LIMIT: u64 = 8 << 10; // less than a full queue, more than criu's log of a failure
    let images = scene.images()?;
    let (server, fleet) = both(scene)?;
    let log = scene.dir().join("elsewhere.log");
    let mut command = scene.dump(PLUGIN, server.pid(), &images).quiet().arg("-o").arg(&log).command();
    // SAFETY: between fork and exec only signal() and setrlimit() are called, which are async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            nix::sys::signal::signal(Signal::SIGXFSZ, nix::sys::signal::SigHandler::SigIgn)?;
            Ok(setrlimit(Resource::RLIMIT_FSIZE, LIMIT, LIMIT)?)
        });
    }
    let said = fails(command, &log, &["tcp-stream-", "→", "File too large"])?;
    Ok((lives(scene, server, fleet, &images)?, said))
}

fn few_descriptors(command: &mut Command) {
    // SAFETY: between fork and exec only setrlimit() is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(|| Ok(setrlimit(Resource::RLIMIT_NOFILE, 64, 64)?));
    }
}

fn crippled_dump(scene: &Scene, count: usize, cripple: fn(&mut Command), words: &[&str]) -> Told {
    let images = scene.images()?;
    let (server, fleet) = busy(scene, count, FULL)?;
    let mut command = scene.dump(PLUGIN, server.pid(), &images).command();
    cripple(&mut command);
    let said = fails(command, &images.join("dump.log"), words)?;
    Ok((lives(scene, server, fleet, &images)?, said))
}

fn crippled_restore(scene: &Scene, count: usize, cripple: fn(&mut Command), words: &[&str]) -> Told {
    let images = scene.images()?;
    let (server, fleet) = busy(scene, count, FULL)?;
    let address = dump(scene, server, &images)?;
    let mut command = scene.restore(PLUGIN, &images)?.command();
    cripple(&mut command);
    let said = fails(command, &images.join("restore.log"), words)?;
    Ok((second_try(scene, address, fleet, &images)?, said))
}

fn few_descriptors_restore(scene: &Scene) -> Told {
    let images = scene.images()?;
    let (server, fleet) = busy(scene, 100, FULL)?;
    let address = dump(scene, server, &images)?;
    let mut command = scene.restore(PLUGIN, &images)?.command();
    few_descriptors(&mut command);
    // CRIU's own descriptors run out, too, and which come first is its business.
    let status = run_command(&mut command, LIMIT)?.status;
    ensure!(!status.success(), "criu restores 100 connections with 64 descriptors");
    let said = last_errors(&images.join("restore.log"));
    let about = said.lines().find(|line| DESCRIPTORS.iter().any(|word| line.contains(word)));
    let about = about.with_context(|| format!("none of {DESCRIPTORS:?} in the errors:\n{said}"))?;
    Ok((second_try(scene, address, fleet, &images)?, about.to_owned()))
}

/// How whoever runs out of descriptors first says so: we, or CRIU, which finds no room above a task's descriptors.
const DESCRIPTORS: [&str; 2] = ["Too many open files", "Can't chose service_fd_base"];

/// Peers that are silent meanwhile notice nothing. (One that speaks meets no socket and is reset: that is what the
/// lock is for.)
fn lock_deleted(scene: &Scene) -> Told {
    let images = scene.images()?;
    let (server, fleet) = busy(scene, CONNECTIONS, 0)?;
    let clients = fleet.stop(PATIENCE).whole()?;
    // A late acknowledgement that nothing stops is answered with a reset while the sockets are gone.
    wait_until("the peers are silent", PATIENCE, || {
        let mut sockets = tcp_sockets(server.pid())?;
        sockets.retain(|socket| socket.peer().is_some());
        for client in &clients {
            sockets.push(TaskSocket::of(client)?);
        }
        sockets.iter().try_fold(true, |silent, socket| Ok(silent && socket.unacked()? == 0))
    })?;
    let address = dump(scene, server, &images)?;
    for ns in scene.namespaces() {
        let flushed = ns.command("nft").args(["flush", "ruleset"]).status()?;
        ensure!(flushed.success(), "nft: {flushed}");
    }
    let server = scene.restore_all(&images, address)?;
    let fleet = scene.busy(&server, clients, FULL, PERIOD)?;
    Ok((all_alive(scene, &server, fleet)?, "with silent peers".into()))
}

fn two_at_once(scene: &Scene) -> Told {
    let trees = [busy(scene, CONNECTIONS, FULL)?, busy(scene, CONNECTIONS, FULL)?];
    let folders = [0, 1].map(|nth| scene.dir().join(format!("tree-{nth}")));
    let mut calls = Vec::new();
    for ((server, _), images) in trees.iter().zip(&folders) {
        fs::create_dir(images)?;
        calls.push(scene.dump(PLUGIN, server.pid(), images).spawn()?.0);
    }
    for (mut criu, images) in calls.into_iter().zip(&folders) {
        succeeds(&mut criu).with_context(|| last_errors(&images.join("dump.log")))?;
    }
    let mut dumped = Vec::new();
    for (server, fleet) in trees {
        let address = server.address;
        server.task.wait(PATIENCE)?;
        dumped.push((address, fleet));
    }
    let states = scene.status()?.states();
    ensure!(states == ["dumped", "dumped"], "soccr status: {states:?}");
    let mut restored = Vec::new();
    for ((address, fleet), images) in dumped.into_iter().zip(&folders) {
        restored.push((scene.restore_all(images, address)?, fleet));
    }
    let mut checked = 0;
    for (server, fleet) in restored {
        checked += all_alive(scene, &server, fleet)?;
    }
    Ok((checked, "both restored".into()))
}

fn succeeds(criu: &mut Child) -> Result<()> {
    wait_until("criu ends", LIMIT, || Ok(criu.try_wait()?.is_some()))?;
    let status = criu.wait()?;
    ensure!(status.success(), "criu: {status}");
    Ok(())
}

fn restored_twice(scene: &Scene) -> Told {
    let images = scene.images()?;
    let (server, fleet) = both(scene)?;
    let address = dump(scene, server, &images)?;
    let server = scene.restore_all(&images, address)?;
    let again = scene.restore(PLUGIN, &images)?.command();
    let said = fails(again, &images.join("restore.log"), &["→", "is alive"])?;
    scene.wait_until_quiet()?;
    Ok((all_alive(scene, &server, fleet)?, said))
}

fn records_gone(scene: &Scene) -> Told {
    let images = scene.images()?;
    let (server, fleet) = both(scene)?;
    let address = dump(scene, server, &images)?;
    fs::remove_dir_all(scene.records())?;
    let server = scene.restore_all(&images, address)?;
    Ok((all_alive(scene, &server, fleet)?, "restored without them".into()))
}

fn reap_orphans(command: &mut Command) {
    // SAFETY: between fork and exec only prctl() is called, which is async-signal-safe. What it sets outlives exec.
    unsafe {
        command.pre_exec(|| Ok(nix::sys::prctl::set_child_subreaper(true)?));
    }
}

fn run_as_subreaper(call: Call<'_>, log: &Path) -> Result<()> {
    let mut command = call.command();
    reap_orphans(&mut command);
    let status = run_command(&mut command, LIMIT)?.status;
    ensure!(status.success(), "criu: {status}\n{}", last_errors(log));
    Ok(())
}

fn subreaper(scene: &Scene) -> Told {
    let images = scene.images()?;
    let (server, fleet) = both(scene)?;
    let (address, pid) = (server.address, server.pid());
    run_as_subreaper(scene.dump(PLUGIN, pid, &images), &images.join("dump.log"))?;
    server.task.wait(PATIENCE)?;
    run_as_subreaper(scene.restore(PLUGIN, &images)?, &images.join("restore.log"))?;
    let server = Server::restored(address, Task::adopt(pid), scene.dir());
    Ok((all_alive(scene, &server, fleet)?, "dump and restore".into()))
}

/// criu is started by `exec` from the init of a PID namespace, which has started the server. That one's pid must be free when
/// criu and the agent are there before it.
fn first_process(scene: &Scene) -> Told {
    let images = scene.images()?;
    let dir = scene.dir().to_owned();
    let (ready, go) = (dir.join("ready"), dir.join("go"));
    nix::unistd::mkfifo(&go, nix::sys::stat::Mode::S_IRWXU)?;
    let host = bound(scene.host(), &dir.join("net"))?;
    let script = "echo 1000 >/proc/sys/kernel/ns_last_pid; \
                  nsenter --net=\"$HOST\" \"$SERVER\" server --listen $LISTEN --also $ALSO \
                  </dev/null >$READY 2>$ERRORS & SERVED=$!; read GO <$GO; exec \"$@\" -t $SERVED";
    let [listen, also] = [format!("{V4}:7000"), format!("[{V6}]:7000")];
    let call = scene.dump(PLUGIN, Pid::this(), &images);
    let mut command = call.through(IN_PID_NAMESPACE.iter().chain(&["sh", "-c", script, "sh"])).command();
    command.env("SERVER", sibling_binary("soccr-test")?).env("LISTEN", &listen).env("ALSO", also);
    command.env("READY", &ready).env("ERRORS", dir.join("server.err")).env("GO", &go).env("HOST", &host.0);
    let criu = Guard(command.spawn()?);
    wait_until("the server is up", PATIENCE, || {
        Ok(fs::read_to_string(&ready).unwrap_or_default().starts_with("ready"))
    })?;
    let clients = scene.connect_all(&[listen.parse()?], CONNECTIONS, Client::connect)?;
    let fleet = Fleet::echoes(clients, Pace { period: PERIOD, parts: 10 })?;
    fs::OpenOptions::new().write(true).open(&go)?.write_all(b"go\n")?;
    criu.succeeds().with_context(|| last_errors(&images.join("dump.log")))?;
    let states = scene.status()?.states();
    ensure!(states == ["dumped"], "soccr status: {states:?}");

    // Not detached: the PID namespace ends with criu.
    let criu = Guard(scene.restore_in_front(PLUGIN, &images)?.through(IN_PID_NAMESPACE).command().spawn()?);
    let seen = fleet.stop(PATIENCE);
    ensure!(
        seen.lost.is_empty(),
        "lost:\n{}\n{}",
        seen.lost.join("\n"),
        last_errors(&images.join("restore.log"))
    );
    let status = scene.status()?;
    ensure!(status.is_empty(), "soccr status: {status}");
    scene.namespaces().try_for_each(soccr_testkit::leftovers::no_rules)?;
    criu.end_server()?;
    scene.wait_until_quiet()?;
    Ok((seen.alive.len(), "dump and restore".into()))
}

const IN_PID_NAMESPACE: [&str; 6] = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "--"];

/// A network namespace at a path that leads there in other PID namespaces, too.
fn bound(ns: &NetNs, path: &Path) -> Result<Mounted> {
    fs::write(path, "")?;
    mount(Some(ns.path().as_str()), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    Ok(Mounted(path.to_owned()))
}

/// A process that ends with the case, and its PID namespace with it.
struct Guard(Child);

impl Guard {
    fn succeeds(mut self) -> Result<()> {
        succeeds(&mut self.0)
    }

    /// A criu that was not told to detach ends with its tasks.
    fn end_server(mut self) -> Result<()> {
        let tree = Task::adopt(pid_of(&self.0));
        let is_server = |pid: &&Pid| name_and_state(**pid).is_some_and(|(name, _)| name == "soccr-test");
        let pids = tree.tree();
        kill(*pids.iter().find(is_server).context("the server is in the tree")?, Signal::SIGKILL)?;
        let ended = wait_until("criu ends with its server", LIMIT, || Ok(self.0.try_wait()?.is_some()));
        drop(tree);
        ended
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn leave_stopped(scene: &Scene) -> Result<(Server, Fleet<Client>, PathBuf)> {
    let images = scene.images()?;
    let (server, fleet) = both(scene)?;
    scene.dump(PLUGIN, server.pid(), &images).arg("--leave-stopped").run()?;
    let states = scene.status()?.states();
    ensure!(states == ["left stopped"], "soccr status: {states:?}");
    Ok((server, fleet, images))
}

fn left_stopped_continued(scene: &Scene) -> Told {
    let (server, fleet, images) = leave_stopped(scene)?;
    server.task.signal(Signal::SIGCONT)?;
    Ok((lives(scene, server, fleet, &images)?, "the server lives".into()))
}

fn left_stopped_killed(scene: &Scene) -> Told {
    let (server, fleet, images) = leave_stopped(scene)?;
    server.task.signal(Signal::SIGKILL)?;
    Ok((comes_back(scene, server, fleet, &images)?, "restored".into()))
}

fn given_up(scene: &Scene) -> Told {
    let images = scene.images()?;
    let (server, fleet) = both(scene)?;
    dump(scene, server, &images)?;
    scene.soccr(&["clean", "--orphans"])?;
    let states = scene.status()?.states();
    ensure!(states == ["dumped"], "clean --orphans ends a dump that waits: {states:?}");
    scene.soccr(&["clean", "--all"])?;
    scene.wait_until_quiet()?;
    scene.check_spotless(None)?;
    drop(fleet);
    Ok((0, "nothing is left".into()))
}

/// A server in a namespace of its own, which criu takes for an external one.
struct Outside {
    ns: NetNs,
    fleet: Fleet<Client>,
    images: PathBuf,
    address: SocketAddr,
}

fn inner_namespace(scene: &Scene) -> Result<NetNs> {
    let ns = NetNs::new()?;
    veth(
        End { ns: &ns, name: "eth0", addresses: &["10.8.0.1/24"] },
        End { ns: &scene.peer, name: "inner", addresses: &[] },
    )?;
    Ok(ns)
}

/// The peers reach the namespace from here on.
fn open_way(scene: &Scene) -> Result<()> {
    scene.peer.ip("addr add 10.8.0.2/24 dev inner")
}

fn dump_outside(scene: &Scene) -> Result<Outside> {
    let images = scene.images()?;
    let ns = inner_namespace(scene)?;
    open_way(scene)?;
    let address = "10.8.0.1:7000".parse()?;
    let server = Server::start(&ns, address, scene.dir(), ["--reuse-half"])?;
    let clients = scene.connect_all(&[address], CONNECTIONS, Client::connect)?;
    let fleet = Fleet::echoes(clients, Pace { period: PERIOD, parts: 10 })?;
    let call = scene.criu.dump(PLUGIN, server.pid(), &images).inside(scene.outside());
    call.args(["--external", &format!("net[{}]:inner", ns.inode())]).dump_and_wait(server.task)?;
    Ok(Outside { ns, fleet, images, address })
}

/// Ends the namespace, and waits until its end of the wire has gone with it. The lock goes before the wire, so that is cut
/// first: a packet that came between would be answered with a reset.
fn end_namespace(scene: &Scene, ns: NetNs) -> Result<()> {
    scene.peer.ip("link set inner down")?;
    drop(ns);
    wait_until("the namespace is gone", PATIENCE, || {
        let mut show = scene.peer.command("ip");
        show.args(["link", "show", "inner"]).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(!show.status()?.success())
    })
}

fn namespace_gone(scene: &Scene) -> Told {
    let Outside { ns, fleet, .. } = dump_outside(scene)?;
    end_namespace(scene, ns)?;
    scene.soccr(&["clean", "--all"])?;
    scene.check_spotless(None)?;
    drop(fleet);
    Ok((0, "nothing is left".into()))
}

fn namespace_made_anew(scene: &Scene) -> Told {
    let Outside { ns, fleet, images, address } = dump_outside(scene)?;
    end_namespace(scene, ns)?;
    let ns = inner_namespace(scene)?;
    let call = scene.criu.restore(PLUGIN, &images).inside(scene.outside());
    let (task, _) = call.inherit(&ns, "inner")?.restore()?;
    open_way(scene)?;
    let server = Server::restored(address, task, scene.dir());
    let checked = all_alive(scene, &server, fleet)?;
    soccr_testkit::leftovers::no_rules(&ns)?;
    Ok((checked, "restored into a new one".into()))
}
