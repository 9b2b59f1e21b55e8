//! The first phase of a dump: the connections of frozen tasks are found, locked and saved.

use std::collections::HashMap;
use std::fmt::Display;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use soccr::accept_queue::{self, Fallback};
use soccr::chain;
use soccr::connection::{ControlBlock, FourTuple, Queues};
use soccr::criu::image::ImageDir;
use soccr::criu::image::external::ExternalImage;
use soccr::criu::image::inventory::{self, Inventory};
use soccr::criu::image::side::{self, SideImage, Sockets, TreeListener};
use soccr::criu::record::{ConnectionRecord, LockRecord, NsId, Phase, Recorder, Store};
use soccr::criu::rules::{Action, Policy, Rules};
use soccr::criu::tasks::{self, FindError, Finder, Found, FoundConnection, Opened, OwnerMap, Place, Task};
use soccr::kernel::netns::NetNs;
use soccr::kernel::options::{Beside, Reader};
use soccr::kernel::tcp;
use soccr::lock::{LockName, LockOptions, Method, NetworkLock};
use soccr::repair::{Paused, Probe};

use super::extras::Extras;
use super::held::Held;
use super::queues::{self, Listener, Request};
use super::writer::{self, Image};
use crate::agent::error::AgentError;
use crate::agent::path::Path;
use crate::agent::profile::Profile;
use crate::agent::queued::Queued;
use crate::agent::{clean, listeners, privilege};
use crate::fault;

/// A dump whose hooks are still to come.
#[derive(Debug)]
pub struct Saving<'a> {
    criu: &'a Task,
    images: ImageDir,
    lock_name: LockName,
    options: LockOptions,
    policy: Policy,
    /// For connections in accept queues.
    fallback: Fallback,
    finder: Finder,
    extras: Extras,
    /// What is held until the outcome.
    pub held: Held,
}

/// A dump of which all is saved.
#[derive(Debug)]
pub struct Saved {
    /// Where.
    pub images: ImageDir,
    /// The locks' name.
    pub lock_name: LockName,
    /// What is held until the outcome.
    pub held: Held,
    policy: Policy,
    /// What CRIU's images do not tell of sockets.
    pub sockets: Sockets,
}

impl<'a> Saving<'a> {
    /// A new dump, which has changed nothing yet.
    pub fn begin(images: ImageDir, criu: &'a Task) -> Result<Self, AgentError> {
        fault::point("dump.init")?;
        let lock_name = LockName::criu(&format!("soccr-{}", random_id()?))?;
        let recorder = Recorder::new(lock_name.id(), Phase::Saving, images.as_fd(), criu.pid)?;
        let options = LockOptions::from_env()?;
        let policy = Rules::read()?.policy;
        let finder = Finder::default();
        let (held, fallback) = (Held::nothing(&images, recorder, criu, &lock_name)?, Fallback::from_env()?);
        let extras = Extras::default();
        Ok(Self { criu, images, lock_name, options, policy, fallback, finder, extras, held })
    }

    /// No further hook comes.
    pub fn into_saved(self) -> Saved {
        let Self { images, lock_name, policy, held, mut extras, .. } = self;
        extras.read_all(&held.duplicates);
        let sockets = extras.into_sockets(log::Level::Error);
        Saved { images, lock_name, held, policy, sockets }
    }

    /// No further hook comes, and nobody needs the images.
    pub fn into_held(self) -> Held {
        self.held
    }

    /// Whether there is something to do while nobody asks.
    pub fn is_behind(&self) -> bool {
        self.extras.is_behind()
    }

    /// Does some of it.
    pub fn read_ahead(&mut self) {
        let _ = fault::point("dump.extras"); // nobody asks, so nobody hears of an error
        self.extras.read_some(&self.held.duplicates);
    }

    /// CHECKPOINT_DEVICES: saves the connections of this task and its descendants.
    pub fn checkpoint(&mut self, pid: i32) -> Result<(), AgentError> {
        let result = self.checkpoint_tree(pid);
        privilege::be_ordinary();
        result
    }

