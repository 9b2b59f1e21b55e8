//! Sockets of netfilter, which can be slow to close.
//!
//! After a deletion, to close any of them in that namespace waits until the kernel has freed what was deleted: 10 to 15 ms for
//! an RCU grace period, while connections wait for us. So that is left to threads, as long as one of them waits.

use std::cell::Cell;
use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::kernel::SysResult;
use crate::kernel::netlink::NetlinkSocket;
use crate::kernel::netns::{NetNs, NetNsError};

/// How many threads wait for the kernel.
static WAITING: AtomicUsize = AtomicUsize::new(0);

#[derive(Debug)]
pub(super) struct NetfilterSocket {
    /// Only dropping takes it.
    socket: Option<NetlinkSocket>,
    slow_to_close: Cell<bool>,
}

impl NetfilterSocket {
    /// Opens one inside `ns`; the thread stays where it is.
    pub fn open(ns: &NetNs) -> Result<SysResult<Self>, NetNsError> {
        let socket = ns.run(NetlinkSocket::netfilter)?;
        Ok(socket.map(|socket| Self { socket: Some(socket), slow_to_close: Cell::new(false) }))
    }

    /// Something was deleted, or may be when it is closed.
    pub fn is_slow_to_close(&self) {
        self.slow_to_close.set(true);
    }
}

impl Deref for NetfilterSocket {
    type Target = NetlinkSocket;

    fn deref(&self) -> &NetlinkSocket {
        self.socket.as_ref().expect("it is there until the drop")
    }
}

impl Drop for NetfilterSocket {
    fn drop(&mut self) {
        if self.slow_to_close.get() || WAITING.load(Ordering::Relaxed) > 0 {
            WAITING.fetch_add(1, Ordering::Relaxed);
            let closing = Closing(self.socket.take());
            // Without a thread it is closed here.
            let _ = thread::Builder::new().name("soccr-nft-close".into()).spawn(move || drop(closing));
        }
    }
}

struct Closing(Option<NetlinkSocket>);

impl Drop for Closing {
    fn drop(&mut self) {
        drop(self.0.take());
        WAITING.fetch_sub(1, Ordering::Relaxed);
    }
}
