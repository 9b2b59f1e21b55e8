//! `soccr show`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::images::{self, Dump, Images, Owner};
use crate::print_json;
use crate::table::Table;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The folder, an archive of podman, CRI-O or containerd, or a connection's file (soccr-ext-N.img).
    images: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    dump: Option<Dump>,
    connections: Vec<Connection>,
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

pub fn run(arguments: &Arguments) -> Result<bool> {
    let Images { dump, connections } = Images::read(&arguments.images)?;
    let shown = Shown { dump, connections: connections.into_iter().map(Connection::from).collect() };
    if arguments.json {
        print_json(&shown)?;
    } else {
        print(&shown).context("cannot print")?;
    }
    Ok(true)
}

impl From<images::Connection> for Connection {
    fn from(connection: images::Connection) -> Self {
        let images::Connection { tuple, tcp, .. } = &connection;
        Self {
            local: tuple.local.to_string(),
            remote: tuple.remote.to_string(),
            state: tcp.state.to_string(),
            receive_queue: tcp.recv_len,
            send_queue: tcp.send_len,
            unsent: tcp.unsent_len,
            mss: tcp.negotiated.mss_clamp,
            inode: connection.inode,
            net_ns_id: connection.net_ns_id,
            owners: connection.owners,
        }
    }
}

fn print(shown: &Shown) -> std::io::Result<()> {
    let mut out = crate::out();
    if let Some(dump) = &shown.dump {
        let id = dump.dump_run_id.as_deref().unwrap_or("without an id");
        let closes = if dump.tcp_close { ", made with --tcp-close" } else { "" };
        writeln!(out, "Dump {id}, network lock {}{closes}", dump.network_lock)?;
    }
    let mut table =
        Table::new(&["LOCAL", "REMOTE", "STATE", "TO READ", "TO SEND", "UNSENT", "MSS", "OWNERS"]);
    for connection in &shown.connections {
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
