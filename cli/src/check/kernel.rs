//! What the kernel offers, tried in a network namespace of its own.

use std::io::Write;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use serde::Serialize;
use soccr::connection::FourTuple;
use soccr::kernel::ecn::AskForEcn;
use soccr::kernel::netns::NetNs;
use soccr::kernel::process::{self, RemoteFd};
use soccr::kernel::tcp::{Queue, Repair};
use soccr::kernel::warm::SetWindow;
use soccr::kernel::{SysResult, raw, sockopt, tcp};
use soccr::lock::{self, LockName, LockOptions, Method, NetworkLock, conntrack, held};

/// How much a feature matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Need {
    /// Nothing works without it.
    Must,
    /// One of several will do.
    OneOf,
    /// Something is better with it.
    Helps,
}

#[derive(Debug, Serialize)]
pub struct Feature {
    name: &'static str,
    need: Need,
    what_for: &'static str,
    there: bool,
    /// What the kernel answered.
    why: Option<String>,
}

/// All features, as the kernel answers.
///
/// The calling thread stays in the namespace.
pub fn features() -> Result<Vec<Feature>> {
    own_network().context(
        "cannot make a network namespace to check in: CAP_SYS_ADMIN is missing, and so is the right to make a user namespace",
    )?;
    Ok(probe())
}

/// Root needs no user namespace; everybody else has all privileges only in one.
fn own_network() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)
        .or_else(|_| unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET))
}

/// Whether nothing is missing that soccr cannot do without.
pub fn enough(features: &[Feature]) -> bool {
    let missing = features.iter().any(|feature| feature.need == Need::Must && !feature.there);
    let mut choices = features.iter().filter(|feature| feature.need == Need::OneOf);
    !missing && choices.any(|feature| feature.there)
}

fn probe() -> Vec<Feature> {
    let mut features = Vec::new();
    let mut add = |need, name, what_for, result: Result<()>| {
        let why = result.err().map(|error| format!("{error:#}"));
        features.push(Feature { name, need, what_for, there: why.is_none(), why });
    };
    use Need::{Helps, Must, OneOf};
    add(Must, "TCP_REPAIR", "reading and rebuilding a connection", in_repair(|_| Ok(())));
    add(Must, "TCP_REPAIR_QUEUE", "sequences and unsent bytes", in_repair(sequences));
    add(Must, "TCP_TIMESTAMP", "timestamps that go on", in_repair(|fd| tcp::timestamp(fd.as_fd()).map(drop)));
    add(Helps, "TCP_REPAIR_WINDOW", "windows that go on where they were (4.8)", window());
    add(Helps, "TCP_REPAIR_OFF_NO_WP", "leaving repair mode without a word (4.19)", silent_end());
    add(Must, "SO_COOKIE", "telling sockets apart", socket(|fd| sockopt::cookie(fd.as_fd()).map(drop)));
    add(Must, "SIOCGSKNS", "finding a socket's network namespace (4.10)", namespace());
    add(Helps, "SO_NETNS_COOKIE", "finding it with fewer calls (5.14)", netns_cookie());
    add(Helps, "SO_BUF_LOCK", "buffers that grow as before (5.14)", socket(buffer_lock));
    add(
        Must,
        "pidfd_open",
        "watching a task (5.3)",
        process::pidfd_open(own_pid()).map(drop).map_err(Into::into),
    );
    add(Must, "pidfd_getfd", "reaching a task's sockets (5.6)", duplicate());
    add(Helps, "SO_PEEK_OFF", "sockets in flight inside unix sockets", peek_offset());
    add(Helps, "raw sockets, SO_MARK", "half-closed connections", raw_socket());
    add(Helps, "bpf_sk_assign_tcp_reqsk", "connections that nobody has accepted (6.9)", accept_queue());
    add(Helps, "NEEDS_ECN (BPF)", "connections that have ECN (5.7)", ecn());
    add(Helps, "TCP_BPF_IW (BPF)", "congestion windows (5.14)", congestion_window());
    add(Helps, "nft_log, nfnetlink_log", "what peers send meanwhile is held", packet_log());
    add(Helps, "nf_conntrack_netlink", "published ports, stateful firewalls", conntrack());
    add(OneOf, "nf_tables", "the network lock", network_lock(Method::Nftables));
    add(OneOf, "iptables", "the network lock with SOCCR_LOCK=iptables", network_lock(Method::Iptables));
    features
}

