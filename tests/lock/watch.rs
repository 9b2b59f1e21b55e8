//! Whoever waits for a lock to go is told.

use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use soccr::lock::{self, NetworkLock, Watch};

use super::net::{OtherNs, tuple_of};
use super::{NFTABLES, in_own_network, name};

#[test]
fn a_lock_that_goes_is_noticed() {
    in_own_network(|| {
        let other = OtherNs::joined();
        let (pair, watch) = (other.connect("10.9.0.2"), Watch::open(&other.ns).unwrap());
        let told = |within_ms: u16| {
            let mut fds = [PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(within_ms)).unwrap() == 1
        };
        assert!(!watch.changed() && !told(0));
        let lock =
            NetworkLock::lock(&other.ns, &name("watched"), &[tuple_of(&pair.server)], &NFTABLES).unwrap();
        assert!(told(5000) && watch.changed());
        assert!(lock::is_there(&other.ns, &name("watched")).unwrap());
        assert!(!watch.changed() && !told(0));
        assert!(lock.unlock().unwrap());
        assert!(told(5000) && watch.changed());
        assert!(!lock::is_there(&other.ns, &name("watched")).unwrap());
    });
}
