//! What the plugin promises beyond the straight way: no namespace without a lock, no key lost, no other dump's lock
//! released, no agent that is left a real-time process.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use soccr_testkit::netns::{End, veth};
use soccr_testkit::server::sibling_binary;
use soccr_testkit::skip::skip;
use soccr_testkit::task::{self, wait_until};
use soccr_testkit::{Client, Criu, Fleet, NetNs, Place, Server, Stage, Task, leftovers};

use crate::world::{BUSY, PATIENCE, PLUGIN, SERVER_V4, stage};

const CLIENTS: usize = 10;

fn clients(stage: &Stage, server: &Server) -> Result<Vec<Client>> {
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| stage.connect(server.address)).collect::<Result<_>>()?;
    clients.iter_mut().try_for_each(|client| client.ping(1000))?;
    Ok(clients)
}

/// The plugin in which a test can have somebody die; `None`, after saying so, where it was not built.
pub fn faulty(stage: &Stage) -> Result<Option<Criu>> {
    let plugins = stage.criu.plugin().with_file_name("");
    let faulty = plugins.with_file_name("plugins-fault");
    if !faulty.join("soccr_plugin.so").exists() {
        return skip("no plugin with faults (scripts/build --with-faults)").map(|()| None);
    }
    Ok(Some(Criu::new(stage.criu.bin(), faulty).with_records(&stage.records())))
}

/// CRIU before 4.2 has no POST_FORKING hook: a namespace that is not criu's own is locked before the first connection is
/// built in it. The agent dies just before that, so what is locked by then can be seen.
#[test]
fn without_post_forking_nothing_is_built_unlocked() -> Result<()> {
    let faults = "hook.count:error,restore.disconnected:kill-agent";
    a_restore_fails_and_the_next_succeeds(Place::External, faults, |stage| {
        let locked = leftovers::rules(stage.host())?;
        ensure!(locked.iter().any(|rule| rule.contains("soccr-")), "not locked: {}", locked.join("\n"));
        Ok(())
    })
}

/// CRIU ignores what the late hook returns: a plugin that panics there kills the task.
#[test]
fn a_panic_in_the_late_hook_fails_the_restore() -> Result<()> {
    a_restore_fails_and_the_next_succeeds(Place::Host, "hook.resume:panic", |_| Ok(()))
}

/// `check` is for what the restore leaves that meets these faults.
fn a_restore_fails_and_the_next_succeeds(
    place: Place,
    faults: &str,
    check: impl FnOnce(&Stage) -> Result<()>,
) -> Result<()> {
    let Some(mut stage) = stage(place, &[PLUGIN])? else { return Ok(()) };
    let Some(faulty) = faulty(&stage)? else { return Ok(()) };
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let mut clients = clients(&stage, &server)?;
    let images = stage.images()?;
    let pid = server.pid();
    let address = stage.freeze(server, PLUGIN, &images)?;

    let plain = std::mem::replace(&mut stage.criu, faulty);
    let failed = stage.restore(PLUGIN, &images)?.env("SOCCR_FAULT", faults).run();
    ensure!(failed.is_err(), "{faults}: the restore did not fail");
    check(&stage)?;
    stage.criu = plain;
    Task::adopt(pid).wait(PATIENCE)?;
    stage.wait_until_quiet()?;

    let server = stage.thaw(address, PLUGIN, &images)?;
    clients.iter_mut().try_for_each(|client| client.ping(1000))?;
    stage.wait_until_clean(Some(&server))
}

/// Such a CRIU has been given the namespace as a descriptor, whose peers go on sending: it is locked from the beginning.
#[test]
fn without_post_forking_no_peer_of_a_namespace_by_path_is_reset() -> Result<()> {
    let Some(mut stage) = stage(Place::External, &[PLUGIN])? else { return Ok(()) };
    let Some(faulty) = faulty(&stage)? else { return Ok(()) };
    stage.criu = faulty;
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let busy = Fleet::echoes(clients(&stage, &server)?, BUSY)?;
    let images = stage.images()?;
    let address = stage.freeze(server, PLUGIN, &images)?;
    let call = stage.restore(PLUGIN, &images)?.env("SOCCR_FAULT", "hook.count:error");
    let server = Server::restored(address, call.restore()?.0, stage.dir());
    for mut client in busy.stop(PATIENCE).whole()? {
        client.ping(1000)?;
    }
    stage.wait_until_clean(Some(&server))
}

