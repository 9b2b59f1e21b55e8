//! The ways in which CRIU is called, and what it is told for the plugin.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use soccr_testkit::criu::last_errors;
use soccr_testkit::fleet::is_dead;
use soccr_testkit::rpc::{Rpc, Service};
use soccr_testkit::skip::{lacks, skip};
use soccr_testkit::task::{self, wait_until};
use soccr_testkit::{Client, Fleet, Lock, Place, Server, Side, Stage, Task};

use crate::world::{BUSY, PATIENCE, PLUGIN, SERVER_V4, stage};

const CLIENTS: usize = 10;

fn busy_server(stage: &Stage) -> Result<(Server, Fleet<Client>)> {
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let clients = stage.connect_all(&[server.address], CLIENTS, Client::connect)?;
    Ok((server, Fleet::echoes(clients, BUSY)?))
}

/// All clients go on, and nothing is left.
fn goes_on(stage: &Stage, server: &Server, busy: Fleet<Client>) -> Result<()> {
    let clients = busy.stop(PATIENCE).whole()?;
    ensure!(clients.len() == CLIENTS, "{} clients", clients.len());
    stage.wait_until_clean(Some(server))
}

/// What README tells users to write.
fn configuration(stage: &Stage) -> Result<PathBuf> {
    let path = stage.dir().join("criu.conf");
    let plugins = stage.criu.plugin().with_file_name("");
    fs::write(&path, format!("tcp-close\nlibdir {}\n", plugins.display()))?;
    Ok(path)
}

/// Who knows nothing of us asks, and a configuration file wins.
fn requests(call: impl FnOnce(&Stage) -> Result<Rpc>) -> Result<()> {
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let (server, busy) = busy_server(&stage)?;
    let (images, config, address) = (stage.images()?, configuration(&stage)?, server.address);
    let criu = call(&stage)?;
    criu.dump(server.pid(), &images, &config)?;
    server.task.wait(PATIENCE)?;
    let task = Task::adopt(criu.restore(&images, &config)?);
    drop(criu);
    plugin_acted(&images)?;
    goes_on(&stage, &Server::restored(address, task, stage.dir()), busy)
}

fn plugin_acted(images: &Path) -> Result<()> {
    let log = fs::read_to_string(images.join("restore.log"))?;
    ensure!(log.contains("TCP connections go on"), "the plugin has not been loaded");
    Ok(())
}

/// As runc, crun and podman do.
#[test]
fn rpc_and_a_configuration_file() -> Result<()> {
    requests(|stage| Ok(Rpc::Swrk(stage)))
}

#[test]
fn rpc_to_a_service() -> Result<()> {
    requests(|stage| Service::start(stage).map(Rpc::Service))
}

/// CRIU's own library for Python.
#[test]
fn pycriu() -> Result<()> {
    const CALL: &str = "
import os, sys, pycriu
action, criu, images, config, pid = sys.argv[1:]
call = pycriu.criu()
call.use_binary(criu)
call.opts.images_dir_fd = os.open(images, os.O_DIRECTORY)
call.opts.config_file = config
call.opts.tcp_established = True
call.opts.log_level = 4
call.opts.log_file = action + '.log'
if action == 'dump':
    call.opts.pid = int(pid)
    call.dump()
elif call.restore().pid != int(pid):
    sys.exit('another process')
";
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let library = stage.criu.bin().with_file_name("../lib");
    let python = || {
        let mut python = stage.outside().command("/usr/bin/python3");
        python.env("PYTHONPATH", &library).env("PYTHONDONTWRITEBYTECODE", "1");
        stage.criu.set_up(&mut python);
        python
    };
    if !python().args(["-c", "import pycriu"]).stderr(Stdio::null()).status()?.success() {
        return skip("there is no pycriu beside this criu");
    }
    let (server, busy) = busy_server(&stage)?;
    let (images, config, address, pid) =
        (stage.images()?, configuration(&stage)?, server.address, server.pid());
    let run = |action: &str| {
        let mut command = python();
        command
            .args(["-c", CALL, action])
            .arg(stage.criu.bin())
            .args([&images, &config])
            .arg(pid.to_string());
        let status = task::run(&mut command, PATIENCE)?.status;
        ensure!(status.success(), "{}", last_errors(&images.join(format!("{action}.log"))));
        Ok(())
    };
    run("dump")?;
    server.task.wait(PATIENCE)?;
    run("restore")?;
    plugin_acted(&images)?;
    goes_on(&stage, &Server::restored(address, Task::adopt(pid), stage.dir()), busy)
}

#[test]
fn a_configuration_file_alone() -> Result<()> {
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let (server, busy) = busy_server(&stage)?;
    let (images, config, address, pid) =
        (stage.images()?, configuration(&stage)?, server.address, server.pid());
    let run = |action: &str, args: &[&str]| {
        let mut command = stage.criu_command();
        command.args([action, "--tcp-established", "-v4", "-o"]).arg(format!("{action}.log")).args(args);
        command.arg("--config").arg(&config).arg("-D").arg(&images);
        let status = task::run(&mut command, PATIENCE)?.status;
        ensure!(status.success(), "{}", last_errors(&images.join(format!("{action}.log"))));
        Ok(())
    };
    run("dump", &["-t", &pid.to_string()])?;
    server.task.wait(PATIENCE)?;
    run("restore", &["-d"])?;
    goes_on(&stage, &Server::restored(address, Task::adopt(pid), stage.dir()), busy)
}

