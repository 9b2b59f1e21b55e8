//! What stands behind a handle: a paused socket, and the memory that goes in and out with it.

use std::os::fd::BorrowedFd;

use engine::checkpoint::{QueueError, SaveError, SavedQueue};
use engine::connection::{ControlBlock, FourTuple};
use engine::forge::Forge;
use engine::kernel::{SysError, addr, tcp::Queue};
use engine::lock::Method;
use engine::repair::{Paused, Probe};
use libc::{c_char, c_int};
use nix::errno::Errno;

use crate::address::{self, libsoccr_addr};
use crate::boundary::report;
use crate::data::libsoccr_sk_data;
use crate::memory::{Room, Slot, allocated};

const TCP_RECV_QUEUE: c_int = Queue::Receive as c_int;
const TCP_SEND_QUEUE: c_int = Queue::Send as c_int;

/// A socket in repair mode, together with what was saved from it or set for its restore.
#[allow(non_camel_case_types)]
pub struct libsoccr_sk {
    fd: BorrowedFd<'static>,
    paused: Paused<BorrowedFd<'static>>,
    recv: Slot<c_char>,
    send: Slot<c_char>,
    source: Slot<libsoccr_addr>,
    destination: Slot<libsoccr_addr>,
}

/// Where a save failed: the numbers that `libsoccr_save` returns.
#[derive(Clone, Copy, Debug)]
#[repr(i32)]
pub enum SaveFailure {
    Arguments = -1,
    State = -2,
    Options = -3,
    Window = -4,
    ReceiveQueue = -5,
    SendQueue = -6,
}