    fn checkpoint_tree(&mut self, pid: i32) -> Result<(), AgentError> {
        if self.held.tasks.iter().any(|task| task.pid == pid) {
            return Ok(()); // came with the tree
        }
        fault::actors(None, Some(pid));
        fault::point("dump.asked")?;
        let mut profile = Profile::start("dump");
        let first = self.held.tasks.len();
        self.add_tree(pid)?;
        fault::point("dump.tree")?;
        let tasks = self.held.tasks.get(first..).unwrap_or_default();
        let Found { connections: found, unconnected } =
            self.finder.of_tasks(tasks, &mut self.held.duplicates)?;
        let listeners = queues::listeners(&unconnected)?;
        self.extras.add_unconnected(unconnected);
        self.extras.set_owners(OwnerMap::of(pid).map_err(|error| FindError::Proc(pid, error))?);
        fault::point("dump.found")?;
        found.iter().try_for_each(|connection| self.refuse(connection.tuple, &connection.place))?;
        let found = set_apart(found, &self.policy, &mut self.held);
        self.add_to_path(&ends(&found));
        self.find_listeners(&found);
        profile.lap("find");
        self.record(&found)?;
        profile.lap("record");
        fault::point("dump.recorded")?;
        self.lock(&ends(&found))?;
        fault::point("dump.locked")?;
        profile.lap("lock");
        self.hold_requests(&listeners)?;
        let queued = self.empty_queues(&listeners)?;
        profile.lap("empty accept queues");
        let count = found.len();
        self.save(found)?;
        self.save_queued(queued)?;
        self.extras.try_two(&self.held.duplicates)?;
        profile.lap("save");
        fault::point("dump.saved")?;
        log::info!("{count} TCP connections saved, locked by the table inet {}", self.lock_name);
        Ok(())
    }

    /// Fails where the policy says that a dump does.
    fn refuse(&self, tuple: FourTuple, place: &dyn Display) -> Result<(), AgentError> {
        match self.policy.of(&tuple) {
            (Action::Refuse, rule) => Err(AgentError::Refused { tuple, rule: format!("{rule} ({place})") }),
            _ => Ok(()),
        }
    }

    /// Of each namespace once.
    fn find_listeners(&mut self, found: &[FoundConnection]) {
        let Held { namespaces, listeners, holder, criu_ns, path, .. } = &mut self.held;
        if self.options.method != Method::Nftables || holder.newcomers.is_zero() {
            return;
        }
        for ns in namespaces.iter().chain(found.iter().map(|connection| &connection.ns)) {
            if !listeners.contains_key(ns) {
                let there = listeners::of_tree(ns, |inode| self.finder.knows(inode));
                if ns != criu_ns {
                    path.add_listeners(ns, &there);
                }
                listeners.insert(ns.clone(), there);
            }
        }
    }

    fn add_tree(&mut self, pid: i32) -> Result<(), AgentError> {
        let mut pids = tasks::frozen_tree(pid, self.criu.pid).map_err(AgentError::Tree)?;
        pids.retain(|pid| self.held.tasks.iter().all(|task| task.pid != *pid));
        if let Some((uid, gid)) = tasks::foreign_root(pid).map_err(|error| FindError::Proc(pid, error))? {
            self.images.give_new_files_to(uid, gid);
        }
        pids.into_iter().try_for_each(|pid| self.held.add_task(pid))
    }

    /// Those whose packets pass through criu's namespace.
    fn add_to_path(&mut self, ends: &[End<'_>]) {
        let elsewhere = ends.iter().filter(|(ns, _)| **ns != self.held.criu_ns);
        self.held.path.add(elsewhere.map(|(_, tuple)| *tuple));
    }

    /// Writes down what is about to be changed on this host, while nothing is.
    fn record(&mut self, found: &[FoundConnection]) -> Result<(), AgentError> {
        let locked_by_criu = self.held.tree().own.cloned();
        let listening = self.held.listening();
        if found.is_empty() && locked_by_criu.is_none() && listening.is_empty() {
            return Ok(());
        }
        self.record_locks(found.iter().map(|connection| &connection.ns).chain(&listening));
        let recorder = &mut self.held.recorder;
        locked_by_criu.iter().for_each(|ns| recorder.add_criu_lock(ns));
        self.held.tasks.iter().for_each(|task| recorder.add_task(task.pid));
        recorder.add_connections(found.iter().map(ConnectionRecord::from));
        recorder.save(Phase::Saving)?;
        Ok(())
    }

    /// The locks that are to be in these namespaces, and on the way.
    fn record_locks<'n>(&mut self, namespaces: impl Iterator<Item = &'n NetNs>) {
        let recorder = &mut self.held.recorder;
        for ns in namespaces.filter(|_| self.options.method != Method::Skip).map(NsId::from) {
            recorder.add_lock(LockRecord { ns, name: self.lock_name.clone(), method: self.options.method });
        }
        self.held.path.record(&self.options).into_iter().for_each(|lock| recorder.add_lock(lock));
        recorder.set_translations(self.held.path.translations());
    }