/// Whoever knows that his peers are silent needs no lock: their connections live, and no rule is made.
#[test]
fn silent_peers_without_a_lock() -> Result<()> {
    let skip = Side::Plugin(Lock::Skip);
    let Some(mut stage) = stage(Place::Host, &[skip])? else { return Ok(()) };
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let mut client = stage.connect(server.address)?;
    client.ping(20_000)?;
    let images = stage.images()?;
    let address = stage.freeze(server, skip, &images)?;
    stage.check_clean(None).context("between dump and restore")?;
    let server = stage.thaw(address, skip, &images)?;
    client.ping(20_000)?;
    stage.wait_until_clean(Some(&server))
}

/// A lock with a lease ends by itself: what comes then meets no socket, and is reset.
#[test]
fn a_lease_ends() -> Result<()> {
    const LEASE: Duration = Duration::from_secs(2);
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let mut client = stage.connect(server.address)?;
    client.ping(1000)?;
    let images = stage.images()?;
    let start = Instant::now();
    let call = stage.dump(PLUGIN, server.pid(), &images).env("SOCCR_LOCK_LEASE", "2s");
    call.dump_and_wait(server.task)?;
    let end = client.ping(1000).err().context("somebody answers for a server that is dumped")?;
    ensure!(is_dead(&end) && end.root_cause().to_string().contains("reset"), "{end:#}");
    ensure!(start.elapsed() >= LEASE, "the lock ended after {:?}", start.elapsed());
    Ok(())
}

#[test]
fn no_record() -> Result<()> {
    const RECORD: &str = "SOCCR_RECORD";
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let (server, busy) = busy_server(&stage)?;
    let (images, address, pid) = (stage.images()?, server.address, server.pid());
    stage.dump(PLUGIN, pid, &images).env(RECORD, "off").dump_and_wait(server.task)?;
    let kept = fs::read_dir(stage.records()).map_or(0, Iterator::count);
    ensure!(kept == 0, "{kept} records in {}", stage.records().display());
    let (task, _) = stage.restore(PLUGIN, &images)?.env(RECORD, "off").restore()?;
    goes_on(&stage, &Server::restored(address, task, stage.dir()), busy)
}

/// A pre-dump freezes for a moment and takes no connection: the plugin has nothing to do with it.
#[test]
fn a_pre_dump_before() -> Result<()> {
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    if !stage.criu_command().args(["check", "--feature", "mem_dirty_track"]).status()?.success() {
        return lacks("this kernel does not track soft-dirty pages, and CRIU's pre-dump aborts");
    }
    let (server, busy) = busy_server(&stage)?;
    let (images, address, pid) = (stage.images()?, server.address, server.pid());
    let before = images.join("before");
    fs::create_dir(&before)?;
    stage.criu.pre_dump(PLUGIN, pid, &before).inside(stage.outside()).run()?;
    let call = stage.dump(PLUGIN, pid, &images).arg("--prev-images-dir").arg("before");
    call.dump_and_wait(server.task)?;
    let (task, _) = stage.restore(PLUGIN, &images)?.restore()?;
    goes_on(&stage, &Server::restored(address, task, stage.dir()), busy)
}

/// A criu that serves another one, ended with this value.
struct Helper(Child);

impl Helper {
    fn start(stage: &Stage, args: &[&str], images: &Path) -> Result<Self> {
        let mut command = stage.criu_command();
        command.args(args).args(["-v4", "-o", "helper.log", "-D"]).arg(images);
        Ok(Self(command.spawn()?))
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn memory_over_a_page_server() -> Result<()> {
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let (server, busy) = busy_server(&stage)?;
    let (images, address, pid) = (stage.images()?, server.address, server.pid());
    let pages = Helper::start(&stage, &["page-server", "--port", "7777"], &images)?;
    wait_until("the page server listens", PATIENCE, || {
        let sockets = fs::read_to_string(format!("/proc/{}/net/tcp", pages.0.id()))?;
        Ok(sockets.contains(&format!(":{:04X} 00000000:0000 0A", 7777)))
    })?;
    let call = stage.dump(PLUGIN, pid, &images).args(["--page-server", "--address", "127.0.0.1", "--port"]);
    call.arg("7777").dump_and_wait(server.task)?;
    let (task, _) = stage.restore(PLUGIN, &images)?.restore()?;
    drop(pages);
    goes_on(&stage, &Server::restored(address, task, stage.dir()), busy)
}

#[test]
fn memory_on_demand() -> Result<()> {
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let (server, busy) = busy_server(&stage)?;
    let (images, address, pid) = (stage.images()?, server.address, server.pid());
    stage.dump(PLUGIN, pid, &images).dump_and_wait(server.task)?;
    let mut pages = Helper::start(&stage, &["lazy-pages"], &images)?;
    wait_until("the lazy-pages daemon listens", PATIENCE, || Ok(images.join("lazy-pages.socket").exists()))?;
    let (task, _) = stage.restore(PLUGIN, &images)?.arg("--lazy-pages").restore()?;
    wait_until("all pages are there", PATIENCE, || Ok(pages.0.try_wait()?.is_some()))?;
    goes_on(&stage, &Server::restored(address, task, stage.dir()), busy)
}
