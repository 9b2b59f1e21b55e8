//! What a dump holds on this host until its outcome.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use soccr::chain;
use soccr::connection::FourTuple;
use soccr::criu::record::{Phase, Recorder};
use soccr::criu::tasks::Task;
use soccr::kernel::netns::NetNs;
use soccr::lock::{self, Method, NetworkLock};
use soccr::repair::Paused;

use super::arrangement::Arrangement;
use crate::agent::error::AgentError;
use crate::fault;

/// The sockets, the locks, and the record that tells of them. It is given up by [`let_live`](Self::let_live) when the
/// tasks run on, by [`leave`](Self::leave) when they are dead; either gives the tasks back.
#[derive(Debug)]
pub struct Held {
    /// The tasks, the root first.
    pub tasks: Vec<Task>,
    /// Their network namespaces, the root's first.
    pub namespaces: Vec<NetNs>,
    /// The sockets whose connections are saved.
    pub sockets: Vec<(OwnedFd, FourTuple)>,
    /// What keeps the connections still.
    pub locks: HashMap<NetNs, NetworkLock>,
    /// Who can undo all this if we cannot.
    pub recorder: Recorder,
}

impl Held {
    /// Nothing is held yet.
    pub fn nothing(recorder: Recorder) -> Self {
        let (tasks, namespaces, sockets) = (Vec::new(), Vec::new(), Vec::new());
        Self { tasks, namespaces, sockets, locks: HashMap::new(), recorder }
    }

    /// One more task, and the namespace that it lives in.
    pub fn add_task(&mut self, pid: i32) -> Result<(), AgentError> {
        self.tasks.push(Task::open(pid).map_err(|source| AgentError::Task { pid, source })?);
        let ns = NetNs::of_task(pid.cast_unsigned())?;
        if !self.namespaces.contains(&ns) {
            self.namespaces.push(ns);
        }
        Ok(())
    }

    /// The record follows. What it told before is enough to find and undo all, so this may fail.
    pub fn note(&mut self, phase: Phase) {
        if let Err(error) = self.recorder.enter(phase) {
            log::error!("{}", chain(&error));
        }
    }

    /// The tasks run on: nothing was changed in them, so the lock is all there is to undo.
    pub fn let_live(mut self) -> Vec<Task> {
        let mut unlocked = true;
        for (ns, lock) in self.locks.drain() {
            if let Err(error) = lock.unlock() {
                log::error!("{ns}: the connections stay locked: {}", chain(&error));
                unlocked = false;
            }
        }
        if unlocked {
            self.forget_record();
        }
        self.tasks
    }

    /// The tasks run on although criu was killed or has failed, and it may have left its own lock.
    pub fn let_live_after_failure(self) -> Vec<Task> {
        self.let_live()
    }

    /// The tasks are dead: the connections leave this host without a word, and the locks become what was arranged.
    pub fn leave(mut self, arrangement: &Arrangement) -> Vec<Task> {
        self.close_silently();
        for (ns, lock) in std::mem::take(&mut self.locks) {
            if arrangement.ours_stays(&ns) {
                lock.keep();
                continue;
            }
            match lock.unlock() {
                Ok(_) => self.recorder.forget_locks_in(&ns),
                Err(error) => log::error!("{ns}: our lock stays beside CRIU's: {}", chain(&error)),
            }
        }
        if self.recorder.record().locks.is_empty() {
            self.forget_record();
        } else {
            self.note(Phase::Dumped);
        }
        if let Some((ns, name)) = arrangement.extra_table()
            && let Err(error) = lock::remove(ns, Method::Nftables, name)
        {
            log::error!("{ns}: CRIU's table inet {name} stays: {}", chain(&error));
        }
        self.tasks
    }

    /// Ours are the last descriptors of the sockets: in repair mode a socket is closed without a word to the peer.
    fn close_silently(&mut self) {
        let _ = fault::point("dump.dead");
        for (socket, tuple) in self.sockets.drain(..) {
            let _ = fault::point("dump.closing");
            match Paused::pause(socket.as_fd()) {
                Ok(paused) => drop(paused.release()),
                Err(error) => log::error!("{tuple}: its peer hears that it is closed: {}", chain(&error)),
            }
        }
        let _ = fault::point("dump.closed");
    }

    fn forget_record(&mut self) {
        if let Err(error) = self.recorder.remove() {
            log::error!("{}", chain(&error));
        }
    }
}