    /// One transaction per namespace, the one that packets pass through first.
    fn lock(&mut self, ends: &[End<'_>]) -> Result<(), AgentError> {
        let listening = self.held.listening();
        let Held { path, holder, locks, criu_ns, listeners, namespaces, .. } = &mut self.held;
        holder.expect(ends.iter().map(|(_, tuple)| *tuple));
        holder.expect_translated(path.translations());
        path.lock(&holder.options(criu_ns, &self.options), holder.newcomers)?;
        let mut tuples: HashMap<&NetNs, Vec<FourTuple>> = HashMap::new();
        for (ns, tuple) in ends.iter().filter(|(_, tuple)| tuple.local.port() != 0) {
            tuples.entry(ns).or_default().push(*tuple);
        }
        for ns in listening.iter().filter(|ns| !locks.contains_key(ns)) {
            tuples.entry(ns).or_default();
        }
        for (ns, tuples) in tuples {
            match locks.get_mut(ns) {
                Some(lock) => lock.add(&tuples)?,
                None => {
                    let options = holder.options(ns, &self.options);
                    let lock = NetworkLock::lock(ns, &self.lock_name, &tuples, &options)?;
                    let listeners = listeners.get(ns).map(Vec::as_slice).unwrap_or_default();
                    // Whom the others are for is known by their addresses only.
                    let held = namespaces.first() == Some(ns);
                    if held {
                        holder.expect_newcomers(listeners);
                    }
                    listeners::stop_newcomers(&lock, listeners, holder.newcomers, held);
                    locks.insert(ns.clone(), lock);
                }
            }
        }
        Ok(())
    }

    /// Takes what waits in accept queues out of them, where no newcomer can follow any more, and locks it. Each is held from
    /// then on, in repair mode: should anything fail, it can be put back.
    fn empty_queues(&mut self, listeners: &[Listener]) -> Result<Range<usize>, AgentError> {
        let first = self.held.queued.len();
        let mut full = Vec::new();
        for listener in listeners {
            if let Some(queue) = listener.queue(self.fallback)? {
                self.refuse_queued(listener)?;
                self.held.recorder.add_accept_queue(queue);
                full.push(listener);
            }
        }
        if full.is_empty() {
            return Ok(first..first);
        }
        self.held.tasks.iter().for_each(|task| self.held.recorder.add_task(task.pid));
        self.held.recorder.save(Phase::Saving)?;
        let mut result = Ok(());
        for listener in full {
            listener.take_all(&self.policy, |taken| {
                let kept = match taken {
                    Ok(taken) => {
                        self.held.queued.push(taken);
                        fault::point("dump.accepted").map_err(AgentError::from)
                    }
                    Err(error @ AgentError::QueuedState { .. }) if self.fallback == Fallback::Reset => {
                        log::warn!("{}: it is reset", chain(&error));
                        Ok(())
                    }
                    Err(error) => Err(error),
                };
                result = std::mem::replace(&mut result, Ok(())).and(kept);
            });
        }
        let queued = first..self.held.queued.len();
        self.lock_late(&self.held.queued[queued.clone()].iter().map(Queued::end).collect::<Vec<_>>())?;
        fault::point("dump.queue-locked")?;
        result?;
        let mut taken = self.held.queued[queued.clone()].iter().map(|taken| taken.accepted.tuple);
        taken.try_for_each(|tuple| self.refuse(tuple, &UNACCEPTED))?;
        Ok(queued)
    }

    /// Fails for what is not to be carried, or could not be put back, as long as all stands in its queue.
    fn refuse_queued(&self, listener: &Listener) -> Result<(), AgentError> {
        let device = listener.device()?;
        for seen in listener.look()? {
            let tuple = seen.tuple;
            self.refuse(tuple, &UNACCEPTED)?;
            let carried = self.fallback == Fallback::Refuse && self.policy.of(&tuple).0 == Action::Keep;
            if let Some(why) = accept_queue::unfit_in_queue(&seen, device).filter(|_| carried) {
                return Err(AgentError::Unfit { tuple, why });
            }
        }
        Ok(())
    }

    /// What the clients of handshakes that are not over send is held, so that none gets into a queue any more.
    fn hold_requests(&mut self, listeners: &[Listener]) -> Result<(), AgentError> {
        let requests = queues::requests(listeners);
        if requests.is_empty() {
            return Ok(());
        }
        if self.options.method != Method::Nftables || self.held.holder.patience.is_zero() {
            log::warn!(
                "{} handshakes are not over, and their clients may be reset: what they send is held with SOCCR_LOCK=nftables \
                 and SOCCR_HOLD only",
                requests.len()
            );
            return Ok(());
        }
        requests.iter().try_for_each(|it| self.refuse(it.tuple, &"its handshake is not over"))?;
        self.held.tasks.iter().for_each(|task| self.held.recorder.add_task(task.pid));
        self.lock_late(&requests.iter().map(Request::end).collect::<Vec<_>>())?;
        self.held.requests.extend(requests);
        Ok(())
    }

    /// Locks what was found when all else was locked.
    fn lock_late(&mut self, found: &[(NetNs, FourTuple)]) -> Result<(), AgentError> {
        let ends: Vec<End<'_>> = found.iter().map(|(ns, tuple)| (ns, *tuple)).collect();
        self.add_to_path(&ends);
        self.record_locks(ends.iter().map(|(ns, _)| *ns));
        self.held.recorder.save(Phase::Saving)?;
        self.lock(&ends)
    }

    /// Reads and writes what was taken out of accept queues. The images tell of it from now on, should another agent have
    /// to go on.
    fn save_queued(&mut self, queued: Range<usize>) -> Result<(), AgentError> {
        if queued.is_empty() {
            return Ok(());
        }
        let mut queues = Queues::default();
        for queued in self.held.queued[queued].iter_mut().filter(|queued| queued.action == Action::Keep) {
            if self.criu.gone() {
                return Err(AgentError::Protocol("criu is gone"));
            }
            match self.fallback {
                Fallback::Refuse => queued.save(&self.images, &mut queues)?,
                Fallback::Reset => queued.save_or_reset(&self.images, &mut queues),
            }
            fault::point("dump.queue-written")?;
        }
        let (id, accepted) = (self.lock_name.id().to_owned(), self.held.accepted());
        let count = accepted.len();
        SideImage { id, accepted, ..SideImage::default() }.write(&self.images)?;
        log::info!("{count} connections that nobody had accepted saved");
        Ok(())
    }

    fn save(&mut self, found: Vec<FoundConnection>) -> Result<(), AgentError> {
        let Self { criu, images, extras, held, .. } = self;
        let mut opened = Opened::default();
        writer::writing(images, found.len(), |writer| {
            for FoundConnection { socket, inode, tuple, reuse_addr, place, ns, .. } in found {
                // The kernel lets the tasks run as soon as criu is dead: their sockets are theirs then.
                if criu.gone() {
                    return Err(AgentError::Protocol("criu is gone"));
                }
                let mut queues = Queues::default();
                let duplicate = held.duplicates.get(socket, &mut opened).map_err(AgentError::Duplicates)?;
                let tcp = read(duplicate, reuse_addr, place, &mut queues)?;
                fault::point("dump.resumed")?;
                extras.add_connection(inode, ns, (socket, tuple), Some(&tcp.negotiated));
                held.sockets.push((socket, tuple));
                log::trace!(
                    "{tuple} ({place}): {}, {} bytes to read, {} to send",
                    tcp.state,
                    tcp.recv_len,
                    tcp.send_len
                );
                writer.add(Image { ino: inode, tuple, place, tcp, queues })?;
            }
            Ok(())
        })
    }

    /// DUMP_EXT_FILE: a connection that criu hands over as an external file.
    pub fn external(&mut self, id: i32, file: Option<OwnedFd>) -> Result<(), AgentError> {
        let socket = file.ok_or(AgentError::Protocol("no descriptor came along"))?;
        let found = Finder::default().connection(socket, Place::Given, &mut self.held.duplicates)?;
        let found = found.ok_or(AgentError::Protocol("the descriptor is not a TCP connection"))?;
        let known = self.held.sockets.iter().any(|(_, tuple)| *tuple == found.tuple);
        if self.held.tasks.is_empty() {
            // A host without CHECKPOINT_DEVICES: the fate of the socket is that of whoever has it.
            let holders = tasks::holders(u64::from(found.inode)).map_err(AgentError::Tree)?;
            let own = nix::unistd::getpid().as_raw();
            for pid in holders.into_iter().filter(|pid| ![self.criu.pid, own].contains(pid)) {
                let _ = self.held.add_task(pid); // gone meanwhile
            }
        }
        if !known {
            self.record(std::slice::from_ref(&found))?;
            self.lock(&ends(std::slice::from_ref(&found)))?;
        }
        let failed = |source| AgentError::Socket { tuple: found.tuple, pid: 0, source };
        let mut opened = Opened::default();
        let socket = self.held.duplicates.get(found.socket, &mut opened).map_err(failed)?;
        let mut options = Reader::new(&found.ns, Beside::Nobody)?;
        let options = options.read(socket, true).map_err(failed)?;
        let mut queues = Queues::default();
        let tcp = read(socket, found.reuse_addr, found.place, &mut queues)?;
        let image = ExternalImage {
            tuple: found.tuple,
            tcp,
            options,
            shut_rd: false,
            usec_ts_known: tcp::timestamp_tells_unit(socket).map_err(failed)?,
            lock_id: Some(self.lock_name.id().to_owned()),
        };
        image
            .write(&self.images, id.cast_unsigned(), &queues.recv, &queues.send)
            .map_err(|source| AgentError::Image { tuple: found.tuple, place: found.place, source })?;
        if !known {
            self.held.sockets.push((found.socket, found.tuple));
        }
        Ok(())
    }
}

impl Saved {
    /// Handshakes whose last ACK was held meanwhile end at their old listeners, and their connections are saved like those
    /// that nobody had accepted.
    pub fn complete_requests(&mut self) {
        let carried = |request: &mut Request| self.policy.of(&request.tuple).0 == Action::Keep;
        let requests: Vec<Request> = self.held.requests.extract_if(.., carried).collect();
        if requests.is_empty() {
            return;
        }
        let held = self.held.holder.take_for(requests.iter().map(|request| request.tuple));
        if held.release(requests.iter().map(Request::target)) == 0 {
            return;
        }
        let mut listeners: Vec<Listener> = Vec::new();
        for listener in requests.into_iter().flat_map(|request| request.listeners) {
            if listeners.iter().all(|other| other.inode() != listener.inode()) {
                listeners.push(listener);
            }
        }
        let first = self.held.queued.len();
        queues::wait(&listeners);
        listeners.iter().for_each(|listener| self.take_all(listener));
        log::info!("{} handshakes ended meanwhile", self.held.queued.len() - first);
    }

