//! The first phase of a dump: the connections of frozen tasks are found, locked and saved.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use soccr::connection::{ControlBlock, FourTuple, OPT_ECN, Queues};
use soccr::criu::image::ImageDir;
use soccr::criu::image::external::ExternalImage;
use soccr::criu::image::side::{Kept, SideImage};
use soccr::criu::image::tcp_stream::TcpStreamImage;
use soccr::criu::record::{ConnectionRecord, LockRecord, NsId, Phase, Recorder, Store};
use soccr::criu::rules::{Action, Policy, Rules};
use soccr::criu::tasks::{self, FindError, Finder, FoundConnection, Place, Task};
use soccr::kernel::netns::NetNs;
use soccr::kernel::tcp;
use soccr::lock::{LockName, LockOptions, Method, NetworkLock};
use soccr::repair::{Paused, Probe};

use super::held::Held;
use crate::agent::error::AgentError;
use crate::agent::path::Path;
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
    kept: HashMap<u32, Kept>,
    held: Held,
}

/// A dump of which all is saved.
#[derive(Debug)]
pub struct Saved {
    /// Where.
    pub images: ImageDir,
    /// The locks' name.
    pub lock_name: LockName,
    /// What CRIU's images of connections have no field for.
    kept: HashMap<u32, Kept>,
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
        let policy = Rules::read()?.policy;
        let (finder, queues) = (Finder::default(), Queues::default());
        let held = Held::nothing(recorder, criu, &lock_name)?;
        Ok(Self { criu, images, lock_name, options, policy, finder, queues, kept: HashMap::new(), held })
    }

    /// No further hook comes.
    pub fn into_saved(self) -> Saved {
        let Self { images, lock_name, kept, held, .. } = self;
        Saved { images, lock_name, kept, held }
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
        let found = self.finder.of_tasks(tasks)?;
        fault::point("dump.found")?;
        let found = self.sort_out(found)?;
        let elsewhere = found.iter().filter(|connection| connection.ns != self.held.criu_ns);
        self.held.path.add(elsewhere.map(|connection| connection.tuple));
        self.record(&found)?;
        fault::point("dump.recorded")?;
        self.lock(&found)?;
        fault::point("dump.locked")?;
        let count = found.len();
        for connection in found {
            // The kernel lets the tasks run as soon as criu is dead: their sockets are theirs then.
            if self.criu.gone() {
                return Err(AgentError::Protocol("criu is gone"));
            }
            self.save(connection)?;
        }
        fault::point("dump.saved")?;
        log::info!("{count} TCP connections saved, locked by the table inet {}", self.lock_name);
        Ok(())
    }

    /// The connections that are to be carried.
    fn sort_out(&mut self, mut found: Vec<FoundConnection>) -> Result<Vec<FoundConnection>, AgentError> {
        let policy = &self.policy;
        if let Some(FoundConnection { tuple, place, .. }) =
            found.iter().find(|connection| policy.of(&connection.tuple).0 == Action::Refuse)
        {
            let rule = format!("{} ({place})", policy.of(tuple).1);
            return Err(AgentError::Refused { tuple: *tuple, rule });
        }
        for connection in found.extract_if(.., |connection| policy.of(&connection.tuple).0 != Action::Keep) {
            let (action, rule) = policy.of(&connection.tuple);
            log::info!("{} ({}) ends with its task, says {rule}", connection.tuple, connection.place);
            let ends = if action == Action::Reset { &mut self.held.reset } else { &mut self.held.sockets };
            ends.push((connection.socket, connection.tuple));
        }
        Ok(found)
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
    fn record(&mut self, found: &[FoundConnection]) -> Result<(), AgentError> {
        let locked_by_criu = self.held.tree().own.cloned();
        if found.is_empty() && locked_by_criu.is_none() {
            return Ok(());
        }
        let recorder = &mut self.held.recorder;
        locked_by_criu.iter().for_each(|ns| recorder.add_criu_lock(ns));
        for connection in found.iter().filter(|_| self.options.method != Method::Skip) {
            let ns = NsId::from(&connection.ns);
            recorder.add_lock(LockRecord { ns, name: self.lock_name.clone(), method: self.options.method });
        }
        self.held.path.record(&self.options).into_iter().for_each(|lock| recorder.add_lock(lock));
        recorder.set_translations(self.held.path.translations());
        self.held.tasks.iter().for_each(|task| recorder.add_task(task.pid));
        recorder.add_connections(found.iter().map(ConnectionRecord::from));
        recorder.save(Phase::Saving)?;
        Ok(())
    }

    /// One transaction per namespace, the one that packets pass through first.
    fn lock(&mut self, found: &[FoundConnection]) -> Result<(), AgentError> {
        self.held.path.lock(&self.options)?;
        let mut tuples: HashMap<&NetNs, Vec<FourTuple>> = HashMap::new();
        for connection in found.iter().filter(|connection| connection.tuple.local.port() != 0) {
            tuples.entry(&connection.ns).or_default().push(connection.tuple);
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

    fn save(&mut self, found: FoundConnection) -> Result<(), AgentError> {
        let tcp = self.read(&found)?;
        fault::point("dump.resumed")?;
        TcpStreamImage::write(&self.images, found.inode, &tcp, &self.queues.recv, &self.queues.send)
            .map_err(|source| AgentError::Image { tuple: found.tuple, place: found.place, source })?;
        fault::point("dump.written")?;
        self.keep(&found, &tcp)?;
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

    /// Most connections have nothing of the kind, and are asked for nothing. A round trip below a millisecond makes no
    /// difference.
    fn keep(&mut self, found: &FoundConnection, tcp: &ControlBlock) -> Result<(), AgentError> {
        let failed = |source| FindError::Sys(found.place, source);
        let socket = found.socket.as_fd();
        let mut kept = Kept::default();
        if tcp.negotiated.mask & OPT_ECN != 0 {
            let rtt = tcp::info(socket).map_err(failed)?.rtt;
            kept.rtt = Some(rtt).filter(|rtt| *rtt >= Duration::from_millis(1));
        }
        if tcp.negotiated.timestamp.is_some_and(|tsval| tsval & 1 != 0) {
            kept.usec_ts = tcp::timestamp_tells_unit(socket).map_err(failed)?;
        }
        if kept != Kept::default() {
            self.kept.insert(found.inode, kept);
        }
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
            self.record(std::slice::from_ref(&found))?;
            self.lock(std::slice::from_ref(&found))?;
        }
        let tcp = self.read(&found)?;
        let image = ExternalImage {
            tuple: found.tuple,
            tcp,
            options: soccr::kernel::options::read(found.socket.as_fd()),
            shut_rd: false,
            usec_ts_known: tcp::timestamp_tells_unit(found.socket.as_fd()).unwrap_or(false),
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
        let translations = self.held.path.translations().to_vec();
        let (id, kept) = (self.lock_name.id().to_owned(), self.kept.clone());
        Ok(SideImage { id, translations, kept }.write(&self.images)?)
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
        let mut held = Held::nothing(recorder, criu, &lock_name)?;
        if record.locks.iter().any(|lock| lock.name == lock_name.on_path()) {
            held.path = Path::adopt(&held.criu_ns, &lock_name, &record.translations, &options);
        }
        for task in record.tasks.iter().filter(|task| task.lives()) {
            held.add_task(task.pid)?;
        }
        for FoundConnection { socket, tuple, ns, .. } in Finder::default().of_tasks(&held.tasks)? {
            let lock = || NetworkLock::adopt(&ns, &lock_name, &options);
            held.locks.entry(ns.clone()).or_insert_with(lock);
            if ns != held.criu_ns {
                held.path.add([tuple]);
            }
            held.sockets.push((socket, tuple));
        }
        log::warn!("took over from an agent that died: {} connections", held.sockets.len());
        // Round trip times are known to nobody any more, nor which clocks are known to tick in microseconds.
        Ok(Self { images, lock_name, kept: HashMap::new(), held })
    }
}

/// An id that no other dump has: 12 hexadecimal digits.
fn random_id() -> Result<String, AgentError> {
    use std::io::Read;
    let mut bytes = [0; 6];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(AgentError::Random)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
