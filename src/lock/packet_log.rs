//! A group of the netfilter log (`nfnetlink_log`): the kernel gives us a copy of each packet that meets a rule with
//! `log group N`.
//!
//! A copy, and not the packet itself, as a netfilter queue would give: what waits in a queue is lost as soon as anybody
//! in the namespace removes a chain (CRIU does, in the middle of a restore), it cannot go to another process or host,
//! and its rule means something else to a kernel without `nft_queue`.

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;

use super::netfilter::NetfilterSocket;
use super::nft::wire::{Header, Messages, Writer};
use super::nft::{MARK, NftError, answer, netlink_flag};
use crate::kernel::netns::NetNs;
use crate::kernel::{SysError, SysResult};

/// What the kernel may keep for us while we do something else.
const ROOM: i32 = 32 << 20;
/// The kernel sends packets together: when so many wait, when they fill this buffer, or 10 ms after the first.
const TOGETHER: u32 = 64;
const BUFFER: u32 = 64 << 10;
const TIMEOUT: u32 = 1; // in hundredths of a second
/// A datagram: the buffer, or one packet that is larger, with its attributes.
const LONGEST: usize = 2 * BUFFER as usize;
/// So many groups may be in use by others, from the number of our mark on.
const TRIES: u16 = 64;

const COMMAND: u16 = 1; // NFULA_CFG_CMD
const MODE: u16 = 2; // NFULA_CFG_MODE
const NLBUFSIZ: u16 = 3; // NFULA_CFG_NLBUFSIZ
const FLUSH_TIMEOUT: u16 = 4; // NFULA_CFG_TIMEOUT
const QTHRESH: u16 = 5; // NFULA_CFG_QTHRESH
const PAYLOAD: u16 = 9; // NFULA_PAYLOAD
const BIND: u8 = 1; // NFULNL_CFG_CMD_BIND
const UNBIND: u8 = 2; // NFULNL_CFG_CMD_UNBIND
const COPY_PACKET: u8 = 2; // NFULNL_COPY_PACKET

/// A group that is ours until this is dropped.
#[derive(Debug)]
pub struct PacketLog {
    socket: NetfilterSocket,
    group: u16,
    buffer: Vec<u8>,
}

impl PacketLog {
    /// Takes a free group in `ns`.
    pub fn open(ns: &NetNs) -> Result<Self, NftError> {
        let socket = NetfilterSocket::open(ns)?.map_err(NftError::Socket)?;
        // Its groups end with its port.
        socket.take_new_port().map_err(NftError::Socket)?;
        socket.set_receive_room(ROOM);
        #[allow(clippy::cast_possible_truncation)] // it has 16 bits
        let mut log = Self { socket, group: MARK as u16, buffer: vec![0; LONGEST] };
        for _ in 0..TRIES {
            match log.bind() {
                Err(e) if e.is(Errno::EBUSY) || e.is(Errno::EPERM) => log.group = log.group.wrapping_add(1),
                other => return other.map(|()| log),
            }
        }
        Err(NftError::Refused { step: STEPS[1], errno: Errno::EBUSY, detail: None })
    }

    /// Its number, for rules of the same namespace.
    pub fn group(&self) -> u16 {
        self.group
    }

    fn bind(&self) -> Result<(), NftError> {
        let all_of_it = [0, 0, 0xff, 0xff, COPY_PACKET, 0];
        self.configure(libc::NLM_F_ACK, |w| {
            w.put(COMMAND, &[BIND]);
            w.put(MODE, &all_of_it);
            w.put_u32(NLBUFSIZ, BUFFER);
            w.put_u32(FLUSH_TIMEOUT, TIMEOUT);
            w.put_u32(QTHRESH, TOGETHER);
        })
        .map_err(NftError::Socket)?;
        answer::verdict(|buffer| self.socket.receive(buffer), &STEPS)
    }

    fn configure(&self, flags: libc::c_int, attributes: impl FnOnce(&mut Writer)) -> SysResult<()> {
        let subsystem = netlink_flag(libc::NFNL_SUBSYS_ULOG);
        let kind = (subsystem << 8) | netlink_flag(libc::NFULNL_MSG_CONFIG);
        let header = Header { kind, flags: netlink_flag(libc::NLM_F_REQUEST | flags), seq: 1 };
        let mut writer = Writer::default();
        writer.message(header, 0, self.group, attributes);
        self.socket.send(writer.bytes())
    }

    /// Gives `each` the packets that have come, from the IP header on. Waits for nothing.
    pub fn read(&mut self, mut each: impl FnMut(&[u8])) {
        loop {
            let len = match self.socket.receive(&mut self.buffer) {
                Ok(Some(len)) => len,
                Err(SysError { errno: Errno::ENOBUFS, .. }) => continue, // some were lost
                Ok(None) | Err(_) => return,
            };
            for message in Messages::new(&self.buffer[..len]).flatten() {
                let is_packet = message.header.kind == netlink_flag(libc::NFNL_SUBSYS_ULOG) << 8;
                if let (true, Ok((_, attributes))) = (is_packet, message.netfilter())
                    && let Ok(Some(packet)) = attributes.find(PAYLOAD)
                {
                    each(packet.bytes());
                }
            }
        }
    }

    /// The last packets, those included that the kernel keeps to send them together.
    pub fn finish(mut self, each: impl FnMut(&[u8])) {
        let _ = self.configure(0, |w| w.put(COMMAND, &[UNBIND]));
        self.read(each);
        self.socket.is_slow_to_close();
    }
}

/// The one message, as the kernel's answer counts it.
const STEPS: [&str; 2] = ["", "take a group of the netfilter log"];

impl AsFd for PacketLog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
