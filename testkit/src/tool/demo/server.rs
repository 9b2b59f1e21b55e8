//! The server of the demo: redis-server where it is installed, else one of ours.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::unistd::Pid;
use soccr_testkit::task::{Task, in_own_session, wait_until};
use soccr_testkit::{NetNs, Server};

/// Starts it on a free port of loopback; its name, its process, its address.
pub fn start(out: &Path, clients: usize, builtin: bool) -> Result<(String, Task, SocketAddr)> {
    let dir = out.join("server");
    if !builtin {
        if let Some(version) = redis_version() {
            let (task, address) = start_redis(&dir, clients)?;
            return Ok((format!("redis-server {version}"), task, address));
        }
        println!("redis-server is not installed: the small server that comes with soccr takes its place");
    }
    let server = Server::start(&NetNs::current()?, any_port(), &dir, ["--mode", "counter"])?;
    Ok(("soccr-test server".into(), server.task, server.address))
}

fn redis_version() -> Option<String> {
    let out = Command::new("redis-server").arg("--version").output().ok()?;
    let text = String::from_utf8(out.stdout).ok()?;
    let version = text.split_whitespace().find_map(|word| word.strip_prefix("v="));
    Some(version.unwrap_or("of unknown version").to_owned())
}

fn start_redis(dir: &Path, clients: usize) -> Result<(Task, SocketAddr)> {
    // Redis takes no port 0.
    let address = TcpListener::bind(any_port())?.local_addr()?;
    let log = File::create(dir.join("redis.log"))?;
    let mut command = Command::new("redis-server");
    command.args(["--bind", "127.0.0.1", "--port", &address.port().to_string()]);
    command.args(["--save", "", "--appendonly", "no", "--daemonize", "no"]);
    command.args(["--maxclients", &(clients + 100).to_string()]).arg("--dir").arg(dir);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    in_own_session(&mut command);
    let child = command.spawn().context("cannot start redis-server")?;
    let task = Task::adopt(Pid::from_raw(i32::try_from(child.id())?));
    wait_until("redis-server listens", Duration::from_secs(10), || Ok(TcpStream::connect(address).is_ok()))?;
    Ok((task, address))
}

fn any_port() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}
