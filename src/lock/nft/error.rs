//! What can go wrong in nf_tables.

use nix::errno::Errno;

use super::wire::Malformed;
use crate::kernel::SysError;
use crate::kernel::netns::NetNsError;

/// How often a dump is begun anew because the rules changed under it.
pub(super) const DUMP_TRIES: usize = 10;

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
