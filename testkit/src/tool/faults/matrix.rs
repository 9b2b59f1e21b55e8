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
use soccr_testkit::task::{run as run_command, wait_until};
use soccr_testkit::{NetNs, Server};

use crate::faults::fleet::Fleet;
use crate::faults::outcome::{self, Kind};
use crate::faults::report::Report;
use crate::faults::stage::{PATIENCE, Stage};
use crate::faults::tools::{RUN_DIR, Tools, name_and_state};
use crate::faults::{kernel, stage};

/// How many connections were checked, and what is worth telling.
type Told = Result<(usize, String)>;
type Case = fn(&mut Stage) -> Told;

const CASES: [(&str, Case); 19] = [
    ("the disk is full", full_disk),
    ("the image folder is read-only", read_only),
    ("no nf_tables, dump", no_nftables_dump),
    ("no nf_tables, restore", no_nftables_restore),
    ("netlink answers ENOBUFS, dump", no_buffers_dump),
    ("netlink answers ENOBUFS, restore", no_buffers_restore),
    ("too few descriptors, dump", few_descriptors_dump),
    ("too few descriptors, restore", few_descriptors_restore),
    ("the lock is deleted from outside", lock_deleted),
    ("two dumps at once", two_at_once),
    ("restored twice", restored_twice),
    ("the records are gone (reboot)", records_gone),
    ("criu is a child subreaper", subreaper),
    ("criu is PID 1", first_process),
    ("left stopped, then continued", left_stopped_continued),
    ("left stopped, then killed", left_stopped_killed),
    ("a dump that is given up: clean --all", given_up),
    ("the namespace goes away, clean", namespace_gone),
    ("the namespace goes away, restore", namespace_made_anew),
];

const CONNECTIONS: usize = 8;
const FULL: usize = 4;
const PERIOD: Duration = Duration::from_millis(40);
const LIMIT: Duration = Duration::from_secs(30);

pub fn run(tools: &Tools, report: &mut Report, only: Option<&str>) -> Result<()> {
    // What criu itself asks the kernel for is remembered from here on.
    let mut check = Command::new(tools.criu.bin());
    check.arg("check").stdout(Stdio::null()).stderr(Stdio::null()).status().context("criu check")?;
    for (name, case) in CASES {
        if only.is_some_and(|only| !name.contains(only)) {
            continue;
        }
        let mut stage = Stage::new(tools)?;
        report.case(name, &case(&mut stage));
        stage.reap(None)?;
    }
    Ok(())
}

fn busy(stage: &Stage, count: usize, full: usize) -> Result<(Server, Fleet)> {
    let server = stage.serve()?;
    let clients = stage.connect(&server, count)?;
    let fleet = stage.busy(&server, clients, full, PERIOD)?;
    Ok((server, fleet))
}

fn both(stage: &Stage) -> Result<(Server, Fleet)> {
    busy(stage, CONNECTIONS, FULL)
}

/// Runs a criu that must fail; what it said, which must have each of `words` in it.
fn fails(mut command: Command, log: &Path, words: &[&str]) -> Result<String> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let (status, _) = run_command(&mut command, LIMIT).with_context(|| last_errors(log))?;
    ensure!(!status.success(), "criu succeeds");
    let text = String::from_utf8_lossy(&fs::read(log)?).into_owned();
    let errors: Vec<&str> = text.lines().filter(|line| line.contains("Error (soccr)")).collect();
    let Some(first) = errors.iter().find(|line| words.iter().all(|word| line.contains(word))) else {
        bail!("nothing of {words:?} in the errors:\n{}", last_errors(log));
    };
    Ok(first.split_once("): ").map_or(*first, |(_, said)| said).to_owned())
}

fn lives(stage: &Stage, server: Server, fleet: Fleet, images: &Path) -> Result<usize> {
    ends(stage, server, fleet, images, Kind::Lives)
}

