//! Talks to nf_tables: transactions that happen whole or not at all, and dumps.

use std::cell::Cell;
use std::thread;

use nix::errno::Errno;

use super::abi;
use super::wire::{Attributes, FAMILY_LEN, HEADER_LEN, Header, Malformed, Message, Messages, Writer};
use crate::kernel::SysError;
use crate::kernel::netlink::NetfilterSocket;
use crate::kernel::netns::{NetNs, NetNsError};

const REQUEST: u16 = netlink_flag(libc::NLM_F_REQUEST);
const ACK: u16 = netlink_flag(libc::NLM_F_ACK);
const DUMP: u16 = netlink_flag(libc::NLM_F_DUMP);

const fn netlink_flag(flag: libc::c_int) -> u16 {
    assert!(flag > 0 && flag <= 0xffff);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // asserted above
    {
        flag as u16
    }
}

/// The kernel writes dumps in pieces of at most 32 KiB.
const RECEIVE_BUFFER: usize = 64 * 1024;

/// How often a dump is begun anew because the rules changed under it.
const DUMP_TRIES: usize = 10;

/// nf_tables did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NftError {
    /// The namespace could not be entered to open a socket there.
    #[error(transparent)]
    Namespace(#[from] NetNsError),
    /// The netlink socket failed.
    #[error(transparent)]
    Socket(SysError),
    /// This kernel has no nf_tables, or not for the family `inet`.
    #[error("this kernel has no nf_tables (modules nf_tables and nf_tables_inet)")]
    Missing,
    /// One transaction is larger than this process may send at once.
    #[error(
        "a transaction of {bytes} bytes does not fit the socket's send buffer: raise net.core.wmem_max to that, \
         or run with CAP_NET_ADMIN in the initial user namespace"
    )]
    TooLarge {
        /// The transaction's size.
        bytes: usize,
    },
    /// The kernel refused one step, and with it the whole transaction: nothing was changed.
    #[error("cannot {step}: {errno}{}", .detail.as_deref().map(|d| format!(" ({d})")).unwrap_or_default())]
    Refused {
        /// The step.
        step: &'static str,
        /// The kernel's error.
        errno: Errno,
        /// The kernel's own words, where it has any.
        detail: Option<String>,
    },
    /// The kernel's verdict on a transaction got lost.
    #[error("nf_tables did not say whether it did the transaction")]
    NoVerdict,
    /// The rules kept changing while they were read.
    #[error("the rules changed each of {DUMP_TRIES} times while nf_tables was listing {what}")]
    Changing {
        /// What was listed.
        what: &'static str,
    },
    /// An answer makes no sense.
    #[error("nf_tables gave a malformed answer about {what}")]
    Malformed {
        /// What was asked.
        what: &'static str,
        /// Where it went wrong.
        source: Malformed,
    },
}

