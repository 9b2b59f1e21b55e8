//! The first phase of a dump: the connections of frozen tasks are found, locked and saved.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use soccr::accept_queue::Policy;
use soccr::connection::{ControlBlock, FourTuple, Queues};
use soccr::criu::image::ImageDir;
use soccr::criu::image::external::ExternalImage;
use soccr::criu::image::side::SideImage;
use soccr::criu::image::tcp_stream::TcpStreamImage;
use soccr::criu::record::{ConnectionRecord, LockRecord, NsId, Phase, Recorder, Store};
use soccr::criu::tasks::{self, FindError, Finder, Found, FoundConnection, Place, Task};
use soccr::kernel::netns::NetNs;
use soccr::lock::{LockName, LockOptions, Method, NetworkLock};
use soccr::repair::{Paused, Probe};

use super::held::Held;
use super::queues::{self, FullListener};
use crate::agent::error::AgentError;
use crate::agent::path::Path;
use crate::agent::queued::Queued;
use crate::agent::{clean, privilege};
use crate::fault;

/// A dump whose hooks are still to come.
#[derive(Debug)]
pub struct Saving<'a> {
    criu: &'a Task,
    images: ImageDir,
    lock_name: LockName,
    options: LockOptions,
    policy: Policy,
    finder: Finder,
    /// The memory of one connection's queues, used again and again.
    queues: Queues,
    held: Held,
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
}

impl<'a> Saving<'a> {
    /// A new dump, which has changed nothing yet.
    pub fn begin(images: ImageDir, criu: &'a Task) -> Result<Self, AgentError> {
        fault::point("dump.init")?;
        let lock_name = LockName::criu(&format!("soccr-{}", random_id()?))?;
        let recorder = Recorder::new(lock_name.id(), Phase::Saving, images.as_fd(), criu.pid)?;
        let options = LockOptions::from_env()?;
        let (finder, queues) = (Finder::default(), Queues::default());
        let (held, policy) = (Held::nothing(&images, recorder, criu, &lock_name)?, Policy::from_env()?);
        Ok(Self { criu, images, lock_name, options, policy, finder, queues, held })
    }

    /// No further hook comes.
    pub fn into_saved(self) -> Saved {
        let Self { images, lock_name, held, .. } = self;
        Saved { images, lock_name, held }
    }

    /// No further hook comes, and nobody needs the images.
    pub fn into_held(self) -> Held {
        self.held
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
        let first = self.held.tasks.len();
        self.add_tree(pid)?;
        fault::point("dump.tree")?;
        let tasks = self.held.tasks.get(first..).unwrap_or_default();
        let Found { connections: found, unconnected } = self.finder.of_tasks(tasks)?;
        fault::point("dump.found")?;
        let listeners = queues::of(unconnected, self.policy)?;
        self.record(&found, &listeners)?;
        fault::point("dump.recorded")?;
        self.lock(&ends(&found))?;
        fault::point("dump.locked")?;
        let queued = self.empty_queues(&listeners)?;
        let count = found.len();
        for connection in found {
            // The kernel lets the tasks run as soon as criu is dead: their sockets are theirs then.
            if self.criu.gone() {
                return Err(AgentError::Protocol("criu is gone"));
            }
            self.save(connection)?;
        }
        self.save_queued(queued)?;
        fault::point("dump.saved")?;
        log::info!("{count} TCP connections saved, locked by the table inet {}", self.lock_name);
        Ok(())
    }

    fn add_tree(&mut self, pid: i32) -> Result<(), AgentError> {
        let mut pids = tasks::frozen_tree(pid, self.criu.pid).map_err(AgentError::Tree)?;
        pids.retain(|pid| self.held.tasks.iter().all(|task| task.pid != *pid));
        if let Some((uid, gid)) = tasks::foreign_root(pid).map_err(|error| FindError::Proc(pid, error))? {
            self.images.give_new_files_to(uid, gid);
        }
        pids.into_iter().try_for_each(|pid| self.held.add_task(pid))
    }

