//! Word of each change of a namespace's nf_tables.

use std::os::fd::{AsFd, BorrowedFd};

use super::LockError;
use super::nft::NftError;
use crate::kernel::netlink::NetlinkSocket;
use crate::kernel::netns::NetNs;

/// `NFNLGRP_NFTABLES`: tables, chains, rules and sets that come and go.
const TABLES: u32 = 7;
/// What is told does not matter, only that something is.
const ENOUGH: usize = 64 << 10;

/// Readable when something has changed.
#[derive(Debug)]
pub struct Watch(NetlinkSocket);

impl Watch {
    /// Watches a namespace from now on.
    ///
    /// # Errors
    /// [`LockError::Nftables`].
    pub fn open(ns: &NetNs) -> Result<Self, LockError> {
        let open = || {
            let socket = ns.run(NetlinkSocket::netfilter)?.map_err(NftError::Socket)?;
            socket.subscribe(TABLES).map_err(NftError::Socket)?;
            Ok(Self(socket))
        };
        open().map_err(|source| LockError::Nftables { action: "watch rules".into(), ns: ns.clone(), source })
    }

    /// Whether anything has, since this was asked the last time.
    #[must_use]
    pub fn changed(&self) -> bool {
        let (mut buffer, mut changed) = (vec![0; ENOUGH], false);
        loop {
            match self.0.receive(&mut buffer) {
                Ok(None) => return changed,
                Ok(Some(_)) => changed = true,
                Err(_) => return true, // so much that some was lost
            }
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
