//! However a dump ends, the connections of a server that runs on are alive, and nothing is left.

use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::fcntl::AT_FDCWD;
use nix::sys::fanotify::{
    EventFFlags, Fanotify, FanotifyResponse, InitFlags, MarkFlags, MaskFlags, Response,
};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use soccr_testkit::criu::last_errors;
use soccr_testkit::task::{self, wait_until};
use soccr_testkit::{Busy, Server, Task};

use crate::world::{PATIENCE, PLUGIN, PLUGIN_IPTABLES, Place, SERVER_V4, World};

/// Clients that send all the time, whatever happens to the server.
const BUSY: usize = 20;

fn busy_server(world: &World, args: &[&str]) -> Result<(Server, Busy)> {
    let server = world.serve(SERVER_V4, &[&["--mode", "echo"], args].concat())?;
    let clients = (0..BUSY).map(|_| world.connect(server.address)).collect::<Result<_>>()?;
    Ok((server, Busy::start(clients)?))
}

/// The server runs on and nothing is left; the clients go on.
fn lives_on(world: &World, server: &Server, busy: Busy) -> Result<()> {
    ensure!(server.task.is_alive()?, "the server is gone");
    world.wait_until_clean(server)?;
    let (clients, _) = busy.stop()?;
    ensure!(clients.iter().all(|client| client.received() > 0), "a client never got anything");
    for mut client in clients {
        client.ping(1000)?;
    }
    Ok(())
}

#[test]
fn leave_running() -> Result<()> {
    for side in [PLUGIN, PLUGIN_IPTABLES] {
        let Some(mut world) = World::new(Place::Host, &[side])? else { return Ok(()) };
        let (server, busy) = busy_server(&world, &[])?;
        let images = world.images()?;
        let call = world.criu.dump(side, server.pid(), &images).inside(world.host());
        call.arg("--leave-running").run()?;
        lives_on(&world, &server, busy)?;
    }
    Ok(())
}