fn accept_queue() -> Result<()> {
    Ok(soccr::accept_queue::check(&NetNs::current()?)?)
}

fn ecn() -> Result<()> {
    AskForEcn::attach()?;
    Ok(())
}

fn congestion_window() -> Result<()> {
    let (program, fd) = (SetWindow::attach()?, stream()?);
    program.choose(fd.as_fd(), 10)?;
    Ok(())
}

fn packet_log() -> Result<()> {
    Ok(held::check(&NetNs::current()?, &LockName::soccr("check")?)?)
}

fn conntrack() -> Result<()> {
    let there = conntrack::is_there(&NetNs::current()?)?;
    ensure!(there, "not there, or not loaded: then nothing here is translated");
    Ok(())
}

fn own_pid() -> i32 {
    std::process::id().cast_signed()
}

fn stream() -> SysResult<OwnedFd> {
    sockopt::socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_TCP)
}

fn socket(work: impl FnOnce(&OwnedFd) -> SysResult<()>) -> Result<()> {
    Ok(work(&stream()?)?)
}

fn in_repair(work: impl FnOnce(&OwnedFd) -> SysResult<()>) -> Result<()> {
    socket(|fd| {
        tcp::set_repair(fd.as_fd(), Repair::On)?;
        work(fd)
    })
}

fn sequences(fd: &OwnedFd) -> SysResult<()> {
    tcp::select_queue(fd.as_fd(), Queue::Send)?;
    tcp::queue_seq(fd.as_fd()).map(drop)
}

fn window() -> Result<()> {
    let mut there = false;
    in_repair(|fd| {
        there = tcp::window(fd.as_fd())?.is_some();
        Ok(())
    })?;
    if there { Ok(()) } else { Err(anyhow::anyhow!("the kernel has no such option")) }
}

fn silent_end() -> Result<()> {
    in_repair(|fd| tcp::set_repair_exactly(fd.as_fd(), Repair::OffNoProbe))
}

fn namespace() -> Result<()> {
    NetNs::of_socket(stream()?.as_fd())?;
    Ok(())
}

fn netns_cookie() -> Result<()> {
    socket(|fd| sockopt::netns_cookie(fd.as_fd()).map(drop))
}

fn buffer_lock(fd: &OwnedFd) -> SysResult<()> {
    let locks = sockopt::buffer_locks(fd.as_fd())?;
    sockopt::set_buffer_locks(fd.as_fd(), locks)
}

fn duplicate() -> Result<()> {
    let pidfd = process::pidfd_open(own_pid())?;
    let fd = stream()?;
    process::pidfd_getfd(pidfd.as_fd(), RemoteFd(fd.as_raw_fd().unsigned_abs()))?;
    Ok(())
}

fn peek_offset() -> Result<()> {
    let fd = sockopt::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
    Ok(sockopt::set_peek_offset(fd.as_fd(), 0)?)
}

fn raw_socket() -> Result<()> {
    let fd = raw::open(false)?;
    Ok(sockopt::set_mark(fd.as_fd(), lock::MARK)?)
}

fn network_lock(method: Method) -> Result<()> {
    let local = SocketAddr::from(([127, 0, 0, 1], 1));
    let tuple = FourTuple { local, remote: SocketAddr::from(([127, 0, 0, 1], 2)) };
    let options = LockOptions { method, lease: None, log: None };
    NetworkLock::lock(&NetNs::current()?, &LockName::soccr("check")?, &[tuple], &options)?.unlock()?;
    Ok(())
}

/// A line for each.
pub fn print(features: &[Feature]) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for feature in features {
        let sign = if feature.there { '✓' } else { '✗' };
        let need = match (feature.need, feature.there) {
            (Need::Must, false) => " NEEDED",
            _ => "",
        };
        let why = feature.why.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
        writeln!(out, "{sign} {:23} {}{need}{why}", feature.name, feature.what_for)?;
    }
    if !enough(features) {
        writeln!(out, "This kernel lacks what soccr cannot do without.")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feature(need: Need, there: bool) -> Feature {
        Feature { name: "", need, what_for: "", there, why: None }
    }

    #[test]
    fn one_lock_is_enough_and_all_musts_are_needed() {
        let lock = |there| feature(Need::OneOf, there);
        assert!(enough(&[feature(Need::Must, true), feature(Need::Helps, false), lock(false), lock(true)]));
        assert!(!enough(&[feature(Need::Must, true), lock(false), lock(false)]));
        assert!(!enough(&[feature(Need::Must, false), lock(true)]));
    }
}
