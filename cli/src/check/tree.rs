//! What of a running tree of tasks cannot be carried, before anything is frozen.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::BorrowedFd;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use soccr::accept_queue;
use soccr::connection::{FourTuple, State};
use soccr::kernel::netns::NetNs;
use soccr::kernel::{SysError, ao, diag, options, sockopt, tcp};

use crate::print_json;
use crate::runtime::Problem;
use crate::sockets::{CLOSE, InFlight, LISTEN, Owner, Socket, Tree, owners, state_name};

#[derive(Debug, Serialize)]
struct Report {
    tasks: Vec<i32>,
    /// How many are carried.
    connections: usize,
    findings: Vec<Finding>,
}

#[derive(Debug, Serialize)]
struct Finding {
    socket: String,
    owners: Vec<Owner>,
    /// A dump fails by it, or loses it; the others are worth to know.
    in_the_way: bool,
    #[serde(flatten)]
    problem: Problem,
}

/// Whether all can be carried.
pub fn run(pid: i32, json: bool) -> Result<bool> {
    let report = look(pid)?;
    if json {
        print_json(&report)?;
    } else {
        print(&report).context("cannot print")?;
    }
    Ok(!report.findings.iter().any(|finding| finding.in_the_way))
}

fn look(pid: i32) -> Result<Report> {
    let tree = Tree::below(pid)?;
    let (mut connections, mut findings) = (0, Vec::new());
    for socket in &tree.sockets {
        let problems = problems(socket).with_context(|| socket.name())?;
        connections += usize::from(problems.is_empty() && socket.tuple().is_some());
        findings.extend(problems.into_iter().map(|(in_the_way, problem)| Finding {
            socket: socket.name(),
            owners: socket.owners.clone(),
            in_the_way,
            problem,
        }));
    }
    findings.extend(tree.in_flight.iter().map(in_flight));
    Ok(Report { tasks: tree.tasks, connections, findings })
}

fn in_flight(InFlight { socket, descriptors }: &InFlight) -> Finding {
    let what = format!("{descriptors} descriptors wait in this unix socket, and were not looked at");
    let cure = "the dump looks at them, and names what it cannot carry";
    Finding {
        socket: "unix socket".into(),
        owners: vec![*socket],
        in_the_way: false,
        problem: Problem::new(what, cure),
    }
}

/// What is in the way of a dump, and (`false`) what could not be found out.
fn problems(socket: &Socket) -> Result<Vec<(bool, Problem)>> {
    if socket.multipath {
        let what = "an MPTCP socket, which CRIU refuses";
        let cure = "have the program use TCP: GODEBUG=multipathtcp=0 for one in Go (1.24 and later), no mptcpize for others";
        return Ok(vec![(true, Problem::new(what, cure))]);
    }
    let state = socket.info()?.state;
    let mut problems = Vec::new();
    let mut add = |there: bool, what: &str, cure: &str| {
        if there {
            problems.push((true, Problem::new(what, cure)));
        }
    };
    let fd = socket.fd();
    let tuple = socket.tuple();
    add(
        tcp::has_upper_layer(fd)?,
        "kernel TLS, or another protocol in the kernel on top of TCP, whose state no call shows",
        "have the program do TLS itself: kernel TLS off (KTLS of OpenSSL and nginx)",
    );
    add(
        ao::has_keys(fd)? == Some(true),
        "segments are signed (TCP-AO), and the keys cannot be read",
        "close it before the dump and connect again afterwards",
    );
    add(
        options::refused(fd)?.is_some(),
        "its filter is an eBPF program (SO_ATTACH_BPF), which cannot be read back",
        "have the program remove it before the dump (SO_DETACH_FILTER), or use a classic one",
    );
    if state == LISTEN {
        let waiting = socket.info()?.unacked;
        let carried = NetNs::of_socket(fd).is_ok_and(|ns| accept_queue::check(&ns).is_ok());
        add(
            waiting > 0 && !carried,
            &format!("{waiting} connections wait to be accepted, by which CRIU's dump fails"),
            "have the program accept them, or give them up by CRIU's option skip-in-flight",
        );
    } else if state != CLOSE || tuple.is_some() {
        add(
            State::try_from(state).is_err(),
            &format!("a connection in {}, which cannot be carried", state_name(state)),
            "wait until the handshake is over",
        );
        add(
            has_urgent_data(fd, state)?,
            "urgent data is unread: a restore cannot set its mark",
            "have the program read it",
        );
        add(
            tcp::in_repair(fd)?,
            "the socket is in repair mode, left by a dump that was killed",
            "`soccr status` and `soccr clean`",
        );
    }
    if let Some(tuple) = &tuple {
        add(
            is_link_local(tuple) && sockopt::bound_device(fd)?.is_empty(),
            "an IPv6 link-local address without SO_BINDTODEVICE, which CRIU refuses",
            "have the program bind to the device, or use another address",
        );
    }
    match has_md5_keys(socket, tuple, state) {
        Ok(there) => add(
            there,
            "segments are signed (TCP-MD5), and the keys cannot be read",
            "close it before the dump and connect again afterwards",
        ),
        Err(error) => problems.push((
            false,
            Problem::new(
                format!("whether its segments are signed (TCP-MD5) is not known: {error:#}"),
                "see it with CAP_NET_ADMIN",
            ),
        )),
    }
    Ok(problems)
}

/// The mark is still there where the program has read the urgent byte alone, and no byte behind it.
fn has_urgent_data(fd: BorrowedFd<'_>, state: u8) -> Result<bool> {
    let mut ready = [PollFd::new(fd, PollFlags::POLLPRI)];
    poll(&mut ready, PollTimeout::ZERO)?;
    let announced = ready[0].revents().is_some_and(|events| events.contains(PollFlags::POLLPRI));
    let fin = u32::from(State::try_from(state).is_ok_and(State::fin_received));
    let hidden = tcp::unread(fd)?.is_some_and(|unread| unread.all.saturating_sub(unread.to_mark) > fin);
    Ok(announced || hidden)
}

fn is_link_local(tuple: &FourTuple) -> bool {
    [tuple.local, tuple.remote].iter().any(|end| match end.ip() {
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
        IpAddr::V4(_) => false,
    })
}

fn has_md5_keys(socket: &Socket, tuple: Option<FourTuple>, state: u8) -> Result<bool> {
    let tuple = match tuple {
        Some(tuple) => tuple.on_wire(),
        None if state == LISTEN => {
            let local = socket.local()?;
            let any: IpAddr =
                if local.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            FourTuple { local, remote: SocketAddr::new(any, 0) }
        }
        // Bound to nothing, found by nobody; its keys go with the program that sets them again.
        None => return Ok(false),
    };
    match socket.ns()?.run(|| diag::look_up(&tuple))? {
        // Closed meanwhile.
        Err(error) if error.errno == Errno::ENOENT => Ok(false),
        Ok(seen) if !seen.shows_keys => {
            Err(SysError { call: "ask the socket monitor for keys", errno: Errno::EPERM }.into())
        }
        answer => Ok(answer?.md5),
    }
}

fn print(report: &Report) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for Finding { socket, owners: by, in_the_way, problem: Problem { what, cure } } in &report.findings {
        let sign = if *in_the_way { '✗' } else { '?' };
        writeln!(out, "{sign} {socket} ({}): {what}: {cure}", owners(by))?;
    }
    let (connections, tasks) = (report.connections, report.tasks.len());
    writeln!(out, "{connections} connections of {tasks} tasks have nothing in their way.")
}
