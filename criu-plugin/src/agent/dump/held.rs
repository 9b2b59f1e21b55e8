//! What a dump holds on this host until its outcome.

use std::collections::HashMap;
use std::os::fd::AsFd;

use soccr::chain;
use soccr::connection::FourTuple;
use soccr::criu::image::ImageDir;
use soccr::criu::image::side::Accepted;
use soccr::criu::keeper::Keeper;
use soccr::criu::record::{self, Phase, Recorder, Store};
use soccr::criu::rules::Action;
use soccr::criu::stock;
use soccr::criu::tasks::{Duplicates, Opened, Slot, Task};
use soccr::kernel::netns::NetNs;
use soccr::lock::held::Holder;
use soccr::lock::{self, Listener, LockName, LockOptions, Method, NetworkLock};
use soccr::repair::Paused;

use super::arrangement::{Arrangement, Namespaces};
use super::queues::Request;
use crate::agent::error::AgentError;
use crate::agent::path::Path;
use crate::agent::profile::Profile;
use crate::agent::queued::{self, Putter, Queued, Waiting};
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
    pub sockets: Vec<(Slot, FourTuple)>,
    /// Our duplicates of all that were found.
    pub duplicates: Duplicates,
    /// Those that nobody had accepted, which are in no task, as they stood in their queues.
    pub queued: Vec<Queued>,
    /// The sockets of connections that are not carried, and whose peers hear so.
    pub reset: Vec<(Slot, FourTuple)>,
    /// Handshakes that were not over.
    pub requests: Vec<Request>,
    /// What keeps the connections still.
    pub locks: HashMap<NetNs, NetworkLock>,
    /// The same on the way to namespaces other than criu's.
    pub path: Path,
    /// What the locks keep from the sockets.
    pub holder: Holder,
    /// Where the tree listens.
    pub listeners: HashMap<NetNs, Vec<Listener>>,
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
        let criu_ns = NetNs::of_task(criu.pid.cast_unsigned())?;
        Ok(Self {
            images: ImageDir::duplicate(images.as_fd())?,
            tasks: Vec::new(),
            namespaces: Vec::new(),
            sockets: Vec::new(),
            duplicates: Duplicates::default(),
            queued: Vec::new(),
            reset: Vec::new(),
            requests: Vec::new(),
            locks: HashMap::new(),
            path: Path::new(&criu_ns, lock),
            holder: Holder::from_env()?,
            listeners: HashMap::new(),
            recorder,
            criu_ns,
        })
    }

    /// Criu's network namespace, and the root's.
    pub fn tree(&self) -> Namespaces<'_> {
        let own = self.namespaces.first().filter(|root| **root != self.criu_ns);
        Namespaces { criu: &self.criu_ns, own }
    }

    /// The namespaces in which the tree listens.
    pub fn listening(&self) -> Vec<NetNs> {
        let listening = self.listeners.iter().filter(|(_, listeners)| !listeners.is_empty());
        listening.map(|(ns, _)| ns.clone()).collect()
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

    /// An agent that died has locked all that the record tells: also where the tree only listens.
    pub fn adopt_locks(&mut self, name: &LockName, options: &LockOptions) {
        let there = record::all_namespaces();
        let ours = self.recorder.record().locks.iter().filter(|lock| lock.name == *name);
        for ns in ours.filter_map(|lock| there.get(lock.ns)) {
            self.locks.entry(ns.clone()).or_insert_with(|| NetworkLock::adopt(ns, name, options));
        }
    }

    /// What was taken out of accept queues and is carried.
    pub fn accepted(&self) -> Vec<Accepted> {
        let carried = self.queued.iter().filter(|queued| queued.action == Action::Keep);
        carried.map(|queued| queued.accepted).collect()
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
        let (waiting, unfit) = self.put_back_queued();
        let unlocked = self.unlock() & self.remove_criu_locks(log::Level::Warn);
        unfit.into_iter().for_each(Queued::reset);
        self.release(&waiting);
        self.end_record(unlocked)
    }

    /// CRIU carries the connections itself, and needs its own lock for that. Those that nobody has accepted it would have
    /// refused, had we not emptied their queues; it is too late to fail the dump for them.
    pub fn stand_aside(mut self) -> Vec<Task> {
        for Queued { accepted, .. } in &self.queued {
            log::error!(
                "{}, which nobody has accepted, is not dumped, and ends with its listener: tcp-close (soccr enable) has the \
                 plugin carry it",
                accepted.tuple
            );
        }
        let (_, unfit) = self.put_back_queued();
        let unlocked = self.unlock();
        unfit.into_iter().for_each(Queued::reset);
        self.end_record(unlocked)
    }

    /// Behind the locks the accept queues become what they were. Also gives what cannot be put back, for its peer to hear of
    /// it when nothing is locked any more.
    fn put_back_queued(&mut self) -> (Vec<Waiting>, Vec<Queued>) {
        Putter::put_all(std::mem::take(&mut self.queued), &self.images)
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

    /// The sockets get what was kept from them, and the root's listeners those who would connect.
    fn release(&mut self, waiting: &[Waiting]) {
        let mut held = std::mem::take(&mut self.holder).finish();
        if let Some(root) = self.namespaces.first() {
            held.let_in(root);
        }
        let others = waiting.iter().map(Waiting::end).chain(self.requests.iter().map(Request::target));
        let others: Vec<_> = others.collect();
        let (len, mut opened) = (held.len(), Opened::default());
        let tuples = self.sockets.iter().map(|(_, tuple)| *tuple);
        let mut release = held.release_to(tuples.chain(others.iter().map(|(_, tuple)| *tuple)));
        for (slot, tuple) in self.sockets.iter().filter(|(_, tuple)| release.has(tuple)).collect::<Vec<_>>() {
            match self.duplicates.get(*slot, &mut opened) {
                Ok(socket) => release.bring(socket, *tuple),
                Err(error) => log::debug!("{tuple}: what was held has to be sent again: {error}"),
            }
        }
        others.into_iter().for_each(|(socket, tuple)| release.bring(socket, tuple));
        log::debug!("{len} packets were held, {} brought to their sockets", release.count());
    }

    /// Whether CRIU's own locks are gone.
    fn remove_criu_locks(&self, say: log::Level) -> bool {
        let mut removed = true;
        let store = Store::open().ok().flatten();
        let id = &self.recorder.record().id;
        let is_anothers =
            |ns: &NetNs| store.as_ref().is_some_and(|it| record::another_relies_on_criu(it, id, ns.into()));
        for ns in self.namespaces.iter().filter(|ns| **ns != self.criu_ns && !is_anothers(ns)) {
            match stock::remove_namespace_locks(ns) {
                Ok(locks) => {
                    locks.iter().for_each(|lock| log::log!(say, "{ns}: removed CRIU's own lock, {lock}"))
                }
                Err(error) => {
                    log::error!("{ns}: CRIU's own lock stays: {}", chain(&error));
                    removed = false;
                }
            }
        }
        removed
    }

    fn end_record(mut self, undone: bool) -> Vec<Task> {
        if undone {
            self.forget_record();
        }
        self.tasks
    }

    /// The tasks are dead: the connections leave this host without a word, and the locks become what was arranged. Also
    /// gives who holds what their peers send until the restore, if anybody can.
    pub fn leave(mut self, arrangement: Arrangement) -> (Vec<Task>, Option<Keeper>) {
        self.reset();
        self.close_silently();
        let staying = self.staying_beside_criu(&arrangement);
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
        if arrangement.replaces_criu() && self.remove_criu_locks(log::Level::Debug) {
            self.recorder.forget_criu_locks();
        }
        // A namespace that nobody but the tasks had is gone with them, and CRIU's lock with it: if we do not hold it.
        drop(arrangement);
        self.namespaces.clear();
        self.note(Phase::Dumped);
        if self.recorder.record().locks.is_empty() && self.recorder.is_undone() {
            self.forget_record();
        }
        let keeper = self.keeper(staying);
        (self.tasks, keeper)
    }

    /// Our locks in criu's namespace that wait for the restore. Other namespaces may go with their tasks, and must not be
    /// kept.
    fn staying_beside_criu(&self, arrangement: &Arrangement) -> Vec<LockName> {
        let at_sockets = self.locks.get(&self.criu_ns).filter(|_| arrangement.ours_stays(&self.criu_ns));
        at_sockets.map(NetworkLock::name).into_iter().chain(self.path.locked_by()).cloned().collect()
    }

    fn keeper(&mut self, locks: Vec<LockName>) -> Option<Keeper> {
        let holder = std::mem::take(&mut self.holder);
        let door = self.recorder.held().filter(|_| !locks.is_empty() && holder.listens())?;
        let keeper = Keeper::new(holder, &self.criu_ns, locks, door, &self.recorder.record().id);
        keeper.inspect_err(|error| log::warn!("nobody holds packets until the restore: {error}")).ok()
    }

    /// Their peers hear of the end of those that are not carried.
    fn reset(&mut self) {
        let mut opened = Opened::default();
        for (slot, tuple) in self.reset.drain(..) {
            match self.duplicates.get(slot, &mut opened) {
                Ok(socket) => queued::reset(socket, tuple),
                Err(error) => log::error!("{tuple}: its peer does not hear that it is closed: {error}"),
            }
        }
        self.queued.extract_if(.., |queued| queued.action == Action::Reset).for_each(Queued::reset);
    }

    /// Ours are the last descriptors of the sockets: in repair mode a socket is closed without a word to the peer.
    fn close_silently(&mut self) {
        let _ = fault::point("dump.dead");
        let mut profile = Profile::start("dump");
        self.queued.clear(); // they are in repair mode already
        let mut opened = Opened::default();
        for (slot, tuple) in self.sockets.drain(..) {
            let _ = fault::point("dump.closing");
            let socket = self.duplicates.get(slot, &mut opened).map_err(AgentError::Duplicates);
            match socket.and_then(|socket| Ok(Paused::pause_only(socket)?)) {
                Ok(paused) => drop(paused.release()),
                Err(error) => log::error!("{tuple}: its peer hears that it is closed: {}", chain(&error)),
            }
        }
        drop(opened);
        self.duplicates = Duplicates::default();
        let _ = fault::point("dump.closed");
        profile.lap("close");
    }

    fn forget_record(&mut self) {
        if let Err(error) = self.recorder.remove() {
            log::error!("{}", chain(&error));
        }
    }
}
