//! The kernel's answers, from whatever gives their datagrams: a socket, or a test.

use nix::errno::Errno;

use super::abi;
use super::error::NftError;
use super::wire::{Attributes, HEADER_LEN, Malformed, Message, Messages};
use crate::kernel::{SysError, SysResult};

/// What the answer to a whole transaction is about.
pub(super) const COMMIT: &str = "commit a transaction of nf_tables";

/// The kernel writes dumps in pieces of at most 32 KiB.
const RECEIVE_BUFFER: usize = 64 * 1024;

/// Whether the kernel did a transaction: it acknowledges the last of `steps`, or refuses some.
pub(in crate::lock) fn verdict(
    mut receive: impl FnMut(&mut [u8]) -> SysResult<Option<usize>>,
    steps: &[&'static str],
) -> Result<(), NftError> {
    let mut buffer = vec![0; RECEIVE_BUFFER];
    let (mut acked, mut refused) = (false, None);
    loop {
        let len = match receive(&mut buffer) {
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

/// Gives the family and the attributes of each entry of a list to `entry`; `None` when the list changed while
/// the kernel was reading it.
pub(super) fn list<T>(
    mut receive: impl FnMut(&mut [u8]) -> SysResult<Option<usize>>,
    what: &'static str,
    entry: &mut impl FnMut(u8, Attributes<'_>) -> Result<Option<T>, Malformed>,
) -> Result<Option<Vec<T>>, NftError> {
    let mut buffer = vec![0; RECEIVE_BUFFER];
    let (mut list, mut changed) = (Vec::new(), false);
    while let Some(len) = receive(&mut buffer).map_err(NftError::Socket)? {
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

#[cfg(test)]
mod tests {
    use super::super::client::{BEGIN, netlink_flag};
    use super::super::wire::Writer;
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