fn comes_back(stage: &Stage, server: Server, fleet: Fleet, images: &Path) -> Result<usize> {
    ends(stage, server, fleet, images, Kind::Restored)
}

fn ends(stage: &Stage, server: Server, fleet: Fleet, images: &Path, kind: Kind) -> Result<usize> {
    let verdict = outcome::of_dump(stage, server, fleet, images, false)?;
    ensure!(verdict.lost.is_empty(), "lost:\n{}", verdict.lost.join("\n"));
    ensure!(verdict.kind == kind, "{:?} instead of {kind:?}", verdict.kind);
    Ok(verdict.connections)
}

/// After a dump and a failed restore: a second one brings all back.
fn second_try(stage: &Stage, address: SocketAddr, fleet: Fleet, images: &Path) -> Result<usize> {
    stage.wait_until_quiet()?;
    let server = stage.restore_all(images, address)?;
    all_alive(stage, &server, fleet)
}

fn all_alive(stage: &Stage, server: &Server, fleet: Fleet) -> Result<usize> {
    let seen = fleet.stop(PATIENCE);
    ensure!(seen.lost.is_empty(), "lost:\n{}", seen.lost.join("\n"));
    stage.wait_until_quiet()?;
    stage.check_spotless(Some(server))?;
    Ok(seen.alive.len())
}

fn dump(stage: &Stage, server: Server, images: &Path) -> Result<SocketAddr> {
    let address = server.address;
    stage.dump(&stage.tools.criu, server.pid(), images).dump_and_wait(server.task)?;
    Ok(address)
}

/// A file system is unmounted when the case is over.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn full_disk(stage: &mut Stage) -> Told {
    let images = stage.images()?;
    mount(Some("none"), &images, Some("tmpfs"), MsFlags::empty(), Some("size=64k"))?;
    let _mounted = Mounted(images.clone());
    let (server, fleet) = both(stage)?;
    let log = stage.dir().join("elsewhere.log");
    let call = stage.dump(&stage.tools.criu, server.pid(), &images).arg("-o").arg(&log);
    let said = fails(call.command()?, &log, &["tcp-stream-", "→", "No space left"])?;
    Ok((lives(stage, server, fleet, &images)?, said))
}

/// Of a folder that is read-only from the start CRIU itself complains before any hook.
fn read_only(stage: &mut Stage) -> Told {
    let images = stage.images()?;
    let flags = MsFlags::MS_BIND;
    mount(Some(&images), &images, None::<&str>, flags, None::<&str>)?;
    let _mounted = Mounted(images.clone());
    let read_only = flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, &images, None::<&str>, read_only, None::<&str>)?;
    let (server, fleet) = both(stage)?;
    let log = stage.dir().join("elsewhere.log");
    let call = stage.dump(&stage.tools.criu, server.pid(), &images).arg("-o").arg(&log);
    let said = fails(call.command()?, &log, &["tcp-stream-", "→", "Read-only file system"])?;
    Ok((lives(stage, server, fleet, &images)?, said))
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

fn few_descriptors(command: &mut Command) {
    // SAFETY: between fork and exec only setrlimit() is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(|| Ok(setrlimit(Resource::RLIMIT_NOFILE, 64, 64)?));
    }
}

fn crippled_dump(stage: &mut Stage, count: usize, cripple: fn(&mut Command), words: &[&str]) -> Told {
    let images = stage.images()?;
    let (server, fleet) = busy(stage, count, FULL)?;
    let mut command = stage.dump(&stage.tools.criu, server.pid(), &images).command()?;
    cripple(&mut command);
    let said = fails(command, &images.join("dump.log"), words)?;
    Ok((lives(stage, server, fleet, &images)?, said))
}