    /// Writes down what is about to be changed on this host, while nothing is.
    fn record(&mut self, found: &[FoundConnection], listeners: &[FullListener]) -> Result<(), AgentError> {
        let locked_by_criu = self.held.tree().own.cloned();
        if found.is_empty() && listeners.is_empty() && locked_by_criu.is_none() {
            return Ok(());
        }
        self.record_locks(&ends(found));
        let recorder = &mut self.held.recorder;
        locked_by_criu.iter().for_each(|ns| recorder.add_criu_lock(ns));
        listeners.iter().for_each(|listener| recorder.add_accept_queue(listener.queue.clone()));
        self.held.tasks.iter().for_each(|task| recorder.add_task(task.pid));
        recorder.add_connections(found.iter().map(ConnectionRecord::from));
        recorder.save(Phase::Saving)?;
        Ok(())
    }

    /// The locks that these connections are to have, at their sockets and on the way.
    fn record_locks(&mut self, ends: &[End<'_>]) {
        let elsewhere = ends.iter().filter(|(ns, _)| **ns != self.held.criu_ns);
        self.held.path.add(elsewhere.map(|(_, tuple)| *tuple));
        let recorder = &mut self.held.recorder;
        for (ns, _) in ends.iter().filter(|_| self.options.method != Method::Skip) {
            let (ns, name, method) = (NsId::from(*ns), self.lock_name.clone(), self.options.method);
            recorder.add_lock(LockRecord { ns, name, method });
        }
        self.held.path.record(&self.options).into_iter().for_each(|lock| recorder.add_lock(lock));
        recorder.set_translations(self.held.path.translations());
    }

    /// One transaction per namespace, the one that packets pass through first.
    fn lock(&mut self, ends: &[End<'_>]) -> Result<(), AgentError> {
        self.held.path.lock(&self.options)?;
        let mut tuples: HashMap<&NetNs, Vec<FourTuple>> = HashMap::new();
        for (ns, tuple) in ends.iter().filter(|(_, tuple)| tuple.local.port() != 0) {
            tuples.entry(ns).or_default().push(*tuple);
        }
        for (ns, tuples) in tuples {
            match self.held.locks.get_mut(ns) {
                Some(lock) => lock.add(&tuples)?,
                None => {
                    let lock = NetworkLock::lock(ns, &self.lock_name, &tuples, &self.options)?;
                    self.held.locks.insert(ns.clone(), lock);
                }
            }
        }
        Ok(())
    }

    /// Takes what waits in accept queues out of them, and locks it. Each is held from then on, in repair mode: should
    /// anything fail, it can be put back.
    fn empty_queues(&mut self, listeners: &[FullListener]) -> Result<Range<usize>, AgentError> {
        let first = self.held.queued.len();
        for listener in listeners {
            while let Some(taken) = listener.take()? {
                self.held.queued.push(taken);
            }
        }
        let queued = first..self.held.queued.len();
        let taken: Vec<_> = self.held.queued[queued.clone()].iter().map(Queued::end).collect();
        if !taken.is_empty() {
            let ends: Vec<End<'_>> = taken.iter().map(|(ns, tuple)| (ns, *tuple)).collect();
            self.record_locks(&ends);
            self.held.recorder.save(Phase::Saving)?;
            self.lock(&ends)?;
            fault::point("dump.queue-locked")?;
        }
        Ok(queued)
    }

    /// Reads and writes what was taken out of accept queues. The images tell of it from now on, should another agent have
    /// to go on.
    fn save_queued(&mut self, queued: Range<usize>) -> Result<(), AgentError> {
        if queued.is_empty() {
            return Ok(());
        }
        let count = queued.len();
        for queued in &mut self.held.queued[queued] {
            if self.criu.gone() {
                return Err(AgentError::Protocol("criu is gone"));
            }
            queued.save(&self.images, &mut self.queues)?;
            fault::point("dump.queue-written")?;
        }
        self.held.write_side_image(&self.images, &self.lock_name)?;
        log::info!("{count} connections that nobody had accepted saved");
        Ok(())
    }

    fn save(&mut self, found: FoundConnection) -> Result<(), AgentError> {
        let tcp = self.read(&found)?;
        fault::point("dump.resumed")?;
        TcpStreamImage::write(&self.images, found.inode, &tcp, &self.queues.recv, &self.queues.send)
            .map_err(|source| AgentError::Image { tuple: found.tuple, place: found.place, source })?;
        fault::point("dump.written")?;
        log::debug!(
            "{} ({}): {}, {} bytes to read, {} to send",
            found.tuple,
            found.place,
            tcp.state,
            tcp.recv_len,
            tcp.send_len
        );
        self.held.sockets.push((found.socket, found.tuple));
        Ok(())
    }

    /// Reads the connection into `queues` and leaves the socket as it was.
    fn read(&mut self, found: &FoundConnection) -> Result<ControlBlock, AgentError> {
        let paused = Paused::pause(found.socket.as_fd())?;
        fault::point("dump.paused")?;
        let tcp = paused.save(&mut self.queues);
        fault::point("dump.read")?;
        paused.resume(Probe::None)?;
        tcp.map_err(|source| AgentError::Save { place: found.place, source })
    }

    /// DUMP_EXT_FILE: a connection that criu hands over as an external file.
    pub fn external(&mut self, id: i32, file: Option<OwnedFd>) -> Result<(), AgentError> {
        let socket = file.ok_or(AgentError::Protocol("no descriptor came along"))?;
        let found = Finder::default().connection(socket, Place::Given)?;
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
            self.record(std::slice::from_ref(&found), &[])?;
            self.lock(&ends(std::slice::from_ref(&found)))?;
        }
        let tcp = self.read(&found)?;
        let image = ExternalImage {
            tuple: found.tuple,
            tcp,
            options: soccr::kernel::options::read(found.socket.as_fd()),
            shut_rd: false,
            usec_ts_known: false,
            lock_id: Some(self.lock_name.id().to_owned()),
        };
        image
            .write(&self.images, id.cast_unsigned(), &self.queues.recv, &self.queues.send)
            .map_err(|source| AgentError::Image { tuple: found.tuple, place: found.place, source })?;
        if !known {
            self.held.sockets.push((found.socket, found.tuple));
        }
        Ok(())
    }
}

impl Saved {
    /// Writes what CRIU's images have no field for.
    pub fn write_side_image(&self) -> Result<(), AgentError> {
        self.held.write_side_image(&self.images, &self.lock_name)
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
        let Found { connections, unconnected } = Finder::default().of_tasks(&held.tasks)?;
        for FoundConnection { socket, tuple, ns, .. } in connections {
            let lock = || NetworkLock::adopt(&ns, &lock_name, &options);
            held.locks.entry(ns.clone()).or_insert_with(lock);
            if ns != held.criu_ns {
                held.path.add([tuple]);
            }
            held.sockets.push((socket, tuple));
        }
        let side = SideImage::read(&images)?.filter(|side| side.id == lock_name.id());
        let accepted = side.map(|side| side.accepted).unwrap_or_default();
        held.queued = queues::of_images(accepted, unconnected);
        log::warn!("took over from an agent that died: {} connections", held.sockets.len());
        Ok(Self { images, lock_name, held })
    }
}

/// A connection's namespace and addresses.
type End<'a> = (&'a NetNs, FourTuple);

fn ends(found: &[FoundConnection]) -> Vec<End<'_>> {
    found.iter().map(|connection| (&connection.ns, connection.tuple)).collect()
}

/// An id that no other dump has: 12 hexadecimal digits.
fn random_id() -> Result<String, AgentError> {
    use std::io::Read;
    let mut bytes = [0; 6];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(AgentError::Random)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
