//! Whose an IP address is on a link: the kernel's neighbour table, which ARP and neighbour discovery fill (arp(7)).

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;

use super::SysResult;
use super::interface::ip_of;
use super::netlink::NetlinkSocket;
use super::wire::{Attributes, Header, Message, Messages, Writer};

/// An entry, as far as the kernel tells of it.
#[derive(Debug)]
pub struct Neighbour {
    socket: NetlinkSocket,
    ip: IpAddr,
    /// The index of the interface.
    device: u32,
    link_address: Option<Vec<u8>>,
}

impl Neighbour {
    /// Who has `ip` on this link of the current namespace. What the table knew of it is forgotten.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn find(ip: IpAddr, device: u32) -> SysResult<Self> {
        let socket = NetlinkSocket::route(libc::RTMGRP_NEIGH)?;
        let found = Self { socket, ip, device, link_address: None };
        found.send(libc::RTM_DELNEIGH, 0, 0)?;
        found.ask()?;
        Ok(found)
    }

    /// Asks on the link, unless the kernel does so already, which asks three times in three seconds. No packet waits for the
    /// answer: of one that waits in vain the kernel tells the address in its header that there is no way, and if that is a
    /// forwarded SYN's the client's connect() fails.
    ///
    /// # Errors
    /// The request cannot be sent. What the kernel says to it is not waited for.
    pub fn ask(&self) -> SysResult<()> {
        self.send(libc::RTM_NEWNEIGH, libc::NLM_F_CREATE, libc::NTF_USE)
    }

    /// The link-layer address of who has it, by what the kernel has told so far.
    pub fn link_address(&mut self) -> Option<&[u8]> {
        let mut buffer = [0; 8192];
        loop {
            match self.socket.receive(&mut buffer) {
                Ok(Some(len)) => {
                    let told =
                        Messages::new(&buffer[..len]).flatten().filter_map(|message| self.entry_in(message));
                    if let Some(last) = told.last() {
                        self.link_address = last;
                    }
                }
                Err(error) if error.errno == Errno::ENOBUFS => {}
                Ok(None) | Err(_) => return self.link_address.as_deref(),
            }
        }
    }

    /// What a message tells of this entry, if it does: nothing where nobody answers.
    fn entry_in(&self, message: Message<'_>) -> Option<Option<Vec<u8>>> {
        const KNOWN: u16 = libc::NUD_REACHABLE | libc::NUD_STALE | libc::NUD_DELAY | libc::NUD_PROBE;
        let (head, attributes) = message.payload.split_first_chunk::<NDMSG>()?;
        let attributes = Attributes::new(attributes);
        let find = |kind| Some(attributes.find(kind).ok()??.bytes());
        let is_it = message.header.kind == libc::RTM_NEWNEIGH
            && head[4..8] == self.device.to_ne_bytes()
            && ip_of(find(libc::NDA_DST)?) == Some(self.ip);
        let is_known = u16::from_ne_bytes([head[8], head[9]]) & KNOWN != 0;
        is_it.then(|| find(libc::NDA_LLADDR).filter(|_| is_known).map(<[u8]>::to_vec))
    }

    fn send(&self, kind: u16, flags: libc::c_int, neighbour_flags: u8) -> SysResult<()> {
        let (family, ip) = match self.ip {
            IpAddr::V4(ip) => (libc::AF_INET, ip.octets().to_vec()),
            IpAddr::V6(ip) => (libc::AF_INET6, ip.octets().to_vec()),
        };
        let mut message = [0; NDMSG];
        message[0] = u8::try_from(family).unwrap_or_default();
        message[4..8].copy_from_slice(&self.device.to_ne_bytes());
        message[10] = neighbour_flags;
        let flags = u16::try_from(libc::NLM_F_REQUEST | flags).unwrap_or_default();
        let mut writer = Writer::default();
        writer.plain(Header { kind, flags, seq: 0 }, &message, |w| w.put(libc::NDA_DST, &ip));
        self.socket.send(writer.bytes())
    }
}

/// The length of `struct ndmsg`: family, three bytes of nothing, index, state, flags, type.
const NDMSG: usize = 12;

/// Readable when the kernel tells something.
impl AsFd for Neighbour {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