/// A tree whose root lives in one namespace and whose server in another, both by path. CRIU locks the root's only.
#[test]
fn a_nested_namespace_is_locked_throughout() -> Result<()> {
    let Some(stage) = stage(Place::External, &[PLUGIN])? else { return Ok(()) };
    let nested = NetNs::new()?;
    let inside = End { ns: &nested, name: "eth1", addresses: &["10.9.1.1/24"] };
    veth(inside, End { ns: &stage.peer, name: "eth1", addresses: &["10.9.1.2/24"] })?;
    let server = nested_server(&stage, &nested)?;
    let clients = clients(&stage, &server)?;
    let busy = Fleet::echoes(clients, BUSY)?;

    let images = stage.images()?;
    let address = server.address;
    let external = format!("net[{}]:nested", nested.inode());
    let call = stage.dump(PLUGIN, server.pid(), &images).args(["--external", &external]);
    call.dump_and_wait(server.task)?;
    let call = stage.restore(PLUGIN, &images)?.inherit(&nested, "nested")?;
    let server = Server::restored(address, call.restore()?.0, stage.dir());
    for mut client in busy.stop(PATIENCE).whole()? {
        client.ping(1000)?;
    }
    stage.wait_until_clean(Some(&server))?;
    leftovers::no_rules(&nested)
}

/// A shell whose child is the server.
fn nested_server(stage: &Stage, nested: &NetNs) -> Result<Server> {
    let script = "nsenter --net=\"$1\" \"$2\" server --listen 10.9.1.1:0 --mode echo & exec >/dev/null; wait";
    let mut command = stage.host().command("sh");
    command.args(["-c", script, "sh", &nested.path()]).arg(sibling_binary("soccr-test")?);
    task::in_own_session(&mut command);
    Server::spawn(&mut command, stage.dir())
}

/// A tree with a namespace of its own has a record, too: CRIU's lock waits there for the restore, as long as the namespace.
#[test]
fn a_dump_of_a_namespace_is_recorded_until_its_restore() -> Result<()> {
    for place in [Place::External, Place::Dumped] {
        let Some(mut stage) = stage(place, &[PLUGIN])? else { return Ok(()) };
        let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
        let mut clients = clients(&stage, &server)?;
        let images = stage.images()?;
        let address = stage.freeze(server, PLUGIN, &images)?;
        // The test itself holds the namespace until the dump is over.
        let waiting = records(&stage)?;
        ensure!(waiting == 1, "{place:?}: {waiting} records of a dump");
        let server = stage.thaw(address, PLUGIN, &images)?;
        clients.iter_mut().try_for_each(|client| client.ping(1000))?;
        stage.wait_until_clean(Some(&server))?;
        let left = records(&stage)?;
        ensure!(left == 0, "{place:?}: {left} records are left");
    }
    Ok(())
}

/// How many there are. Beside one there may be a socket, whose name begins with a dot.
fn records(stage: &Stage) -> Result<usize> {
    let names = fs::read_dir(stage.records())?.map(|entry| Ok(entry?.file_name()));
    let names: Vec<_> = names.collect::<Result<_>>()?;
    Ok(names.iter().filter(|name| !name.as_encoded_bytes().starts_with(b".")).count())
}

/// Real time is for the moments in which sockets are in repair mode. The agent that waits for the outcome is ordinary.
#[test]
fn the_waiting_agent_is_no_real_time_process() -> Result<()> {
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let mut clients = clients(&stage, &server)?;
    let images = stage.images()?;
    stage.dump(PLUGIN, server.pid(), &images).arg("--leave-stopped").run()?;
    let agents = stage.agents()?;
    ensure!(agents.len() == 1, "{agents:?}");
    let stat = fs::read_to_string(format!("/proc/{}/stat", agents[0].pid))?;
    // Field 41, counted from the state (field 3), which follows the name in brackets.
    let policy = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(41 - 3));
    ensure!(policy == Some("0"), "the agent's policy is {policy:?}");
    server.task.signal(Signal::SIGCONT)?;
    stage.wait_until_clean(Some(&server))?;
    clients.iter_mut().try_for_each(|client| client.ping(1000))
}