fn crippled_restore(stage: &mut Stage, count: usize, cripple: fn(&mut Command), words: &[&str]) -> Told {
    let images = stage.images()?;
    let (server, fleet) = busy(stage, count, FULL)?;
    let address = dump(stage, server, &images)?;
    let mut command = stage.restore(&stage.tools.criu, &images).command()?;
    cripple(&mut command);
    let said = fails(command, &images.join("restore.log"), words)?;
    Ok((second_try(stage, address, fleet, &images)?, said))
}

fn no_nftables_dump(stage: &mut Stage) -> Told {
    crippled_dump(stage, CONNECTIONS, without_nftables, &["nf_tables"])
}

fn no_nftables_restore(stage: &mut Stage) -> Told {
    crippled_restore(stage, CONNECTIONS, without_nftables, &["nf_tables"])
}

fn no_buffers_dump(stage: &mut Stage) -> Told {
    crippled_dump(stage, CONNECTIONS, without_buffers, &["net:["])
}

fn no_buffers_restore(stage: &mut Stage) -> Told {
    crippled_restore(stage, CONNECTIONS, without_buffers, &["net:["])
}

fn few_descriptors_dump(stage: &mut Stage) -> Told {
    crippled_dump(stage, 100, few_descriptors, &["Too many open files"])
}

fn few_descriptors_restore(stage: &mut Stage) -> Told {
    let images = stage.images()?;
    let (server, fleet) = busy(stage, 100, FULL)?;
    let address = dump(stage, server, &images)?;
    let mut command = stage.restore(&stage.tools.criu, &images).command()?;
    few_descriptors(&mut command);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // CRIU's own descriptors run out, too, and which come first is its business.
    let (status, _) = run_command(&mut command, LIMIT)?;
    ensure!(!status.success(), "criu restores 100 connections with 64 descriptors");
    let said = last_errors(&images.join("restore.log"));
    Ok((second_try(stage, address, fleet, &images)?, said.lines().next().unwrap_or_default().to_owned()))
}

/// Peers that are silent meanwhile notice nothing. (One that speaks meets no socket and is reset: that is what the
/// lock is for.)
fn lock_deleted(stage: &mut Stage) -> Told {
    let images = stage.images()?;
    let (server, fleet) = busy(stage, CONNECTIONS, 0)?;
    let seen = fleet.stop(PATIENCE);
    ensure!(seen.lost.is_empty(), "lost:\n{}", seen.lost.join("\n"));
    // A late acknowledgement that nothing stops is answered with a reset while the sockets are gone.
    wait_until("the peers are silent", PATIENCE, || {
        let mut sockets = tcp_sockets(server.pid())?;
        sockets.retain(|socket| socket.peer().is_some());
        for client in &seen.alive {
            sockets.push(TaskSocket::of(client)?);
        }
        sockets.iter().try_fold(true, |silent, socket| Ok(silent && socket.unacked()? == 0))
    })?;
    let address = dump(stage, server, &images)?;
    let flushed = stage.host.command("nft").args(["flush", "ruleset"]).status()?;
    ensure!(flushed.success(), "nft: {flushed}");
    let server = stage.restore_all(&images, address)?;
    let fleet = stage.busy(&server, seen.alive, FULL, PERIOD)?;
    Ok((all_alive(stage, &server, fleet)?, "with silent peers".into()))
}

fn two_at_once(stage: &mut Stage) -> Told {
    let trees = [busy(stage, CONNECTIONS, FULL)?, busy(stage, CONNECTIONS, FULL)?];
    let folders = [0, 1].map(|nth| stage.dir().join(format!("tree-{nth}")));
    let mut calls = Vec::new();
    for ((server, _), images) in trees.iter().zip(&folders) {
        fs::create_dir(images)?;
        calls.push(stage.dump(&stage.tools.criu, server.pid(), images).spawn()?.0);
    }
    for (criu, images) in calls.into_iter().zip(&folders) {
        succeeds(criu).with_context(|| last_errors(&images.join("dump.log")))?;
    }
    let mut dumped = Vec::new();
    for (server, fleet) in trees {
        let address = server.address;
        server.task.wait(PATIENCE)?;
        dumped.push((address, fleet));
    }
    let states = stage.status()?.states();
    ensure!(states == ["dumped", "dumped"], "soccr status: {states:?}");
    let mut restored = Vec::new();
    for ((address, fleet), images) in dumped.into_iter().zip(&folders) {
        restored.push((stage.restore_all(images, address)?, fleet));
    }
    let mut checked = 0;
    for (server, fleet) in restored {
        checked += all_alive(stage, &server, fleet)?;
    }
    Ok((checked, "both restored".into()))
}

