//! Between a dump and its restore somebody has to hold what peers send: a process that stays for that, the dump's agent, or
//! whoever was told to [hold](super::hold) connections that are about to come here.
//!
//! It holds nothing else: no socket, no folder, no namespace that could go. The restore's agent takes what was held
//! through a socket beside the record, and the keeper ends. It also ends when the lock is gone, whoever removed it, and
//! when it has waited for as long as `SOCCR_HOLD` says. When an address leaves this host, what was held for it
//! [follows](crate::lock::forward).
//!
//! Stock CRIU can restore the images too, and leaves what it does not know of: the lock on the way to a container, and the
//! record. When the dump's lock is gone, or a packet comes from one of the sockets, the keeper looks whether a
//! process on this host has one of the connections again, and removes all that is left. A packet alone, which anybody
//! can forge, removes nothing.
//!
//! It looks for the lock every second. nf_tables could tell (`NFNLGRP_NFTABLES`); but while anybody listens there, in whatever
//! namespace, the kernel writes a message for each element of a set, and every lock on the host takes ten times as long.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::image::side;
use super::record::{self, RecordId, Store};
use crate::chain;
use crate::kernel::netns::NetNs;
use crate::lock::forward::{ForwardError, Forwarder};
use crate::lock::held::{HeldPackets, Holder};
use crate::lock::{self, LockName};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;

/// Neither end waits longer for the other.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often the lock is looked for, and who has the connections.
const LOOK: Duration = Duration::from_secs(1);

/// Holds packets until somebody takes them.
#[derive(Debug)]
pub struct Keeper {
    holder: Holder,
    /// Who follows an address that leaves this host; none where the kernel does not tell.
    forwarder: Option<Forwarder>,
    ns: NetNs,
    /// While one of them is there.
    locks: Vec<LockName>,
    door: Door,
    /// The record of the dump.
    id: RecordId,
}

/// Where the packets are given away.
#[derive(Debug)]
struct Door {
    socket: UnixListener,
    path: PathBuf,
}

impl Drop for Door {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl Keeper {
    /// Keeps what `holder` holds, of the locks with these names in `ns` only, for the restore of the dump `id`; gives it
    /// away at `door`.
    ///
    /// # Errors
    /// The socket cannot be made there.
    pub fn new(
        mut holder: Holder,
        ns: &NetNs,
        locks: Vec<LockName>,
        door: PathBuf,
        id: &RecordId,
    ) -> io::Result<Self> {
        holder.keep_only(ns);
        let _ = fs::remove_file(&door);
        let door = Door { socket: UnixListener::bind(&door)?, path: door };
        door.socket.set_nonblocking(true)?;
        let failed =
            |error: &ForwardError| log::warn!("what is held stays when its address leaves: {}", chain(error));
        let forwarder = Forwarder::new(ns).inspect_err(failed).ok();
        Ok(Self { holder, forwarder, ns: ns.clone(), locks, door, id: id.clone() })
    }

    /// Holds them to the end. The process gets a name of its own.
    pub fn serve(mut self) {
        let _ = prctl::set_name(c"soccr-keeper");
        let end = Instant::now() + self.holder.patience;
        let (mut heard, mut looked) = (false, None::<Instant>);
        loop {
            if looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
                let is_locked = self.is_locked();
                let is_restored = (!is_locked || heard) && self.end_restored();
                if is_restored || !is_locked || Instant::now() >= end {
                    return;
                }
                (heard, looked) = (false, Some(Instant::now()));
            }
            let mut fds = vec![PollFd::new(self.door.socket.as_fd(), PollFlags::POLLIN)];
            fds.extend(self.holder.fds().map(|log| PollFd::new(log, PollFlags::POLLIN)));
            let forwarder = self.forwarder.as_ref();
            fds.extend(forwarder.iter().flat_map(|it| it.fds()).map(|it| PollFd::new(it, PollFlags::POLLIN)));
            let patience = forwarder.and_then(Forwarder::patience).unwrap_or(LOOK);
            let _ = poll(&mut fds, PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX));
            if let Ok((to, _)) = self.door.socket.accept() {
                return give(to, self.holder);
            }
            self.holder.read();
            heard |= self.holder.heard_socket();
            if let Some(forwarder) = &mut self.forwarder {
                forwarder.forward(&mut self.holder);
            }
        }
    }

    fn end_restored(&self) -> bool {
        matches!(Store::open(), Ok(Some(store)) if record::end_restored(&store, &self.id))
    }

    fn is_locked(&self) -> bool {
        self.locks.iter().any(|name| lock::is_there(&self.ns, name).unwrap_or(true))
    }
}

fn give(mut to: UnixStream, holder: Holder) {
    let _ = to.set_nonblocking(false).and_then(|()| to.set_write_timeout(Some(PATIENCE)));
    let _ = to.write_all(&side::held_to_bytes(&holder.finish()));
}

/// Takes what a keeper behind this door has held, if there is one.
#[must_use]
pub fn take(door: &Path) -> HeldPackets {
    let mut bytes = Vec::new();
    match UnixStream::connect(door) {
        Ok(mut keeper) => {
            let timeout = keeper.set_read_timeout(Some(PATIENCE));
            if let Err(error) = timeout.and_then(|()| keeper.read_to_end(&mut bytes)) {
                log::warn!("what peers have sent since the dump they have to send again: {error}");
            }
        }
        Err(_) => drop(fs::remove_file(door)), // a keeper that was killed has left it
    }
    side::held_from_bytes(&bytes)
}