/// Images that name another dump's lock as theirs are not restored, and the other dump is. A copy of its folder will do.
#[test]
fn images_cannot_release_the_lock_of_another_dump() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let mut clients = clients(&stage, &server)?;
    let images = stage.dir().join("victim");
    fs::create_dir(&images)?;
    let address = stage.freeze(server, PLUGIN, &images)?;

    let attacker = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let mut others = self::clients(&stage, &attacker)?;
    let hostile = stage.images()?;
    let hostile_address = stage.freeze(attacker, PLUGIN, &hostile)?;
    let own = run_id(&hostile)?;
    set_run_id(&hostile, &own, &run_id(&images)?)?;
    let failed = stage.restore(PLUGIN, &hostile)?.run();
    let error = failed.err().context("images that name another dump were restored")?;
    ensure!(format!("{error:#}").contains("hold other connections"), "{error:#}");
    let named = run_id(&images)?;
    let locked = leftovers::rules(stage.host())?;
    ensure!(locked.iter().any(|rule| rule.contains(&named)), "the other dump is unlocked");

    set_run_id(&hostile, &run_id(&hostile)?, &own)?;
    let attacker = stage.thaw(hostile_address, PLUGIN, &hostile)?;
    others.iter_mut().try_for_each(|client| client.ping(1000))?;
    let copy = stage.dir().join("copy");
    let copied = Command::new("cp").arg("-a").args([&images, &copy]).status()?;
    ensure!(copied.success(), "cp: {copied}");
    let server = stage.thaw(address, PLUGIN, &copy)?;
    clients.iter_mut().try_for_each(|client| client.ping(1000))?;
    stage.wait_until_clean(Some(&server))?;
    stage.wait_until_clean(Some(&attacker))?;
    ensure!(records(&stage)? == 0, "a record is left");
    Ok(())
}

/// Where the inventory names the dump: `soccr-` and twelve digits.
fn run_id(images: &Path) -> Result<String> {
    let inventory = fs::read(images.join("inventory.img"))?;
    let at = inventory.windows(6).position(|bytes| bytes == b"soccr-").context("no run id")?;
    Ok(String::from_utf8_lossy(&inventory[at..at + 18]).into_owned())
}

fn set_run_id(images: &Path, from: &str, to: &str) -> Result<()> {
    let path = images.join("inventory.img");
    let mut inventory = fs::read(&path)?;
    let found = inventory.windows(from.len()).position(|bytes| bytes == from.as_bytes());
    let at = found.context("no such run id")?;
    inventory[at..at + to.len()].copy_from_slice(to.as_bytes());
    Ok(fs::write(path, inventory)?)
}

/// Keys that nobody can read back: the dump is refused before anything is touched, and says whose they are. So is that of a
/// listener, whose connections would have had them.
#[test]
fn connections_and_listeners_with_md5_keys_are_refused() -> Result<()> {
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let (listener, mut local, mut remote) = match signed_connection(&stage)? {
        Some(signed) => signed,
        None => return skip("this kernel has no TCP_MD5SIG"),
    };
    let tuple = format!("{} ↔ {}", local.local_addr()?, local.peer_addr()?);
    let ends = [local.local_addr()?.to_string(), local.peer_addr()?.to_string()];
    for (socket, named) in [(local.as_fd(), ends.as_slice()), (listener.as_fd(), &ends[..1])] {
        let child = holder(socket.try_clone_to_owned()?)?;
        let images = stage.images()?;
        let refused = stage.dump(PLUGIN, child.pid(), &images).run();
        let error = format!("{:#}", refused.err().context("a key was lost")?);
        let expected = [format!("pid {} fd 7", child.pid()), "TCP-MD5".into()];
        ensure!(expected.iter().chain(named).all(|part| error.contains(part)), "{tuple}: {error}");
        ensure!(child.is_alive()?, "the task is gone");
        stage.wait_until_clean(None)?;
    }
    // It still speaks, signed.
    use std::io::{Read, Write};
    let mut heard = [0; 5];
    remote.write_all(b"hello")?;
    local.read_exact(&mut heard)?;
    ensure!(heard == *b"hello");
    Ok(())
}