fn succeeds(mut criu: Child) -> Result<()> {
    wait_until("criu ends", LIMIT, || Ok(criu.try_wait()?.is_some()))?;
    let status = criu.wait()?;
    ensure!(status.success(), "criu: {status}");
    Ok(())
}

fn restored_twice(stage: &mut Stage) -> Told {
    let images = stage.images()?;
    let (server, fleet) = both(stage)?;
    let address = dump(stage, server, &images)?;
    let server = stage.restore_all(&images, address)?;
    let again = stage.restore(&stage.tools.criu, &images).command()?;
    let said = fails(again, &images.join("restore.log"), &["→", "is alive"])?;
    stage.wait_until_quiet()?;
    Ok((all_alive(stage, &server, fleet)?, said))
}

fn records_gone(stage: &mut Stage) -> Told {
    let images = stage.images()?;
    let (server, fleet) = both(stage)?;
    let address = dump(stage, server, &images)?;
    fs::remove_dir_all(stage.records())?;
    let server = stage.restore_all(&images, address)?;
    Ok((all_alive(stage, &server, fleet)?, "restored without them".into()))
}

fn reap_orphans(command: &mut Command) {
    // SAFETY: between fork and exec only prctl() is called, which is async-signal-safe. What it sets outlives exec.
    unsafe {
        command.pre_exec(|| Ok(nix::sys::prctl::set_child_subreaper(true)?));
    }
}

fn run_as_subreaper(call: Call<'_>, log: &Path) -> Result<()> {
    let mut command = call.command()?;
    reap_orphans(&mut command);
    let (status, _) = run_command(&mut command, LIMIT)?;
    ensure!(status.success(), "criu: {status}\n{}", last_errors(log));
    Ok(())
}

fn subreaper(stage: &mut Stage) -> Told {
    let images = stage.images()?;
    let (server, fleet) = both(stage)?;
    let (address, pid) = (server.address, server.pid());
    run_as_subreaper(stage.dump(&stage.tools.criu, pid, &images), &images.join("dump.log"))?;
    server.task.wait(PATIENCE)?;
    run_as_subreaper(stage.restore(&stage.tools.criu, &images), &images.join("restore.log"))?;
    let server = Server::restored(address, soccr_testkit::Task::adopt(pid), stage.dir());
    Ok((all_alive(stage, &server, fleet)?, "dump and restore".into()))
}

