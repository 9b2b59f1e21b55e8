//! What is behind an error, for those who read it.

use std::{fs, io};

use nix::errno::Errno;
use soccr::kernel::SysError;

/// A privilege that commands need, by its bit in `/proc/PID/status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capability {
    DacOverride = 1,
    NetAdmin = 12,
    SysPtrace = 19,
}

impl Capability {
    fn name(self) -> &'static str {
        match self {
            Self::DacOverride => "CAP_DAC_OVERRIDE",
            Self::NetAdmin => "CAP_NET_ADMIN",
            Self::SysPtrace => "CAP_SYS_PTRACE",
        }
    }

    fn is_held(self) -> bool {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let effective = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
        effective.is_none_or(|bits| bits & (1 << self as u32) != 0)
    }
}

/// The capability for want of which the kernel said no, if that is why.
pub fn missing_capability(error: &anyhow::Error, needed: Capability) -> Option<&'static str> {
    let forbidden = |errno: Errno| matches!(errno, Errno::EPERM | Errno::EACCES);
    let denied = error.chain().any(|cause| {
        cause.downcast_ref::<SysError>().is_some_and(|error| forbidden(error.errno))
            || cause.downcast_ref::<Errno>().is_some_and(|errno| forbidden(*errno))
            || cause
                .downcast_ref::<io::Error>()
                .is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    });
    (denied && !needed.is_held()).then(|| needed.name())
}

/// Whether nobody reads our output any more.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let kind = cause.downcast_ref::<io::Error>().map(io::Error::kind);
        let kind =
            kind.or(cause.downcast_ref::<serde_json::Error>().and_then(serde_json::Error::io_error_kind));
        kind == Some(io::ErrorKind::BrokenPipe)
    })
}
