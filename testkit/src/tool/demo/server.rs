//! The server of the demo: redis-server where it is installed, else one of ours.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use soccr_testkit::Stage;
use soccr_testkit::task::{Task, in_own_session, pid_of, wait_until};

/// Starts it on a free port of loopback; its name, its process, its address.
pub fn start(stage: &Stage, clients: usize, builtin: bool) -> Result<(String, Task, SocketAddr)> {
    if !builtin {
        if let Some(version) = redis_version() {
            let (task, address) = start_redis(stage, clients)?;
            return Ok((format!("redis-server {version}"), task, address));
        }
        println!("redis-server is not installed: the small server that comes with soccr takes its place");
    }
    let server = stage.serve("127.0.0.1:0", &["--mode", "counter"])?;
    Ok(("soccr-test server".into(), server.task, server.address))
}

fn redis_version() -> Option<String> {
    let out = Command::new("redis-server").arg("--version").output().ok()?;
    let text = String::from_utf8(out.stdout).ok()?;
    let version = text.split_whitespace().find_map(|word| word.strip_prefix("v="));
    Some(version.unwrap_or("of unknown version").to_owned())
}

fn start_redis(stage: &Stage, clients: usize) -> Result<(Task, SocketAddr)> {
    let dir = stage.dir().join("server");
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 6379)); // nobody else is in this namespace
    let log = File::create(dir.join("redis.log"))?;
    let mut command = stage.host().command("redis-server");
    command.args(["--bind", "127.0.0.1", "--port", &address.port().to_string()]);
    command.args(["--save", "", "--appendonly", "no", "--daemonize", "no"]);
    command.args(["--maxclients", &(clients + 100).to_string()]).arg("--dir").arg(&dir);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    in_own_session(&mut command);
    let child = command.spawn().context("cannot start redis-server")?;
    let task = Task::adopt(pid_of(&child));
    wait_until("redis-server listens", Duration::from_secs(10), || Ok(stage.connect(address).is_ok()))?;
    Ok((task, address))
}