/// Why nothing was restored, apart from what the engine says.
#[derive(Clone, Copy, Debug, thiserror::Error)]
enum Unready {
    #[error("the {0} address is not set, or neither AF_INET nor AF_INET6")]
    Address(&'static str),
    #[error("the {0} queue has {1} bytes by the data, but none were set")]
    Queue(&'static str, u32),
}

impl libsoccr_sk {
    /// Puts the socket into repair mode.
    pub fn pause(fd: c_int) -> Option<Box<Self>> {
        if fd < 0 {
            report("cannot pause", &SysError { call: "use the descriptor", errno: Errno::EBADF });
            return None;
        }
        // SAFETY: not -1; the contract has the caller keep it open as long as the handle.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let paused = Paused::pause_only(fd).inspect_err(|error| report("cannot pause", error)).ok()?;
        Some(Box::new(Self {
            fd,
            paused,
            recv: Slot::EMPTY,
            send: Slot::EMPTY,
            source: Slot::EMPTY,
            destination: Slot::EMPTY,
        }))
    }

    /// Leaves repair mode.
    pub fn resume(self) {
        if let Err(error) = self.paused.resume(Probe::Send) {
            report("cannot resume", &error);
        }
    }

    /// Leaves the socket in repair mode.
    pub fn release(self) {
        self.paused.release();
    }

    /// Reads the connection; the queues' bytes replace those that the handle has.
    pub fn save(&mut self) -> Result<libsoccr_sk_data, SaveFailure> {
        let (mut recv, mut send) = (Slot::EMPTY, Slot::EMPTY);
        let saved = self.paused.save_with(|queue| {
            let slot = if queue.which() == Queue::Send { &mut send } else { &mut recv };
            *slot = copy(queue)?;
            Ok(())
        });
        (self.recv, self.send) = (recv, send);
        let tcp = saved.map_err(|error| {
            (self.recv, self.send) = (Slot::EMPTY, Slot::EMPTY);
            report("cannot save", &error);
            failure(&error)
        })?;
        log::debug!(
            "saved {}: {} bytes in the receive queue, {} in the send queue, {} of them unsent",
            tcp.state,
            tcp.recv_len,
            tcp.send_len,
            tcp.unsent_len
        );
        Ok((&tcp).into())
    }

    /// The slot of `TCP_RECV_QUEUE` or `TCP_SEND_QUEUE`.
    pub fn queue(&mut self, id: c_int) -> Option<&mut Slot<c_char>> {
        match id {
            TCP_RECV_QUEUE => Some(&mut self.recv),
            TCP_SEND_QUEUE => Some(&mut self.send),
            _ => None,
        }
    }

    /// The slot of one end's address.
    pub fn end(&mut self, source: bool) -> &mut Slot<libsoccr_addr> {
        if source { &mut self.source } else { &mut self.destination }
    }

    /// One end's address, the set one or the socket's own; NULL if it has none. With `exclusive` a copy, so that
    /// a restore still has the address.
    pub fn address(&mut self, source: bool, exclusive: bool) -> *mut libsoccr_addr {
        if !exclusive && self.end(source).as_ptr().is_some() {
            return self.end(source).get(false);
        }
        let Some(mut slot) = self.current(source).map(libsoccr_addr::from).and_then(allocated) else {
            return std::ptr::null_mut();
        };
        if exclusive {
            return slot.get(true);
        }
        *self.end(source) = slot;
        self.end(source).get(false)
    }

    fn current(&mut self, source: bool) -> Option<std::net::SocketAddr> {
        if let Some(set) = self.end(source).as_ptr() {
            // SAFETY: the contract: a set address lives until libsoccr_restore() is through.
            return unsafe { address::read(set) };
        }
        let own = if source { addr::local(self.fd) } else { addr::remote(self.fd) };
        own.inspect_err(|error| report("cannot get an address", error)).ok()
    }

    /// Builds the connection that `data` and what was set describe; says whether it could.
    ///
    /// # Safety
    /// What was set is alive, and the queues' bytes are as many as `data` says.
    pub unsafe fn restore(&self, data: &libsoccr_sk_data) -> bool {
        // SAFETY: the caller's promise.
        match unsafe { self.try_restore(data) } {
            Ok(()) => true,
            Err(error) => {
                report("cannot restore", error.as_ref());
                false
            }
        }
    }

    unsafe fn try_restore(&self, data: &libsoccr_sk_data) -> Result<(), Box<dyn std::error::Error>> {
        let tcp = ControlBlock::try_from(data)?;
        // SAFETY: the caller's promise, for the addresses and the bytes.
        let (tuple, recv, send) = unsafe {
            (
                self.tuple()?,
                bytes(&self.recv, "receive", tcp.recv_len)?,
                bytes(&self.send, "send", tcp.send_len)?,
            )
        };
        log::debug!("restoring {tuple} in {}", tcp.state);
        // Whether a lock keeps SYN segments from the peer is not ours to know.
        let forge = Forge::behind(Method::Skip);
        let restored = self.paused.restore(&tuple, &tcp, recv, send, &forge);
        // Also after a failure: nothing of ours may stay in the firewall.
        let finished = forge.finish();
        restored?;
        Ok(finished?)
    }

    /// # Safety
    /// Addresses that were set are alive.
    unsafe fn tuple(&self) -> Result<FourTuple, Unready> {
        let end = |slot: &Slot<libsoccr_addr>, name| {
            // SAFETY: the caller's promise.
            slot.as_ptr().and_then(|set| unsafe { address::read(set) }).ok_or(Unready::Address(name))
        };
        Ok(FourTuple { local: end(&self.source, "source")?, remote: end(&self.destination, "destination")? })
    }
}

/// The bytes of a queue in memory of C's allocator.
fn copy(queue: &SavedQueue<'_>) -> Result<Slot<c_char>, QueueError> {
    // One byte more than the queue has, by which the engine sees that there is none.
    let mut room = Room::new(queue.length() + 1).ok_or(QueueError::Memory(queue.length()))?;
    queue.copy_to(room.bytes())?;
    Ok(room.into_slot())
}

/// The bytes that were set for a queue.
///
/// # Safety
/// They are alive and `len` of them.
unsafe fn bytes<'a>(slot: &'a Slot<c_char>, name: &'static str, len: u32) -> Result<&'a [u8], Unready> {
    match slot.as_ptr() {
        _ if len == 0 => Ok(&[]),
        // SAFETY: the caller's promise.
        Some(ptr) => Ok(unsafe { std::slice::from_raw_parts(ptr.as_ptr().cast(), len as usize) }),
        None => Err(Unready::Queue(name, len)),
    }
}

fn failure(error: &SaveError) -> SaveFailure {
    match error {
        SaveError::Options { .. } => SaveFailure::Options,
        SaveError::Window { .. } => SaveFailure::Window,
        SaveError::ReceiveQueue { .. } => SaveFailure::ReceiveQueue,
        SaveError::SendQueue { .. } => SaveFailure::SendQueue,
        _ => SaveFailure::State,
    }
}