    /// It is too late to fail the dump for any of them.
    fn take_all(&mut self, listener: &Listener) {
        let Self { images, held, policy, .. } = self;
        let mut queues = Queues::default();
        listener.take_all(policy, |taken| match taken {
            Ok(mut taken) => {
                if taken.action == Action::Keep {
                    taken.save_or_reset(images, &mut queues);
                }
                held.queued.push(taken);
            }
            Err(error) => log::error!("a connection that came meanwhile is lost: {}", chain(&error)),
        });
    }

    /// Writes what CRIU's images have no field for.
    pub fn write_side_image(&mut self) -> Result<(), AgentError> {
        let translations = self.held.path.translations().iter().copied().collect();
        let (id, held) = (self.lock_name.id().to_owned(), self.held.holder.held().clone());
        let inventory = self.images.contains(inventory::NAME).then(|| Inventory::read(&self.images));
        let run_id = inventory.transpose()?.and_then(|inventory| inventory.dump_run_id);
        let listeners = self.held.listeners.iter().flat_map(|(ns, listeners)| {
            let place = if *ns == self.held.criu_ns { side::Place::BesideCriu } else { side::Place::Inside };
            listeners.iter().map(move |listener| TreeListener { listener: *listener, place })
        });
        let on_path = self.held.path.listeners.iter();
        let on_path =
            on_path.map(|listener| TreeListener { listener: *listener, place: side::Place::OnPath });
        let listeners = listeners.chain(on_path).collect();
        let (sockets, accepted) = (std::mem::take(&mut self.sockets), self.held.accepted());
        Ok(SideImage { id, run_id, translations, sockets, accepted, held, listeners }.write(&self.images)?)
    }