/// criu is started by `exec` from the init of a PID namespace. The server's pid must be free when criu and the agent
/// are there before it.
fn first_process(stage: &mut Stage) -> Told {
    let images = stage.images()?;
    let dir = stage.dir().to_owned();
    let (ready, go) = (dir.join("ready"), dir.join("go"));
    nix::unistd::mkfifo(&go, nix::sys::stat::Mode::S_IRWXU)?;
    let script = "echo 1000 >/proc/sys/kernel/ns_last_pid; \"$SERVER\" server --listen $LISTEN --also $ALSO \
                  </dev/null >$READY 2>$ERRORS & SERVED=$!; read GO <$GO; exec \"$@\" -t $SERVED";
    let also = SocketAddr::new(stage::V6.parse()?, 7000).to_string();
    let listen = SocketAddr::new(stage::V4.parse()?, 7000).to_string();
    let mut command = in_pid_namespace(stage);
    command.args(["sh", "-c", script, "sh"]).args(criu_words(stage, "dump", &images));
    command.env("SERVER", sibling_binary("soccr-test")?).env("LISTEN", &listen).env("ALSO", also);
    command.env("READY", &ready).env("ERRORS", dir.join("server.err")).env("GO", &go);
    let criu = Guard(command.spawn()?);
    wait_until("the server is up", PATIENCE, || {
        Ok(fs::read_to_string(&ready).unwrap_or_default().starts_with("ready"))
    })?;
    let clients = stage.peer.run(|| {
        let connect = |_| soccr_testkit::Client::connect(listen.parse()?);
        (0..CONNECTIONS).map(connect).collect::<Result<Vec<_>>>()
    })?;
    let fleet = Fleet::start(clients, 0, PERIOD)?;
    fs::OpenOptions::new().write(true).open(&go)?.write_all(b"go\n")?;
    criu.succeeds().with_context(|| last_errors(&images.join("dump.log")))?;
    let states = stage.status()?.states();
    ensure!(states == ["dumped"], "soccr status: {states:?}");

    let mut command = in_pid_namespace(stage);
    command.args(criu_words(stage, "restore", &images));
    let criu = Guard(command.spawn()?);
    let seen = fleet.stop(PATIENCE);
    ensure!(
        seen.lost.is_empty(),
        "lost:\n{}\n{}",
        seen.lost.join("\n"),
        last_errors(&images.join("restore.log"))
    );
    let status = stage.status()?;
    ensure!(status.is_empty(), "soccr status: {status}");
    soccr_testkit::leftovers::no_rules(&stage.host)?;
    criu.end_server()?;
    stage.wait_until_quiet()?;
    Ok((seen.alive.len(), "dump and restore".into()))
}

