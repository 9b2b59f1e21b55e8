//! `soccr list`.

use std::io::Write;

use anyhow::{Context, Result};
use serde::Serialize;
use soccr::connection::{OPT_SACK, OPT_TIMESTAMPS, OPT_WSCALE};
use soccr::kernel::tcp::Info;
use soccr::kernel::{SysResult, sockopt, tcp};

use crate::sockets::{CLOSE, InFlight, LISTEN, Owner, Socket, Tree, owners, state_name};
use crate::table::Table;
use crate::{print_json, warn};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The task; its descendants are looked at too.
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pid: i32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Sockets {
    tasks: Vec<i32>,
    sockets: Vec<Listed>,
    in_flight: Vec<InFlight>,
}

/// What is told of a socket; never a byte of its queues.
#[derive(Debug, Serialize)]
struct Listed {
    protocol: &'static str,
    local: String,
    /// `None` without a peer.
    remote: Option<String>,
    state: String,
    /// Bytes received and not yet read by the program; of a listener, connections not yet accepted.
    receive_queue: u32,
    /// Bytes written by the program and not yet acknowledged by the peer.
    send_queue: u32,
    /// How many of these were never sent.
    unsent: u32,
    /// The largest segment that is sent now.
    mss: u32,
    options: Vec<String>,
    net_ns: String,
    inode: u64,
    owners: Vec<Owner>,
}

pub fn run(arguments: &Arguments) -> Result<bool> {
    let tree = Tree::below(arguments.pid)?;
    let mut sockets = Vec::new();
    for socket in &tree.sockets {
        sockets.push(listed(socket).with_context(|| socket.name())?);
    }
    sockets.sort_by(|a, b| (&a.local, &a.remote, a.inode).cmp(&(&b.local, &b.remote, b.inode)));
    let sockets = Sockets { tasks: tree.tasks, sockets, in_flight: tree.in_flight };
    if arguments.json {
        print_json(&sockets)?;
    } else {
        print(&sockets).context("cannot print")?;
        for InFlight { socket, descriptors } in &sockets.in_flight {
            let Owner { pid, fd } = socket;
            warn(&format!(
                "pid {pid} fd {fd}: {descriptors} descriptors wait in this unix socket and are not listed"
            ));
        }
    }
    Ok(true)
}

fn listed(socket: &Socket) -> Result<Listed> {
    let fd = socket.fd();
    let info = socket.info()?;
    let tuple = socket.tuple();
    let (receive_queue, send_queue, unsent) = queues(socket, &info)?;
    Ok(Listed {
        protocol: if socket.multipath { "mptcp" } else { "tcp" },
        local: socket.local()?.to_string(),
        remote: tuple.map(|tuple| tuple.remote.to_string()),
        state: state_name(info.state),
        receive_queue,
        send_queue,
        unsent,
        mss: tcp::max_segment(fd)?,
        options: options(socket, &info),
        net_ns: socket.ns()?.to_string(),
        inode: socket.inode,
        owners: socket.owners.clone(),
    })
}

/// A FIN counts as a byte in the kernel's lengths.
fn queues(socket: &Socket, info: &Info) -> SysResult<(u32, u32, u32)> {
    let fd = socket.fd();
    match info.state {
        LISTEN => return Ok((info.unacked, 0, 0)),
        CLOSE => return Ok((tcp::receive_queue_len(fd)?, 0, 0)),
        _ => {}
    }
    let state = soccr::connection::State::try_from(info.state);
    let fin = u32::from(state.is_ok_and(soccr::connection::State::fin_sent));
    let (send, unsent) = (tcp::send_queue_len(fd)?, tcp::unsent_len(fd)?);
    Ok((tcp::receive_queue_len(fd)?, send.saturating_sub(fin), unsent.saturating_sub(fin)))
}

/// What the ends agreed on, then what the program has set. An option that this kernel or socket has not is off.
fn options(socket: &Socket, info: &Info) -> Vec<String> {
    const OPT_ECN: u32 = 8;
    let (fd, mask) = (socket.fd(), u32::from(info.options));
    let agreed = [
        (OPT_TIMESTAMPS, "ts".to_owned()),
        (OPT_SACK, "sack".to_owned()),
        (OPT_WSCALE, format!("wscale:{},{}", info.snd_wscale, info.rcv_wscale)),
        (OPT_ECN, "ecn".to_owned()),
    ];
    let set = [
        ("nodelay", sockopt::no_delay(fd)),
        ("cork", sockopt::cork(fd)),
        ("reuseaddr", sockopt::reuse_addr(fd).map(|value| value != 0)),
        ("reuseport", sockopt::reuse_port(fd)),
        ("oobinline", sockopt::oob_inline(fd)),
        ("freebind", sockopt::free_bind(fd)),
        ("bound-to-device", sockopt::bound_device(fd).map(|name| !name.is_empty())),
        ("ulp", tcp::has_upper_layer(fd)),
        ("repair", tcp::in_repair(fd)),
    ];
    let agreed = agreed.into_iter().filter(|(bit, _)| mask & bit != 0).map(|(_, name)| name);
    agreed.chain(set.into_iter().filter(|(_, on)| *on == Ok(true)).map(|(name, _)| name.to_owned())).collect()
}

fn print(sockets: &Sockets) -> std::io::Result<()> {
    if sockets.sockets.is_empty() {
        return Ok(());
    }
    let mut table = Table::new(&[
        "LOCAL",
        "REMOTE",
        "STATE",
        "TO READ",
        "TO SEND",
        "UNSENT",
        "MSS",
        "OPTIONS",
        "NAMESPACE",
        "OWNERS",
    ]);
    for socket in &sockets.sockets {
        let multipath = if socket.protocol == "mptcp" { " (MPTCP)" } else { "" };
        table.push([
            socket.local.clone(),
            socket.remote.clone().unwrap_or_else(|| "-".into()),
            format!("{}{multipath}", socket.state),
            socket.receive_queue.to_string(),
            socket.send_queue.to_string(),
            socket.unsent.to_string(),
            socket.mss.to_string(),
            if socket.options.is_empty() { "-".into() } else { socket.options.join(" ") },
            socket.net_ns.clone(),
            owners(&socket.owners),
        ]);
    }
    table.print(&mut std::io::stdout().lock())?;
    std::io::stdout().flush()
}
