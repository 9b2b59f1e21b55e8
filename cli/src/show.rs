//! `soccr show`.

use std::collections::HashMap;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use soccr::connection::{ControlBlock, FourTuple, Queues};
use soccr::criu::image::ImageDir;
use soccr::criu::image::external::ExternalImage;
use soccr::criu::image::index::Index;
use soccr::criu::image::inventory;
use soccr::criu::image::tcp_stream::TcpStreamImage;

use crate::table::Table;
use crate::{archive, print_json};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The folder, or an archive of podman, CRI-O or containerd.
    images: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What is told of a connection; never a byte of its queues.
#[derive(Debug, Serialize)]
struct Connection {
    local: String,
    remote: String,
    state: String,
    /// Bytes received and not yet read by the program.
    receive_queue: u32,
    /// Bytes written by the program and not yet acknowledged by the peer.
    send_queue: u32,
    /// How many of these were never sent.
    unsent: u32,
    /// The largest segment that the peer accepts.
    mss: u32,
    /// The socket's inode number at the dump.
    inode: Option<u32>,
    net_ns_id: Option<u32>,
    owners: Vec<Owner>,
}

/// A descriptor that leads to the connection.
#[derive(Clone, Copy, Debug, Serialize)]
struct Owner {
    /// The task, as it sees itself.
    pid: u32,
    fd: i32,
    /// The descriptor is a unix socket in which the connection is in flight.
    in_flight: bool,
}

#[derive(Debug, Serialize)]
struct Images {
    dump_run_id: Option<String>,
    network_lock: String,
    tcp_close: bool,
    connections: Vec<Connection>,
}

pub fn run(arguments: &Arguments) -> Result<bool> {
    let images = archive::Images::open(&arguments.images)?;
    let images = read(&images.dir).with_context(|| images.path.display().to_string())?;
    if arguments.json {
        print_json(&images)?;
    } else {
        print(&images).context("cannot print")?;
    }
    Ok(true)
}

fn read(dir: &ImageDir) -> Result<Images> {
    let mut external = Vec::new();
    ExternalImage::for_each(dir, |image| external.push(connection(&image.tuple, &image.tcp)))?;
    if !dir.contains(inventory::NAME) && external.is_empty() {
        bail!("there are no images of CRIU or soccr");
    }
    let index = if dir.contains(inventory::NAME) { Index::read(dir)? } else { Index::empty() };
    let mut connections = from_index(dir, &index)?;
    connections.extend(external);
    connections.sort_by(|a, b| (&a.local, &a.remote).cmp(&(&b.local, &b.remote)));
    Ok(Images {
        network_lock: format!("{:?}", index.network_lock).to_lowercase(),
        tcp_close: index.tcp_close,
        dump_run_id: index.dump_run_id,
        connections,
    })
}

fn from_index(dir: &ImageDir, index: &Index) -> Result<Vec<Connection>> {
    let owners = owners(index);
    let mut queues = Queues::default();
    let mut connections = Vec::new();
    for (id, socket) in index.connections.iter().filter(|(_, socket)| socket.has_stream) {
        let image = TcpStreamImage::read(dir, socket.ino, socket.state, &mut queues)?;
        connections.push(Connection {
            inode: Some(socket.ino),
            net_ns_id: socket.net_ns_id,
            owners: owners.get(id).cloned().unwrap_or_default(),
            ..connection(&socket.tuple, &image.tcp)
        });
    }
    Ok(connections)
}

fn connection(tuple: &FourTuple, tcp: &ControlBlock) -> Connection {
    Connection {
        local: tuple.local.to_string(),
        remote: tuple.remote.to_string(),
        state: tcp.state.to_string(),
        receive_queue: tcp.recv_len,
        send_queue: tcp.send_len,
        unsent: tcp.unsent_len,
        mss: tcp.negotiated.mss_clamp,
        inode: None,
        net_ns_id: None,
        owners: Vec::new(),
    }
}

/// Which descriptors lead to which file.
fn owners(index: &Index) -> HashMap<u32, Vec<Owner>> {
    let mut owners: HashMap<u32, Vec<Owner>> = HashMap::new();
    for (pid, task) in &index.tasks {
        for fd in task.fds.iter() {
            let owner = Owner { pid: *pid, fd: fd.fd, in_flight: false };
            owners.entry(fd.file_id).or_default().push(owner);
            let packets = index.in_flight.get(&fd.file_id).into_iter().flatten();
            for file in packets.flat_map(|packet| &packet.files) {
                owners.entry(*file).or_default().push(Owner { in_flight: true, ..owner });
            }
        }
    }
    owners
}

fn print(images: &Images) -> std::io::Result<()> {
    let mut out = crate::out();
    let id = images.dump_run_id.as_deref().unwrap_or("without an id");
    let closes = if images.tcp_close { ", made with --tcp-close" } else { "" };
    writeln!(out, "Dump {id}, network lock {}{closes}", images.network_lock)?;
    let mut table =
        Table::new(&["LOCAL", "REMOTE", "STATE", "TO READ", "TO SEND", "UNSENT", "MSS", "OWNERS"]);
    for connection in &images.connections {
        let owners: Vec<String> = connection.owners.iter().map(owner).collect();
        table.push([
            connection.local.clone(),
            connection.remote.clone(),
            connection.state.clone(),
            connection.receive_queue.to_string(),
            connection.send_queue.to_string(),
            connection.unsent.to_string(),
            connection.mss.to_string(),
            if owners.is_empty() { "-".into() } else { owners.join(", ") },
        ]);
    }
    table.print(&mut out)
}

fn owner(owner: &Owner) -> String {
    let how = if owner.in_flight { " (in flight)" } else { "" };
    format!("pid {} fd {}{how}", owner.pid, owner.fd)
}