/// A unix socket whose other end stays outside makes CRIU refuse, after the plugin's work is done.
#[test]
fn a_dump_that_fails() -> Result<()> {
    let Some(mut world) = World::new(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let path = world.dir().join("outside.sock");
    let _listener = UnixListener::bind(&path)?;
    let (server, busy) = busy_server(&world, &["--unix", path.to_str().expect("a plain path")])?;
    let images = world.images()?;
    let dumped = world.criu.dump(PLUGIN, server.pid(), &images).inside(world.host()).run();
    ensure!(dumped.is_err(), "criu dumps external unix sockets now");
    ensure!(tcp_images(&images)? >= BUSY, "the dump failed before the connections were saved");
    lives_on(&world, &server, busy)
}

#[test]
fn a_post_dump_script_that_fails() -> Result<()> {
    let Some(mut world) = World::new(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let (server, busy) = busy_server(&world, &[])?;
    let images = world.images()?;
    let script = world.dir().join("script");
    fs::write(&script, "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" != post-dump ]\n")?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let call = world.criu.dump(PLUGIN, server.pid(), &images).inside(world.host());
    ensure!(call.arg("--action-script").arg(&script).run().is_err(), "the script failed, the dump did not");
    lives_on(&world, &server, busy)
}

/// SIGKILL of criu at instants spread over the whole dump: the connections live on in the server, or,
/// where criu had already killed that, in its images.
///
/// One end is CRIU's own: where it dies while it has the task run code of its own, that code's
/// breakpoint kills the task. No plugin can change that, but nothing may be left then either.
#[test]
fn criu_is_killed() -> Result<()> {
    const KILLS: u32 = 10;
    let Some(mut world) = World::new(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let (mut server, mut busy) = busy_server(&world, &[])?;
    let whole = duration_of_a_dump(&mut world, &server)?;
    let mut survived = 0;
    for nth in 0..KILLS {
        let instant = whole * nth / KILLS;
        let images = world.images()?;
        kill_dump_after(instant, &world, &server, &images)?;
        let lived = survive(&mut world, server, busy, &images).with_context(|| {
            let log = last_errors(&images.join("dump.log"));
            format!("after criu was killed at {instant:?} of {whole:?}:\n{log}")
        })?;
        survived += u32::from(lived.is_some());
        (server, busy) = match lived {
            Some(lived) => lived,
            None => busy_server(&world, &[])?,
        };
    }
    ensure!(
        survived > KILLS / 2,
        "CRIU's breakpoint killed the server {} times of {KILLS}",
        KILLS - survived
    );
    lives_on(&world, &server, busy)
}

/// Goes on with the server as it is after criu's death; `None` where CRIU's breakpoint killed it.
fn survive(world: &mut World, server: Server, busy: Busy, images: &Path) -> Result<Option<(Server, Busy)>> {
    wait_until("the server is traced no more", PATIENCE, || Ok(!server.task.is_traced()))?;
    if server.task.is_alive()? {
        world.wait_until_clean(&server)?;
        match busy.stop() {
            Ok((clients, _)) => return Ok(Some((server, Busy::start(clients)?))),
            // It was about to die.
            Err(error) if server.task.is_alive()? => return Err(error.context("a connection died")),
            Err(_) => {}
        }
        return breakpoint(world, server).map(|()| None);
    }
    if server.task.end()? == Some(Signal::SIGTRAP) {
        drop(busy); // its thread ends with its connections
        return breakpoint(world, server).map(|()| None);
    }
    let address = server.address;
    server.task.wait(PATIENCE)?;
    let server = world.restore(address, PLUGIN, images).context("criu had killed the server")?;
    world.wait_until_clean(&server)?;
    let (clients, _) = busy.stop().context("a restored connection died")?;
    Ok(Some((server, Busy::start(clients)?)))
}

fn breakpoint(world: &World, server: Server) -> Result<()> {
    let end = server.task.wait(PATIENCE)?;
    ensure!(matches!(end, WaitStatus::Signaled(_, Signal::SIGTRAP, _)), "the server ended with {end:?}");
    world.wait_until_hosts_clean()
}

fn duration_of_a_dump(world: &mut World, server: &Server) -> Result<Duration> {
    let images = world.images()?;
    let call = world.criu.dump(PLUGIN, server.pid(), &images).inside(world.host());
    let done = call.arg("--leave-running").run()?;
    world.wait_until_clean(server)?;
    Ok(done.took)
}

fn kill_dump_after(instant: Duration, world: &World, server: &Server, images: &Path) -> Result<()> {
    let start = Instant::now();
    let (mut criu, _) = world.criu.dump(PLUGIN, server.pid(), images).inside(world.host()).spawn()?;
    // The instant is the point here; a criu that ends earlier is fine.
    let pidfd = task::pidfd_open(nix::unistd::Pid::from_raw(i32::try_from(criu.id())?))?;
    task::wait_readable(&pidfd, instant.saturating_sub(start.elapsed()))?;
    criu.kill()?;
    criu.wait()?;
    Ok(())
}

/// SIGKILL of criu while it waits in the plugin's hook and the first images are there: nothing of
/// CRIU's is in the server yet, so it lives on.
#[test]
fn criu_is_killed_in_the_hook() -> Result<()> {
    const IDLE: usize = 400;
    let Some(mut world) = World::new(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let (server, busy) = busy_server(&world, &[])?;
    let mut idle: Vec<_> = (0..IDLE).map(|_| world.connect(server.address)).collect::<Result<_>>()?;
    let images = world.images()?;
    kill_at_first_tcp_image(&world, &server, &images)?;
    ensure!(tcp_images(&images)? < IDLE + BUSY, "the hook was over before criu was killed");
    lives_on(&world, &server, busy)?;
    idle.iter_mut().try_for_each(|client| client.ping(100))
}

/// Holds the agent in its creation of the first tcp-stream image until criu is dead.
fn kill_at_first_tcp_image(world: &World, server: &Server, images: &Path) -> Result<()> {
    let opens = Fanotify::init(InitFlags::FAN_CLASS_CONTENT | InitFlags::FAN_CLOEXEC, EventFFlags::O_RDONLY)?;
    let (mark, opened) = (MarkFlags::FAN_MARK_ADD, MaskFlags::FAN_OPEN_PERM | MaskFlags::FAN_EVENT_ON_CHILD);
    opens.mark(mark, opened, AT_FDCWD, Some(images))?;
    let (mut criu, _) = world.criu.dump(PLUGIN, server.pid(), images).inside(world.host()).spawn()?;
    let mut killed = false;
    while !killed && task::wait_readable(&opens, PATIENCE)? {
        for event in opens.read_events()? {
            let file = event.fd().context("more opened files than the queue holds")?;
            if !killed && name_of(file)?.starts_with("tcp-stream-") {
                criu.kill()?;
                criu.wait()?;
                killed = true;
            }
            opens.write_response(FanotifyResponse::new(file, Response::FAN_ALLOW))?;
        }
    }
    ensure!(killed, "no connection was saved:\n{}", last_errors(&images.join("dump.log")));
    Ok(())
}

fn name_of(file: BorrowedFd<'_>) -> Result<String> {
    let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    Ok(path.file_name().unwrap_or_default().to_string_lossy().into_owned())
}

fn tcp_images(images: &Path) -> Result<usize> {
    let mut found = 0;
    for entry in fs::read_dir(images)? {
        found += usize::from(entry?.file_name().to_string_lossy().starts_with("tcp-stream-"));
    }
    Ok(found)
}

/// With `SOCCR_TCP=close` the plugin stands aside, and `--tcp-close` means what it says.
#[test]
fn asked_to_close() -> Result<()> {
    let Some(mut world) = World::new(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let server = world.serve(SERVER_V4, &["--mode", "echo"])?;
    let mut client = world.connect(server.address)?;
    client.ping(1000)?;
    let images = world.images()?;
    let (address, pid) = (server.address, server.pid());
    let call = world.criu.dump(PLUGIN, pid, &images).inside(world.host()).env("SOCCR_TCP", "close");
    call.dump_and_wait(server.task)?;
    ensure!(tcp_images(&images)? == 0, "the plugin saved connections");
    let (task, _) =
        world.criu.restore(PLUGIN, &images).inside(world.host()).env("SOCCR_TCP", "close").restore()?;
    let server = Server::restored(address, task, world.dir());
    ensure!(client.ping(1000).is_err(), "the connection lives");
    world.wait_until_clean(&server)?;
    world.connect(address)?.ping(1000)
}

/// With `--tcp-established` and the plugin loaded, CRIU carries the connections itself.
#[test]
fn loaded_beside_tcp_established() -> Result<()> {
    let Some(mut world) = World::new(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let server = world.serve(SERVER_V4, &["--mode", "echo"])?;
    let mut client = world.connect(server.address)?;
    client.ping(1000)?;
    let images = world.images()?;
    let stock = crate::world::STOCK;
    let plugins = world.criu.plugin().with_file_name("");
    let (address, pid) = (server.address, server.pid());
    let call = world.criu.dump(stock, pid, &images).inside(world.host()).arg("--lib").arg(&plugins);
    call.dump_and_wait(server.task)?;
    let call = world.criu.restore(stock, &images).inside(world.host()).arg("--lib").arg(&plugins);
    let (task, _) = call.restore()?;
    client.ping(1000)?;
    world.wait_until_clean(&Server::restored(address, task, world.dir()))
}

/// A restore that fails leaves images that can be restored by a second try, and the peers none the
/// wiser.
#[test]
fn a_second_try_at_a_restore() -> Result<()> {
    let Some(mut world) = World::new(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let (server, busy) = busy_server(&world, &[])?;
    let (address, pid, images) = (server.address, server.pid(), world.images()?);
    world.dump(server, PLUGIN, &images)?;
    let script = world.dir().join("script");
    fs::write(&script, "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" != post-restore ]\n")?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let call = world.criu.restore(PLUGIN, &images).inside(world.host()).arg("--action-script").arg(&script);
    ensure!(call.run().is_err(), "the script failed, the restore did not");
    Task::adopt(pid).wait(PATIENCE)?; // criu has killed it, and it is ours to reap
    let server = world.restore(address, PLUGIN, &images)?;
    lives_on(&world, &server, busy)
}