impl NftError {
    /// Whether the kernel refused for this reason.
    pub fn is(&self, wanted: Errno) -> bool {
        matches!(self, Self::Refused { errno, .. } if *errno == wanted)
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

const BEGIN: &str = "begin a transaction of nf_tables";
const COMMIT: &str = "commit a transaction of nf_tables";

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
pub struct Client {
    /// Only dropping takes it.
    socket: Option<NetfilterSocket>,
    slow_to_close: Cell<bool>,
}

/// Closing the socket waits until the kernel has freed what was deleted, 10 to 15 ms for an RCU grace
/// period, while connections that are unlocked already wait for us: so that is left to a thread.
impl Drop for Client {
    fn drop(&mut self) {
        let socket = self.socket.take();
        if self.slow_to_close.get() {
            // Without a thread it is closed here.
            let _ = thread::Builder::new().name("soccr-nft-close".into()).spawn(move || drop(socket));
        }
    }
}

impl Client {
    /// Opens a socket inside `ns`; the thread stays where it is.
    pub fn open(ns: &NetNs) -> Result<Self, NftError> {
        match ns.run(NetfilterSocket::open)? {
            Ok(socket) => Ok(Self { socket: Some(socket), slow_to_close: Cell::new(false) }),
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
        self.slow_to_close.set(self.slow_to_close.get() || transaction.deletes);
        self.send(transaction.writer.bytes())?;
        self.verdict(&transaction.steps)
    }

    fn socket(&self) -> &NetfilterSocket {
        self.socket.as_ref().expect("it is there until the drop")
    }

    fn send(&self, bytes: &[u8]) -> Result<(), NftError> {
        self.socket().send(bytes).map_err(|e| match e.errno {
            Errno::EMSGSIZE | Errno::ENOBUFS => NftError::TooLarge { bytes: bytes.len() },
            _ => NftError::Socket(e),
        })
    }

    fn verdict(&self, steps: &[&'static str]) -> Result<(), NftError> {
        let mut buffer = vec![0; RECEIVE_BUFFER];
        let (mut acked, mut refused) = (false, None);
        loop {
            let len = match self.socket().receive(&mut buffer) {
                Ok(Some(len)) => len,
                Ok(None) => break,
                // More refusals than the buffer holds; the first ones are in it.
                Err(SysError { errno: Errno::ENOBUFS, .. }) => continue,
                Err(e) => return Err(NftError::Socket(e)),
            };
            for message in Messages::new(&buffer[..len]) {
                match message.and_then(|m| Answer::read(&m)).map_err(|e| malformed(COMMIT, e))? {
                    Some(Answer { errno: None, .. }) => acked = true,
                    Some(answer) if refused.is_none() => refused = Some(answer),
                    _ => (),
                }
            }
        }
        match refused {
            Some(answer) => Err(answer.refusal(steps)),
            None if acked => Ok(()),
            None => Err(NftError::NoVerdict),
        }
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
            if let Some(list) = self.read_dump(what, &mut entry)? {
                return Ok(list);
            }
        }
        Err(NftError::Changing { what })
    }

    /// `None` when the list changed while it was read.
    fn read_dump<T>(
        &self,
        what: &'static str,
        entry: &mut impl FnMut(u8, Attributes<'_>) -> Result<Option<T>, Malformed>,
    ) -> Result<Option<Vec<T>>, NftError> {
        let mut buffer = vec![0; RECEIVE_BUFFER];
        let (mut list, mut changed) = (Vec::new(), false);
        while let Some(len) = self.socket().receive(&mut buffer).map_err(NftError::Socket)? {
            for message in Messages::new(&buffer[..len]) {
                let message = message.map_err(|e| malformed(what, e))?;
                changed |= message.header.flags & abi::NLM_F_DUMP_INTR != 0;
                match i32::from(message.header.kind) {
                    libc::NLMSG_DONE => return Ok((!changed).then_some(list)),
                    libc::NLMSG_ERROR => {
                        let answer = Answer::read(&message).map_err(|e| malformed(what, e))?;
                        return Err(answer.map_or(NftError::NoVerdict, |a| a.refusal(&[what])));
                    }
                    libc::NLMSG_NOOP => (),
                    _ => {
                        let (family, attributes) = message.netfilter().map_err(|e| malformed(what, e))?;
                        list.extend(entry(family, attributes).map_err(|e| malformed(what, e))?);
                    }
                }
            }
        }
        Err(NftError::NoVerdict)
    }
}

fn malformed(what: &'static str, source: Malformed) -> NftError {
    NftError::Malformed { what, source }
}

/// A message of type `NLMSG_ERROR`: an acknowledgement or a refusal.
struct Answer {
    seq: u32,
    errno: Option<Errno>,
    detail: Option<String>,
}

impl Answer {
    /// `None` for a message that is no answer, such as an echo.
    fn read(message: &Message<'_>) -> Result<Option<Self>, Malformed> {
        if i32::from(message.header.kind) != libc::NLMSG_ERROR {
            return Ok(None);
        }
        let Some((code, about)) = message.payload.split_first_chunk() else {
            return Err(Malformed { what: "an error without a code", offset: 0 });
        };
        let errno = match i32::from_ne_bytes(*code) {
            0 => None,
            code => Some(Errno::from_raw(code.saturating_neg())),
        };
        let detail = match about.get(HEADER_LEN..) {
            Some(rest) if message.header.flags & abi::NLM_F_ACK_TLVS != 0 => Self::detail(rest)?,
            _ => None,
        };
        Ok(Some(Self { seq: message.header.seq, errno, detail }))
    }

    fn detail(attributes: &[u8]) -> Result<Option<String>, Malformed> {
        let text = Attributes::new(attributes).find(abi::error::MSG)?;
        text.map(|t| t.str().map(str::to_owned)).transpose()
    }

    fn refusal(self, steps: &[&'static str]) -> NftError {
        let errno = self.errno.unwrap_or(Errno::UnknownErrno);
        let at = usize::try_from(self.seq).unwrap_or(usize::MAX);
        match (at, errno) {
            // nfnetlink does not know the subsystem, nf_tables does not know the family.
            (0, Errno::EOPNOTSUPP) | (_, Errno::EAFNOSUPPORT) => NftError::Missing,
            _ => NftError::Refused {
                step: steps.get(at).copied().unwrap_or(COMMIT),
                errno,
                detail: self.detail,
            },
        }
    }
}

const _: () = assert!(FAMILY_LEN == 4 && HEADER_LEN == size_of::<libc::nlmsghdr>());

#[cfg(test)]
mod tests {
    use super::*;

    /// An NLMSG_ERROR as the kernel sends it with NETLINK_CAP_ACK and NETLINK_EXT_ACK.
    fn answer(seq: u32, code: i32, words: Option<&str>) -> Vec<u8> {
        let mut attributes = Writer::default();
        if let Some(words) = words {
            attributes.put_str(abi::error::MSG, words);
        }
        let mut bytes = Vec::new();
        let len = u32::try_from(HEADER_LEN + 4 + HEADER_LEN + attributes.bytes().len()).unwrap();
        bytes.extend_from_slice(&len.to_ne_bytes());
        bytes.extend_from_slice(&netlink_flag(libc::NLMSG_ERROR).to_ne_bytes());
        bytes.extend_from_slice(&if words.is_some() { abi::NLM_F_ACK_TLVS } else { 0 }.to_ne_bytes());
        bytes.extend_from_slice(&seq.to_ne_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&code.to_ne_bytes());
        bytes.extend_from_slice(&[0; HEADER_LEN]);
        bytes.extend_from_slice(attributes.bytes());
        bytes
    }

    fn read(bytes: &[u8]) -> Answer {
        let message = Messages::new(bytes).next().unwrap().unwrap();
        Answer::read(&message).unwrap().unwrap()
    }

    #[test]
    fn a_refusal_names_the_step_and_has_the_kernels_words() {
        let steps = [BEGIN, "create this", "create that"];
        let error = read(&answer(2, -libc::EPERM, Some("not yours"))).refusal(&steps);
        assert!(error.is(Errno::EPERM));
        assert_eq!(error.to_string(), format!("cannot create that: {} (not yours)", Errno::EPERM));
        let error = read(&answer(1, -libc::ENOENT, None)).refusal(&steps);
        assert_eq!(error.to_string(), format!("cannot create this: {}", Errno::ENOENT));
    }

    #[test]
    fn an_acknowledgement_is_no_refusal() {
        assert!(read(&answer(1, 0, None)).errno.is_none());
    }

    /// So nfnetlink answers a batch for a subsystem that it does not have.
    #[test]
    fn a_kernel_without_nf_tables_is_told_apart() {
        let no_subsystem = read(&answer(0, -libc::EOPNOTSUPP, None)).refusal(&[BEGIN]);
        assert!(matches!(no_subsystem, NftError::Missing));
        let no_family = read(&answer(1, -libc::EAFNOSUPPORT, None)).refusal(&[BEGIN, "create"]);
        assert!(matches!(no_family, NftError::Missing));
        let other = read(&answer(1, -libc::EOPNOTSUPP, None)).refusal(&[BEGIN, "create"]);
        assert!(matches!(other, NftError::Refused { .. }));
    }

    #[test]
    fn nonsense_is_an_error_and_not_a_panic() {
        let good = answer(7, -libc::EINVAL, Some("words"));
        for at in 0..good.len() {
            for value in [0, 1, 3, 0x7f, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                for message in Messages::new(&bad[..]).flatten() {
                    if let Ok(Some(answer)) = Answer::read(&message) {
                        drop(answer.refusal(&[BEGIN]));
                    }
                }
            }
            for message in Messages::new(&good[..at]) {
                assert!(message.is_err(), "cut at {at}");
            }
        }
    }
}
