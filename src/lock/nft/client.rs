//! Talks to nf_tables: transactions that happen whole or not at all, and dumps.

use nix::errno::Errno;

use super::answer::{self, COMMIT};
use super::error::{DUMP_TRIES, NftError};
use super::wire::{Attributes, FAMILY_LEN, HEADER_LEN, Header, Malformed, Writer};
use crate::kernel::SysError;
use crate::kernel::netns::NetNs;
use crate::lock::netfilter::NetfilterSocket;

const REQUEST: u16 = netlink_flag(libc::NLM_F_REQUEST);
const ACK: u16 = netlink_flag(libc::NLM_F_ACK);
const DUMP: u16 = netlink_flag(libc::NLM_F_DUMP);

pub const fn netlink_flag(flag: libc::c_int) -> u16 {
    assert!(flag > 0 && flag <= 0xffff);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // asserted above
    {
        flag as u16
    }
}

/// Steps for the kernel to do all at once.
#[derive(Debug)]
pub struct Transaction {
    writer: Writer,
    /// What each message is for; the message's sequence number is its place here.
    steps: Vec<&'static str>,
    last_start: usize,
    subsystem: u16,
    deletes: bool,
}

pub(super) const BEGIN: &str = "begin a transaction of nf_tables";

impl Transaction {
    /// An empty transaction.
    pub fn new() -> Self {
        Self::of_subsystem(netlink_flag(libc::NFNL_SUBSYS_NFTABLES))
    }

    fn of_subsystem(subsystem: u16) -> Self {
        let (writer, steps) = (Writer::default(), Vec::new());
        let mut new = Self { writer, steps, last_start: 0, subsystem, deletes: false };
        new.bracket(libc::NFNL_MSG_BATCH_BEGIN, BEGIN);
        new
    }

    /// Adds a message `NFT_MSG_*`. `step` completes the sentence "cannot …".
    pub fn step(
        &mut self,
        step: &'static str,
        message: libc::c_int,
        flags: libc::c_int,
        family: u8,
        attributes: impl FnOnce(&mut Writer),
    ) {
        self.last_start = self.writer.bytes().len();
        self.deletes |= matches!(message, libc::NFT_MSG_DELTABLE | libc::NFT_MSG_DELRULE);
        let header = Header {
            kind: (self.subsystem << 8) | u16::try_from(message).expect("NFT_MSG_* fit one byte"),
            flags: REQUEST | u16::try_from(flags).expect("NLM_F_* fit 16 bits"),
            seq: self.next_seq(),
        };
        self.steps.push(step);
        self.writer.message(header, family, 0, attributes);
    }

    fn bracket(&mut self, message: libc::c_int, step: &'static str) {
        let kind = u16::try_from(message).expect("NFNL_MSG_* fit one byte");
        let header = Header { kind, flags: REQUEST, seq: self.next_seq() };
        self.steps.push(step);
        self.writer.message(header, 0, self.subsystem, |_| ());
    }

    fn next_seq(&self) -> u32 {
        u32::try_from(self.steps.len()).expect("a transaction is far below 2³² messages")
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.steps.len() == 1
    }
}

/// A connection to nf_tables of one network namespace.
#[derive(Debug)]
pub struct Client(NetfilterSocket);

impl Client {
    /// Opens a socket inside `ns`; the thread stays where it is.
    pub fn open(ns: &NetNs) -> Result<Self, NftError> {
        match NetfilterSocket::open(ns)? {
            Ok(socket) => Ok(Self(socket)),
            Err(SysError { errno: Errno::EPROTONOSUPPORT, .. }) => Err(NftError::Missing),
            Err(e) => Err(NftError::Socket(e)),
        }
    }

    /// Does all steps of `transaction`, or none and names the first that the kernel refused.
    pub fn commit(&self, mut transaction: Transaction) -> Result<(), NftError> {
        if transaction.is_empty() {
            return Ok(());
        }
        // One answer for a success is enough; a refusal is answered in any case.
        transaction.writer.add_flags(transaction.last_start, ACK);
        transaction.bracket(libc::NFNL_MSG_BATCH_END, COMMIT);
        if transaction.deletes {
            self.0.is_slow_to_close();
        }
        self.send(transaction.writer.bytes())?;
        self.verdict(&transaction.steps)
    }

    fn send(&self, bytes: &[u8]) -> Result<(), NftError> {
        self.0.send(bytes).map_err(|e| match e.errno {
            Errno::EMSGSIZE | Errno::ENOBUFS => NftError::TooLarge { bytes: bytes.len() },
            _ => NftError::Socket(e),
        })
    }

    fn verdict(&self, steps: &[&'static str]) -> Result<(), NftError> {
        answer::verdict(|buffer| self.0.receive(buffer), steps)
    }

    /// Asks for a list and gives each entry's family and attributes to `entry`.
    ///
    /// A list that the kernel had to read while it changed is read again, after `restart`.
    pub fn dump<T>(
        &self,
        what: &'static str,
        message: libc::c_int,
        family: u8,
        filter: impl Fn(&mut Writer),
        mut entry: impl FnMut(u8, Attributes<'_>) -> Result<Option<T>, Malformed>,
    ) -> Result<Vec<T>, NftError> {
        for _ in 0..DUMP_TRIES {
            let mut writer = Writer::default();
            let message = u16::try_from(message).expect("NFT_MSG_* fit one byte");
            let kind = (netlink_flag(libc::NFNL_SUBSYS_NFTABLES) << 8) | message;
            writer.message(Header { kind, flags: REQUEST | DUMP, seq: 0 }, family, 0, &filter);
            self.send(writer.bytes())?;
            let receive = |buffer: &mut [u8]| self.0.receive(buffer);
            if let Some(list) = answer::list(receive, what, &mut entry)? {
                return Ok(list);
            }
        }
        Err(NftError::Changing { what })
    }
}

const _: () = assert!(FAMILY_LEN == 4 && HEADER_LEN == size_of::<libc::nlmsghdr>());
