//! The plugin's hooks for external files, called by a host of ours (`soccr-test plugin-host`).

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use soccr_testkit::server::sibling_binary;
use soccr_testkit::sockets::{state, tcp_sockets};
use soccr_testkit::task::{self, Task, wait_until};
use soccr_testkit::{Place, Stage, leftovers};

use crate::world::{PATIENCE, PLUGIN, SERVER_V4, stage};

/// The file's id in the images; any number will do.
const ID: &str = "77";

#[test]
fn one_descriptor_as_an_external_file() -> Result<()> {
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let server = stage.serve(SERVER_V4, &["--mode", "stream", "--hold"])?;
    let mut client = stage.connect(server.address)?;
    client.send(5000)?;
    let mut connection = None;
    wait_until("data waits to be read", PATIENCE, || {
        for socket in tcp_sockets(server.pid())? {
            if socket.state()? == state::ESTABLISHED && socket.unread()? == 5000 {
                connection = Some(socket.number.to_string());
            }
        }
        Ok(connection.is_some())
    })?;
    let images = stage.images()?;

    let mut dump = host(&stage, &images)?;
    dump.arg("dump").arg(server.pid().to_string()).arg(connection.expect("found above"));
    run(&mut dump, &stage)?;
    server.task.wait(PATIENCE)?;
    client.send(3000)?; // into the lock

    let mut restored = host(&stage, &images)?.arg("restore").spawn()?;
    let guard = Task::adopt(task::pid_of(&restored));
    client.receive_echo(8000)?;
    client.ping(2000)?;
    leftovers::no_repair(guard.pid())?;
    leftovers::no_rules(stage.host())?;
    client.finish()?;
    let status = restored.wait()?;
    ensure!(status.success(), "{status}:\n{}", said(&stage));
    Ok(())
}

fn host(stage: &Stage, images: &std::path::Path) -> Result<Command> {
    let mut command = stage.host().command(sibling_binary("soccr-test")?);
    command.arg("plugin-host").arg(stage.criu.plugin()).arg(images).arg(ID);
    let errors = fs::File::options().create(true).append(true).open(stage.dir().join("pluginhost.err"))?;
    stage.criu.set_up(&mut command);
    command.stderr(errors);
    Ok(command)
}

fn run(command: &mut Command, stage: &Stage) -> Result<()> {
    let status = task::run(command, Duration::from_secs(15))?.status;
    ensure!(status.success(), "{status}:\n{}", said(stage));
    Ok(())
}

fn said(stage: &Stage) -> String {
    fs::read_to_string(stage.dir().join("pluginhost.err")).unwrap_or_default()
}
