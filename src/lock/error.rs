//! What can go wrong with a lock.

use super::nft::NftError;
use super::options::{LEASE_VARIABLE, METHOD_VARIABLE};
use super::xtables::XtablesError;
use crate::four_tuple::FourTuple;
use crate::kernel::netns::NetNs;

/// A lock could not be set, changed, listed or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// The kernel has no nf_tables.
    #[error(
        "cannot {action} in {ns}: this kernel has no nf_tables; load the modules nf_tables and nf_tables_inet, \
         or choose iptables with {METHOD_VARIABLE}=iptables"
    )]
    NoNftables {
        /// What was tried, with the lock's name.
        action: String,
        /// The namespace.
        ns: NetNs,
    },
    /// nf_tables failed; nothing was changed.
    #[error("cannot {action} in {ns}")]
    Nftables {
        /// What was tried, with the lock's name.
        action: String,
        /// The namespace.
        ns: NetNs,
        /// Why.
        source: NftError,
    },
    /// iptables or ip6tables failed. Each changes all or nothing, and what iptables did is undone
    /// as far as possible when ip6tables fails.
    #[error("cannot {action} in {ns}")]
    Iptables {
        /// What was tried, with the lock's name.
        action: String,
        /// The namespace.
        ns: NetNs,
        /// Why.
        source: XtablesError,
    },
    /// Only nf_tables can end a lock by itself.
    #[error("a lease ({LEASE_VARIABLE}) needs {METHOD_VARIABLE}=nftables: iptables rules do not expire")]
    LeaseNeedsNftables,
    /// One end is IPv4, the other IPv6: no packet looks like that.
    #[error("cannot lock {0}: its ends are of different families")]
    MixedFamilies(FourTuple),
}
