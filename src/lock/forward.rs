//! Held packets that follow their address to another host.
//!
//! What reaches this host between a dump and the moment in which the address leaves it is in no image: a client whose SYN it
//! was would ask again after a second. So it is sent on to the new owner, as it came. That TCP takes for a retransmission,
//! whatever the owner does with it: hold it, or answer.
//!
//! Not through a raw socket, which would ask the link as well. As long as nobody has the address the packet would wait there,
//! and in the end the kernel would tell its sender that the host is unreachable: seen, connect() fails with EHOSTUNREACH after
//! three seconds. Or a route would take it to a gateway that still takes this host for the owner. So the
//! [neighbour](crate::kernel::neighbour) comes first, then the packet, straight to its link-layer address.
//!
//! What still comes by the old link-layer address when this host has the IP address no more meets no lock: locks stand where
//! packets come to sockets. A packet socket hears it.
//!
//! Where the owner is on no link of this host, the senders send again.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, recv};

use super::held::{HeldPackets, Holder};
use crate::chain;
use crate::kernel::interface::{self, AddressChanges};
use crate::kernel::neighbour::Neighbour;
use crate::kernel::netns::{NetNs, NetNsError};
use crate::kernel::{SysError, SysResult, raw};

/// For so long a new owner is looked for and sent to; later whoever connects has asked again several times.
const SEARCH: Duration = Duration::from_secs(30);
/// One host asks for another no more often (RFC 1122, 2.3.2.1).
const ASK: Duration = Duration::from_secs(1);
/// So often packets are sent on: should a link bring them back, they do not go round at once.
const PAUSE: Duration = Duration::from_millis(50);
/// No packet of IP is longer.
const LONGEST: usize = 1 << 16;

/// Sends what is held in a namespace on to who has its address next.
#[derive(Debug)]
pub struct Forwarder {
    ns: NetNs,
    changes: AddressChanges,
    departed: Vec<Departed>,
}

/// Packets cannot be forwarded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForwardError {
    /// A system call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The namespace could not be entered.
    #[error(transparent)]
    Namespace(#[from] NetNsError),
}

impl Forwarder {
    /// For the addresses that leave `ns` from now on.
    ///
    /// # Errors
    /// [`ForwardError`].
    pub fn new(ns: &NetNs) -> Result<Self, ForwardError> {
        Ok(Self { ns: ns.clone(), changes: ns.run(AddressChanges::hear)??, departed: Vec::new() })
    }

    /// What to wait for.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [self.changes.as_fd()].into_iter().chain(self.departed.iter().flat_map(Departed::fds))
    }

    /// How long to wait for it, if something has to be done even if nothing comes.
    #[must_use]
    pub fn patience(&self) -> Option<Duration> {
        (!self.departed.is_empty()).then_some(PAUSE)
    }

    /// Sends on what `holder` holds for addresses that have another owner now.
    pub fn forward(&mut self, holder: &mut Holder) {
        let deleted = self.changes.deleted();
        let expected: Vec<_> = deleted.into_iter().filter(|(ip, _)| holder.expects_at(*ip)).collect();
        if expected.is_empty() && self.departed.is_empty() {
            return;
        }
        let failed = |error: &SysError| log::debug!("what was held has to be sent again: {error}");
        let forwarded = self.ns.run(|| {
            let departed =
                expected.into_iter().map(|(ip, device)| Departed::new(ip, device).inspect_err(failed));
            self.departed.extend(departed.flatten());
            self.departed.retain_mut(|it| it.is_away() && it.forward(holder).inspect_err(failed).is_ok());
        });
        if let Err(error) = forwarded {
            log::debug!("what was held has to be sent again: {}", chain(&error));
        }
    }
}

/// An address that this host has had.
#[derive(Debug)]
struct Departed {
    ip: IpAddr,
    /// The index of the interface that had it.
    device: u32,
    /// Hears what still comes for it there, and sends.
    link: OwnedFd,
    since: Instant,
    /// Who has it now, and when that was asked; only once something is held.
    neighbour: Option<(Neighbour, Instant)>,
    forwarded: Option<Instant>,
}

impl Departed {
    fn new(ip: IpAddr, device: u32) -> SysResult<Self> {
        let link = raw::open_link(device, ip)?;
        Ok(Self { ip, device, link, since: Instant::now(), neighbour: None, forwarded: None })
    }

    fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let neighbour = self.neighbour.iter().map(|(neighbour, _)| neighbour.as_fd());
        [self.link.as_fd()].into_iter().chain(neighbour)
    }

    fn is_away(&self) -> bool {
        self.since.elapsed() < SEARCH && matches!(interface::is_assigned(self.ip), Ok(false))
    }

    fn forward(&mut self, holder: &mut Holder) -> SysResult<()> {
        let mut packet = [0; LONGEST];
        while let Ok(len) = recv(self.link.as_raw_fd(), &mut packet, MsgFlags::MSG_DONTWAIT) {
            holder.take_packet(&packet[..len]);
        }
        let is_too_soon = self.forwarded.is_some_and(|last| last.elapsed() < PAUSE);
        if is_too_soon || !holder.has_at(self.ip) {
            return Ok(());
        }
        let (neighbour, asked) = match &mut self.neighbour {
            Some(found) => found,
            none => none.insert((Neighbour::find(self.ip, self.device)?, Instant::now())),
        };
        if let Some(to) = neighbour.link_address() {
            self.forwarded = Some(Instant::now());
            send(self.link.as_fd(), &holder.take_at(self.ip), self.device, to);
        } else if asked.elapsed() >= ASK {
            *asked = Instant::now();
            neighbour.ask()?;
        }
        Ok(())
    }
}

/// What does not pass, such as segments that were merged on their way here, their senders send again.
fn send(link: BorrowedFd<'_>, held: &HeldPackets, device: u32, to: &[u8]) {
    for packet in held.to_packets() {
        if let Err(error) = raw::send_on_link(link, &packet, device, to) {
            log::debug!("{} bytes have to be sent again: {error}", packet.len());
        }
    }
}
