//! What a dump holds on this host until its outcome.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use soccr::chain;
use soccr::connection::FourTuple;
use soccr::criu::image::ImageDir;
use soccr::criu::image::side::SideImage;
use soccr::criu::record::{self, NsId, Phase, Recorder, State, Store};
use soccr::criu::stock;
use soccr::criu::tasks::Task;
use soccr::kernel::netns::NetNs;
use soccr::lock::{self, LockName, Method, NetworkLock};
use soccr::repair::Paused;

use super::arrangement::{Arrangement, Namespaces};
use crate::agent::error::AgentError;
use crate::agent::path::Path;
use crate::agent::queued::{Putter, Queued};
use crate::fault;

/// The sockets, the locks, and the record that tells of them. It is given up by [`let_live`](Self::let_live) when the
/// tasks run on, by [`leave`](Self::leave) when they are dead; either gives the tasks back.
#[derive(Debug)]
pub struct Held {
    /// Where all is saved.
    images: ImageDir,
    /// The tasks, the root first.
    pub tasks: Vec<Task>,
    /// Their network namespaces, the root's first.
    pub namespaces: Vec<NetNs>,
    /// The network namespace of criu.
    pub criu_ns: NetNs,
    /// The sockets whose connections are saved.
    pub sockets: Vec<(OwnedFd, FourTuple)>,
    /// Those that nobody had accepted, which are in no task, as they stood in their queues.
    pub queued: Vec<Queued>,
    /// What keeps the connections still.
    pub locks: HashMap<NetNs, NetworkLock>,
    /// The same on the way to namespaces other than criu's.
    pub path: Path,
    /// Who can undo all this if we cannot.
    pub recorder: Recorder,
}

impl Held {
    /// Nothing is held yet.
    pub fn nothing(
        images: &ImageDir,
        recorder: Recorder,
        criu: &Task,
        lock: &LockName,
    ) -> Result<Self, AgentError> {
        let images = ImageDir::duplicate(images.as_fd())?;
        let (tasks, namespaces, sockets, queued) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let criu_ns = NetNs::of_task(criu.pid.cast_unsigned())?;
        let path = Path::new(&criu_ns, lock);
        let locks = HashMap::new();
        Ok(Self { images, tasks, namespaces, criu_ns, sockets, queued, locks, path, recorder })
    }

    /// Criu's network namespace, and the root's.
    pub fn tree(&self) -> Namespaces<'_> {
        let own = self.namespaces.first().filter(|root| **root != self.criu_ns);
        Namespaces { criu: &self.criu_ns, own }
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

    /// Writes what CRIU's images have no field for.
    pub fn write_side_image(&self, images: &ImageDir, lock: &LockName) -> Result<(), AgentError> {
        let translations = self.path.translations().to_vec();
        let accepted = self.queued.iter().map(|queued| queued.accepted).collect();
        Ok(SideImage { id: lock.id().to_owned(), translations, accepted }.write(images)?)
    }

    /// The record follows. What it told before is enough to find and undo all, so this may fail.
    pub fn note(&mut self, phase: Phase) {
        if let Err(error) = self.recorder.enter(phase) {
            log::error!("{}", chain(&error));
        }
    }

    /// The tasks run on: nothing was changed in them, so the locks are all there is to undo, CRIU's own included. CRIU
    /// removes that itself, unless it was killed, or fails after it has locked.
    pub fn let_live(mut self) -> Vec<Task> {
        self.put_back_queued();
        let unlocked = self.unlock() & self.remove_criu_locks();
        self.end_record(unlocked)
    }

    /// CRIU carries the connections itself, and needs its own lock for that.
    pub fn stand_aside(mut self) -> Vec<Task> {
        self.put_back_queued();
        let unlocked = self.unlock();
        self.end_record(unlocked)
    }

    /// Behind the locks the accept queues become what they were.
    fn put_back_queued(&mut self) {
        Putter::put_all(std::mem::take(&mut self.queued), &self.images);
    }

    /// Whether all our locks are gone.
    fn unlock(&mut self) -> bool {
        let mut unlocked = true;
        if let Err(error) = self.path.unlock() {
            log::error!("the connections stay locked on their way: {}", chain(&error));
            unlocked = false;
        }
        for (ns, lock) in self.locks.drain() {
            if let Err(error) = lock.unlock() {
                log::error!("{ns}: the connections stay locked: {}", chain(&error));
                unlocked = false;
            }
        }
        unlocked
    }

    /// Whether CRIU's own locks are gone.
    fn remove_criu_locks(&self) -> bool {
        let mut removed = true;
        for ns in self.namespaces.iter().filter(|ns| **ns != self.criu_ns && !self.is_anothers(ns)) {
            match stock::remove_namespace_locks(ns) {
                Ok(locks) => {
                    locks.iter().for_each(|lock| log::warn!("{ns}: removed CRIU's own lock, {lock}"))
                }
                Err(error) => {
                    log::error!("{ns}: CRIU's own lock stays: {}", chain(&error));
                    removed = false;
                }
            }
        }
        removed
    }

    /// Containers can share a namespace: whether another dump or restore is at work there, or waits.
    fn is_anothers(&self, ns: &NetNs) -> bool {
        let listed = Store::open().ok().flatten().and_then(|store| store.list().ok()).unwrap_or_default();
        let mut others = listed.into_iter().filter_map(|listed| listed.record.ok());
        others.any(|other| {
            other.id != self.recorder.record().id
                && other.criu_locks.contains(&NsId::from(ns))
                && other.state() != State::Orphaned
        })
    }

    fn end_record(mut self, undone: bool) -> Vec<Task> {
        if undone {
            self.forget_record();
        }
        self.tasks
    }

    /// The tasks are dead: the connections leave this host without a word, and the locks become what was arranged.
    pub fn leave(mut self, arrangement: Arrangement) -> Vec<Task> {
        self.close_silently();
        self.path.keep();
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
        if let Some((ns, name)) = arrangement.extra_table()
            && let Err(error) = lock::remove(ns, Method::Nftables, name)
        {
            log::error!("{ns}: CRIU's table inet {name} stays: {}", chain(&error));
        }
        // A namespace that nobody but the tasks had is gone with them, and CRIU's lock with it: if we do not hold it.
        drop(arrangement);
        self.namespaces.clear();
        self.note(Phase::Dumped);
        let record = self.recorder.record();
        if record.locks.is_empty() && record::is_undone(record) {
            self.forget_record();
        }
        self.tasks
    }

    /// Ours are the last descriptors of the sockets: in repair mode a socket is closed without a word to the peer.
    fn close_silently(&mut self) {
        let _ = fault::point("dump.dead");
        self.queued.clear(); // they are in repair mode already
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
