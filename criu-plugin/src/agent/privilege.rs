//! What the agent may do: only what its work needs, whatever criu may.

use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet};
use nix::errno::Errno;

/// The capabilities that the agent keeps, each with its reason. All others are dropped for good.
pub const KEPT: [Capability; 8] = [
    // TCP_REPAIR, nf_tables, SO_SNDBUFFORCE, SO_RCVBUFFORCE, SO_MARK, SOCK_DESTROY.
    Capability::CAP_NET_ADMIN,
    // Raw sockets for the forged segments; a packet socket for those that follow their address.
    Capability::CAP_NET_RAW,
    // Restored sockets bind to the ports that they had, also below 1024.
    Capability::CAP_NET_BIND_SERVICE,
    // Entering the network namespaces of the sockets; BPF programs (ECN, accept queues).
    Capability::CAP_SYS_ADMIN,
    // Descriptors of the tasks: pidfd_getfd() and /proc/PID/fd.
    Capability::CAP_SYS_PTRACE,
    // The image folder may be another user's.
    Capability::CAP_DAC_OVERRIDE,
    // Images for tasks in a user namespace belong to its root; replaced files keep owner and mode.
    Capability::CAP_CHOWN,
    Capability::CAP_FOWNER,
];

/// Drops all capabilities but these, for good: no program that is started gets more. Capabilities that criu itself does
/// not have are no loss.
///
/// # Errors
/// The kernel's answer.
pub fn drop_others() -> Result<(), CapsError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = KEPT.into_iter().filter(|capability| permitted.contains(capability)).collect();
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    // Without that root has them all again after an exec.
    nix::sys::prctl::set_no_new_privs().map_err(|errno| CapsError::from(errno.to_string()))
}

/// While connections are read, no program may take the agent's processor: should criu die then, the tasks run at once, and a
/// socket that is in repair mode just then must be out of it before its task comes to it. Where that is not allowed
/// the agent is as prompt as any other process.
pub fn be_prompt() {
    let _ = set_policy(libc::SCHED_FIFO, 1);
}

/// Ends that. The flag that keeps children from being prompt stays: it may not be cleared without CAP_SYS_NICE.
pub fn be_ordinary() {
    if let Err(error) = set_policy(libc::SCHED_OTHER, 0) {
        log::warn!("the agent stays a real-time process: {error}");
    }
}

#[allow(unsafe_code)]
fn set_policy(policy: libc::c_int, priority: libc::c_int) -> Result<(), Errno> {
    let parameters = libc::sched_param { sched_priority: priority };
    // SAFETY: reads the live structure.
    let ret =
        unsafe { libc::sched_setscheduler(0, policy | libc::SCHED_RESET_ON_FORK, &raw const parameters) };
    Errno::result(ret).map(drop)
}