fn in_pid_namespace(stage: &Stage) -> Command {
    let mut command = stage.host.command("unshare");
    command.args(["--pid", "--fork", "--mount-proc", "--kill-child", "--"]);
    command.env(RUN_DIR, stage.records()).env("SOCCR_LOCK", "nftables");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn criu_words(stage: &Stage, action: &str, images: &Path) -> Vec<String> {
    let criu = &stage.tools.criu;
    let words = [
        criu.bin().display().to_string(),
        action.into(),
        "--no-default-config".into(),
        "--tcp-close".into(),
        "-v4".into(),
        "-D".into(),
        images.display().to_string(),
        "-o".into(),
        format!("{action}.log"),
        "--lib".into(),
        criu.plugin().with_file_name("").display().to_string(),
    ];
    words.into()
}

/// A process that ends with the case, and its PID namespace with it.
struct Guard(Child);

impl Guard {
    fn succeeds(mut self) -> Result<()> {
        wait_until("criu ends", LIMIT, || Ok(self.0.try_wait()?.is_some()))?;
        let status = self.0.wait()?;
        ensure!(status.success(), "criu: {status}");
        Ok(())
    }
}

impl Guard {
    /// A criu that was not told to detach ends with its tasks.
    fn end_server(mut self) -> Result<()> {
        let tree = soccr_testkit::Task::adopt(Pid::from_raw(i32::try_from(self.0.id())?));
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

fn leave_stopped(stage: &mut Stage) -> Result<(Server, Fleet, PathBuf)> {
    let images = stage.images()?;
    let (server, fleet) = both(stage)?;
    stage.dump(&stage.tools.criu, server.pid(), &images).arg("--leave-stopped").run()?;
    let states = stage.status()?.states();
    ensure!(states == ["left stopped"], "soccr status: {states:?}");
    Ok((server, fleet, images))
}

fn left_stopped_continued(stage: &mut Stage) -> Told {
    let (server, fleet, images) = leave_stopped(stage)?;
    server.task.signal(Signal::SIGCONT)?;
    Ok((lives(stage, server, fleet, &images)?, "the server lives".into()))
}

fn left_stopped_killed(stage: &mut Stage) -> Told {
    let (server, fleet, images) = leave_stopped(stage)?;
    server.task.signal(Signal::SIGKILL)?;
    Ok((comes_back(stage, server, fleet, &images)?, "restored".into()))
}

fn given_up(stage: &mut Stage) -> Told {
    let images = stage.images()?;
    let (server, fleet) = both(stage)?;
    dump(stage, server, &images)?;
    stage.tools.soccr(&stage.host, &stage.records(), &["clean", "--orphans"])?;
    let states = stage.status()?.states();
    ensure!(states == ["dumped"], "clean --orphans ends a dump that waits: {states:?}");
    stage.tools.soccr(&stage.host, &stage.records(), &["clean", "--all"])?;
    stage.wait_until_quiet()?;
    stage.check_spotless(None)?;
    drop(fleet.stop(Duration::ZERO));
    Ok((0, "nothing is left".into()))
}

/// A server in a namespace of its own, which criu takes for an external one.
struct Outside {
    ns: NetNs,
    fleet: Fleet,
    images: PathBuf,
    address: SocketAddr,
}

fn inner_namespace(stage: &Stage) -> Result<NetNs> {
    let ns = NetNs::new()?;
    veth(
        End { ns: &ns, name: "eth0", addresses: &["10.8.0.1/24"] },
        End { ns: &stage.peer, name: "inner", addresses: &[] },
    )?;
    Ok(ns)
}

/// The peers reach the namespace from here on.
fn open_way(stage: &Stage) -> Result<()> {
    stage.peer.ip("addr add 10.8.0.2/24 dev inner")
}

fn dump_outside(stage: &mut Stage) -> Result<Outside> {
    let images = stage.images()?;
    let ns = inner_namespace(stage)?;
    open_way(stage)?;
    let address = "10.8.0.1:7000".parse()?;
    let server = Server::start(&ns, address, stage.dir(), ["--reuse-half"])?;
    let clients = stage.peer.run(|| {
        let connect = |_| soccr_testkit::Client::connect(address);
        (0..CONNECTIONS).map(connect).collect::<Result<Vec<_>>>()
    })?;
    let fleet = Fleet::start(clients, 0, PERIOD)?;
    let call = stage.dump(&stage.tools.criu, server.pid(), &images);
    call.args(["--external", &format!("net[{}]:inner", ns.inode())]).dump_and_wait(server.task)?;
    Ok(Outside { ns, fleet, images, address })
}

/// Ends the namespace, and waits until its end of the wire has gone with it. The lock goes before the wire, so that is cut
/// first: a packet that came between would be answered with a reset.
fn end_namespace(stage: &Stage, ns: NetNs) -> Result<()> {
    stage.peer.ip("link set inner down")?;
    drop(ns);
    wait_until("the namespace is gone", PATIENCE, || {
        let mut show = stage.peer.command("ip");
        show.args(["link", "show", "inner"]).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(!show.status()?.success())
    })
}

fn namespace_gone(stage: &mut Stage) -> Told {
    let Outside { ns, fleet, .. } = dump_outside(stage)?;
    end_namespace(stage, ns)?;
    stage.tools.soccr(&stage.host, &stage.records(), &["clean", "--all"])?;
    stage.check_spotless(None)?;
    drop(fleet.stop(Duration::ZERO));
    Ok((0, "nothing is left".into()))
}

fn namespace_made_anew(stage: &mut Stage) -> Told {
    let Outside { ns, fleet, images, address } = dump_outside(stage)?;
    end_namespace(stage, ns)?;
    let ns = inner_namespace(stage)?;
    let (task, _) = stage.restore(&stage.tools.criu, &images).inherit(&ns, "inner")?.restore()?;
    open_way(stage)?;
    let server = Server::restored(address, task, stage.dir());
    let checked = all_alive(stage, &server, fleet)?;
    soccr_testkit::leftovers::no_rules(&ns)?;
    Ok((checked, "restored into a new one".into()))
}
