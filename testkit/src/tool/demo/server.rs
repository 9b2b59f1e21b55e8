//! The server of the demo: redis-server where it is installed, else one of ours.

use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use soccr_testkit::Stage;
use soccr_testkit::task::{Task, in_own_session, pid_of, wait_until};

/// Always the same port: nobody else is in its namespace.
const PORT: u16 = 6379;

/// Starts it at one or two addresses of the host; its name, its process, where it listens.
pub fn start(
    stage: &Stage,
    addresses: &[IpAddr],
    clients: usize,
    builtin: bool,
) -> Result<(String, Task, Vec<SocketAddr>)> {
    let listen: Vec<_> = addresses.iter().map(|&address| SocketAddr::new(address, PORT)).collect();
    if !builtin {
        if let Some(version) = redis_version() {
            let task = start_redis(stage, &listen, clients)?;
            return Ok((format!("redis-server {version}"), task, listen));
        }
        println!("redis-server is not installed: the small server that comes with soccr takes its place");
    }
    let [first, more @ ..] = &listen[..] else { bail!("no address to listen at") };
    let also: Vec<_> = more.iter().flat_map(|address| ["--also".into(), address.to_string()]).collect();
    let mut args = vec!["--mode", "counter"];
    args.extend(also.iter().map(String::as_str));
    let server = stage.serve(&first.to_string(), &args)?;
    Ok(("soccr-test server".into(), server.task, listen))
}

fn redis_version() -> Option<String> {
    let out = Command::new("redis-server").arg("--version").output().ok()?;
    let text = String::from_utf8(out.stdout).ok()?;
    let version = text.split_whitespace().find_map(|word| word.strip_prefix("v="));
    Some(version.unwrap_or("of unknown version").to_owned())
}

fn start_redis(stage: &Stage, listen: &[SocketAddr], clients: usize) -> Result<Task> {
    let dir = stage.dir().join("server");
    fs::create_dir_all(&dir)?;
    let log = File::create(dir.join("redis.log"))?;
    let mut command = stage.host().command("redis-server");
    command.arg("--bind").args(listen.iter().map(|address| address.ip().to_string()));
    command.args(["--port", &PORT.to_string()]);
    command.args(["--save", "", "--appendonly", "no", "--daemonize", "no", "--protected-mode", "no"]);
    command.args(["--maxclients", &(clients + 100).to_string()]).arg("--dir").arg(&dir);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    in_own_session(&mut command);
    let child = command.spawn().context("cannot start redis-server")?;
    let task = Task::adopt(pid_of(&child));
    let is_up = || listen.iter().all(|&address| stage.connect(address).is_ok());
    wait_until("redis-server listens", Duration::from_secs(10), || Ok(is_up()))?;
    Ok(task)
}
