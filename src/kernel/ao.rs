//! TCP-AO (RFC 5925): only whether a socket has keys, since nobody may read them.

use std::os::fd::BorrowedFd;

use nix::errno::Errno;

use super::{SysError, SysResult, sockopt};

/// Whether the socket has TCP-AO keys (`TCP_AO_INFO`, Linux 6.7); `None` on a kernel without TCP-AO.
///
/// # Errors
/// The kernel's answer.
pub fn has_keys(fd: BorrowedFd<'_>) -> SysResult<Option<bool>> {
    const TCP_AO_INFO: i32 = 40;
    match sockopt::get_into(fd, libc::SOL_TCP, TCP_AO_INFO, &mut [0; 64]) {
        Ok(_) => Ok(Some(true)),
        Err(SysError { errno: Errno::ENOENT, .. }) => Ok(Some(false)),
        Err(SysError { errno: Errno::ENOPROTOOPT, .. }) => Ok(None),
        Err(SysError { errno, .. }) => Err(SysError { call: "get TCP_AO_INFO", errno }),
    }
}