/// A process that does nothing but hold this socket, as descriptor 7.
fn holder(socket: std::os::fd::OwnedFd) -> Result<Task> {
    let mut command = Command::new("sleep");
    command.arg("1000").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    task::in_own_session(&mut command);
    let fd = socket.as_raw_fd();
    // SAFETY: between fork and exec only dup2() is called, which is async-signal-safe; the closure's descriptor is open.
    unsafe {
        command.pre_exec(move || match libc::dup2(fd, 7) {
            7 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let child = command.spawn()?;
    let task = Task::adopt(Pid::from_raw(i32::try_from(child.id())?));
    let exe = format!("/proc/{}/comm", task.pid());
    wait_until("the holder runs", PATIENCE, || Ok(fs::read_to_string(&exe)?.trim() == "sleep"))?;
    Ok(task)
}

/// A listener and both ends of a connection whose segments are signed; `None` on a kernel that cannot.
fn signed_connection(stage: &Stage) -> Result<Option<(TcpListener, TcpStream, TcpStream)>> {
    let listener = stage.host().run(|| TcpListener::bind("10.9.0.1:0"))?;
    let address = listener.local_addr()?;
    if !sign(&listener, "10.9.0.2:0".parse()?)? {
        return Ok(None);
    }
    let remote = stage.peer.run(|| -> Result<TcpStream> {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, socket};
        let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        ensure!(sign(&socket, SocketAddr::new(address.ip(), 0))?, "the listener could be signed");
        let SocketAddr::V4(server) = address else { unreachable!("bound to IPv4") };
        connect(socket.as_raw_fd(), &SockaddrIn::from(server))?;
        Ok(TcpStream::from(socket))
    })?;
    let (local, _) = listener.accept()?;
    Ok(Some((listener, local, remote)))
}

/// Signs segments from and to this address; `false` on a kernel that cannot.
fn sign(socket: &impl AsFd, peer: SocketAddr) -> Result<bool> {
    const TCP_MD5SIG: i32 = 14;
    /// `struct tcp_md5sig`: the address (128 bytes), flags, prefix, length of the key, interface, key (80 bytes).
    const LENGTH: usize = 128 + 8 + 80;
    let SocketAddr::V4(peer) = peer else { unreachable!("an IPv4 address") };
    let mut value = [0_u8; LENGTH];
    value[..2].copy_from_slice(&2_u16.to_ne_bytes());
    value[4..8].copy_from_slice(&peer.ip().octets());
    value[130..132].copy_from_slice(&6_u16.to_ne_bytes());
    value[136..142].copy_from_slice(b"secret");
    // SAFETY: the kernel reads `LENGTH` bytes of a live array.
    let set = unsafe {
        let length = libc::socklen_t::try_from(LENGTH)?;
        let fd = socket.as_fd().as_raw_fd();
        libc::setsockopt(fd, libc::IPPROTO_TCP, TCP_MD5SIG, value.as_ptr().cast(), length)
    };
    match nix::errno::Errno::result(set) {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::ENOPROTOOPT) => Ok(false),
        Err(error) => Err(error).context("TCP_MD5SIG"),
    }
}

/// An agent dies when all is saved, and the next one unlocks also where the tree only listens.
#[test]
fn a_second_agent_unlocks_a_listener_without_connections() -> Result<()> {
    for place in [Place::Host, Place::External] {
        let Some(mut stage) = stage(place, &[PLUGIN])? else { return Ok(()) };
        let Some(faulty) = faulty(&stage)? else { return Ok(()) };
        let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
        let images = stage.images()?;
        let plain = std::mem::replace(&mut stage.criu, faulty);
        let dump = stage.dump(PLUGIN, server.pid(), &images).arg("--leave-running");
        dump.env("SOCCR_FAULT", "dump.end:kill-agent").run()?;
        stage.criu = plain;
        let log = std::fs::read_to_string(images.join("dump.log"))?;
        ensure!(log.contains("took over from an agent that died"), "nobody took over:\n{log}");
        stage.wait_until_clean(Some(&server))?;
        stage.connect(server.address)?.ping(1000)?;
    }
    Ok(())
}