    /// What an agent that died has left: the record tells what is locked and which the tasks are, and they have the
    /// sockets.
    pub fn take_over(images: ImageDir, criu: &Task) -> Result<Self, AgentError> {
        let gone = || AgentError::Protocol("there is no record of what the dead agent has done");
        let store = Store::open()?.ok_or_else(gone)?;
        let record = clean::of(&store, criu.pid)?.into_iter().next().ok_or_else(gone)?;
        let recorder = Recorder::take_over(&record.id, criu.pid)?.ok_or_else(gone)?;
        let lock_name = LockName::criu(record.id.as_str())?;
        let options = LockOptions::from_env()?;
        let mut held = Held::nothing(&images, recorder, criu, &lock_name)?;
        if record.locks.iter().any(|lock| lock.name == lock_name.on_path()) {
            held.path = Path::adopt(&held.criu_ns, &lock_name, &record.translations, &options);
        }
        for task in record.tasks.iter().filter(|task| task.lives()) {
            held.add_task(task.pid)?;
        }
        held.adopt_locks(&lock_name, &options);
        let Found { connections, unconnected } =
            Finder::default().of_tasks(&held.tasks, &mut held.duplicates)?;
        let side = SideImage::read(&images)?.filter(|side| side.id == lock_name.id());
        let accepted = side.map(|side| side.accepted).unwrap_or_default();
        held.queued = queues::of_images(accepted, queues::listeners(&unconnected)?);
        let mut extras = Extras::default();
        extras.add_unconnected(unconnected);
        if let Some(root) = held.tasks.first() {
            extras.set_owners(OwnerMap::of(root.pid).map_err(|error| FindError::Proc(root.pid, error))?);
        }
        // All is saved: rules that nobody can read any more are no reason to fail.
        let policy = Rules::read().map(|rules| rules.policy);
        let policy = policy.inspect_err(|error| log::error!("{}", chain(error))).unwrap_or_default();
        let connections = set_apart(connections, &policy, &mut held);
        let queued = held.queued.iter().map(Queued::end);
        let ends = queued.chain(connections.iter().map(|it| (it.ns.clone(), it.tuple)));
        let passing: Vec<FourTuple> =
            ends.filter(|(ns, _)| *ns != held.criu_ns).map(|(_, tuple)| tuple).collect();
        held.path.add(passing);
        for FoundConnection { socket, inode, tuple, ns, .. } in connections {
            extras.add_connection(inode, ns, (socket, tuple), None);
            held.sockets.push((socket, tuple));
        }
        extras.read_all(&held.duplicates);
        let sockets = extras.into_sockets(log::Level::Error);
        Ok(Self { images, lock_name, held, policy, sockets })
    }
}

/// The connections that are to be carried; the others end with their tasks.
fn set_apart(mut found: Vec<FoundConnection>, policy: &Policy, held: &mut Held) -> Vec<FoundConnection> {
    let ends_with_task = |connection: &mut FoundConnection| {
        matches!(policy.of(&connection.tuple).0, Action::Close | Action::Reset)
    };
    for FoundConnection { socket, tuple, place, .. } in found.extract_if(.., ends_with_task) {
        let (action, rule) = policy.of(&tuple);
        log::info!("{tuple} ({place}) ends with its task, says {rule}");
        let ends = if action == Action::Reset { &mut held.reset } else { &mut held.sockets };
        ends.push((socket, tuple));
    }
    found
}

/// What the log says of a connection in place of where it is.
const UNACCEPTED: &str = "nobody has accepted it";

/// A connection's namespace and addresses.
type End<'a> = (&'a NetNs, FourTuple);

fn ends(found: &[FoundConnection]) -> Vec<End<'_>> {
    found.iter().map(|connection| (&connection.ns, connection.tuple)).collect()
}

/// Reads the connection and leaves the socket as it was.
fn read(
    socket: BorrowedFd<'_>,
    reuse_addr: bool,
    place: Place,
    queues: &mut Queues,
) -> Result<ControlBlock, AgentError> {
    let mut paused = Paused::pause_only(socket)?;
    paused.set_reuse_addr(reuse_addr);
    fault::point("dump.paused")?;
    let tcp = paused.save_carriable(queues);
    fault::point("dump.read")?;
    paused.resume(Probe::None)?;
    tcp.map_err(|source| AgentError::Save { place, source })
}

/// An id that no other dump has: 12 hexadecimal digits.
fn random_id() -> Result<String, AgentError> {
    use std::io::Read;
    let mut bytes = [0; 6];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(AgentError::Random)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
