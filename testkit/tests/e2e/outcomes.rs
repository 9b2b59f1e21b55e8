//! However a dump ends, the connections of a server that runs on are alive, and nothing is left.

use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::fcntl::AT_FDCWD;
use nix::sys::fanotify::{
    EventFFlags, Fanotify, FanotifyResponse, InitFlags, MarkFlags, MaskFlags, Response,
};
use soccr_testkit::criu::last_errors;
use soccr_testkit::task;
use soccr_testkit::{Client, Fleet, Place, Server, Stage, Task};

use crate::world::{BUSY, PATIENCE, PLUGIN, PLUGIN_IPTABLES, SERVER_V4, STOCK, stage};

/// Clients that send all the time, whatever happens to the server.
const CLIENTS: usize = 20;

fn busy_server(stage: &Stage, args: &[&str]) -> Result<(Server, Fleet<Client>)> {
    let server = stage.serve(SERVER_V4, &[&["--mode", "echo"], args].concat())?;
    let clients = (0..CLIENTS).map(|_| stage.connect(server.address)).collect::<Result<_>>()?;
    Ok((server, Fleet::echoes(clients, BUSY)?))
}

/// The server runs on and nothing is left; the clients go on.
fn lives_on(stage: &Stage, server: &Server, busy: Fleet<Client>) -> Result<()> {
    ensure!(server.task.is_alive()?, "the server is gone");
    stage.wait_until_clean(Some(server))?;
    let clients = busy.stop(PATIENCE).whole()?;
    ensure!(clients.iter().all(|client| client.received() > 0), "a client never got anything");
    for mut client in clients {
        client.ping(1000)?;
    }
    Ok(())
}

#[test]
fn leave_running() -> Result<()> {
    for side in [PLUGIN, PLUGIN_IPTABLES] {
        let Some(stage) = stage(Place::Host, &[side])? else { return Ok(()) };
        let (server, busy) = busy_server(&stage, &[])?;
        let images = stage.images()?;
        let call = stage.dump(side, server.pid(), &images);
        call.arg("--leave-running").run()?;
        lives_on(&stage, &server, busy)?;
    }
    Ok(())
}

/// A unix socket whose other end stays outside makes CRIU refuse, after the plugin's work is done.
#[test]
fn a_dump_that_fails() -> Result<()> {
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let path = stage.dir().join("outside.sock");
    let _listener = UnixListener::bind(&path)?;
    let (server, busy) = busy_server(&stage, &["--unix", path.to_str().expect("a plain path")])?;
    let images = stage.images()?;
    let dumped = stage.dump(PLUGIN, server.pid(), &images).run();
    ensure!(dumped.is_err(), "criu dumps external unix sockets now");
    ensure!(tcp_images(&images)? >= CLIENTS, "the dump failed before the connections were saved");
    lives_on(&stage, &server, busy)
}

#[test]
fn a_post_dump_script_that_fails() -> Result<()> {
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let (server, busy) = busy_server(&stage, &[])?;
    let images = stage.images()?;
    let script = stage.dir().join("script");
    fs::write(&script, "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" != post-dump ]\n")?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let call = stage.dump(PLUGIN, server.pid(), &images);
    ensure!(call.arg("--action-script").arg(&script).run().is_err(), "the script failed, the dump did not");
    lives_on(&stage, &server, busy)
}

/// SIGKILL of criu while it waits in the plugin's hook and the first images are there: nothing of
/// CRIU's is in the server yet, so it lives on.
#[test]
fn criu_is_killed_in_the_hook() -> Result<()> {
    const IDLE: usize = 400;
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let (server, busy) = busy_server(&stage, &[])?;
    let mut idle: Vec<_> = (0..IDLE).map(|_| stage.connect(server.address)).collect::<Result<_>>()?;
    let images = stage.images()?;
    kill_at_first_tcp_image(&stage, &server, &images)?;
    ensure!(tcp_images(&images)? < IDLE + CLIENTS, "the hook was over before criu was killed");
    lives_on(&stage, &server, busy)?;
    idle.iter_mut().try_for_each(|client| client.ping(100))
}

/// Holds the agent in its creation of the first tcp-stream image until criu is dead.
fn kill_at_first_tcp_image(stage: &Stage, server: &Server, images: &Path) -> Result<()> {
    let opens = Fanotify::init(InitFlags::FAN_CLASS_CONTENT | InitFlags::FAN_CLOEXEC, EventFFlags::O_RDONLY)?;
    let (mark, opened) = (MarkFlags::FAN_MARK_ADD, MaskFlags::FAN_OPEN_PERM | MaskFlags::FAN_EVENT_ON_CHILD);
    opens.mark(mark, opened, AT_FDCWD, Some(images))?;
    let (mut criu, _) = stage.dump(PLUGIN, server.pid(), images).spawn()?;
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
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let mut client = stage.connect(server.address)?;
    client.ping(1000)?;
    let images = stage.images()?;
    let (address, pid) = (server.address, server.pid());
    let call = stage.dump(PLUGIN, pid, &images).env("SOCCR_TCP", "close");
    call.dump_and_wait(server.task)?;
    ensure!(tcp_images(&images)? == 0, "the plugin saved connections");
    let (task, _) = stage.restore(PLUGIN, &images)?.env("SOCCR_TCP", "close").restore()?;
    let server = Server::restored(address, task, stage.dir());
    ensure!(client.ping(1000).is_err(), "the connection lives");
    stage.wait_until_clean(Some(&server))?;
    stage.connect(address)?.ping(1000)
}

/// With `--tcp-established` and the plugin loaded, CRIU carries the connections itself.
#[test]
fn loaded_beside_tcp_established() -> Result<()> {
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let mut client = stage.connect(server.address)?;
    client.ping(1000)?;
    let images = stage.images()?;
    let plugins = stage.criu.plugin().with_file_name("");
    let (address, pid) = (server.address, server.pid());
    let call = stage.dump(STOCK, pid, &images).arg("--lib").arg(&plugins);
    call.dump_and_wait(server.task)?;
    let call = stage.restore(STOCK, &images)?.arg("--lib").arg(&plugins);
    let (task, _) = call.restore()?;
    client.ping(1000)?;
    stage.wait_until_clean(Some(&Server::restored(address, task, stage.dir())))
}

/// A restore that fails leaves images that can be restored by a second try, and the peers none the
/// wiser.
#[test]
fn a_second_try_at_a_restore() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let (server, busy) = busy_server(&stage, &[])?;
    let (address, pid, images) = (server.address, server.pid(), stage.images()?);
    stage.freeze(server, PLUGIN, &images)?;
    let script = stage.dir().join("script");
    fs::write(&script, "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" != post-restore ]\n")?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let call = stage.restore(PLUGIN, &images)?.arg("--action-script").arg(&script);
    ensure!(call.run().is_err(), "the script failed, the restore did not");
    Task::adopt(pid).wait(PATIENCE)?; // criu has killed it, and it is ours to reap
    let server = stage.thaw(address, PLUGIN, &images)?;
    lives_on(&stage, &server, busy)
}
