//! The agent of a dump.
//!
//! At the first hook all tasks are frozen already, so the whole tree is looked at, and all its connections are locked
//! by one transaction per network namespace, before the first is read. Then each is read and written to its image,
//! and left as it was: only the lock keeps it still, since a socket in repair mode shows a changed SO_REUSEADDR to
//! criu, which looks at the sockets after us. Our duplicates of the sockets stay open until the outcome is known
//! (module `outcome`).

use std::collections::HashMap;
use std::fmt::Display;
use std::os::fd::{AsFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::getppid;
use soccr::connection::{ControlBlock, FourTuple, Queues};
use soccr::criu::image::ImageDir;
use soccr::criu::image::external::ExternalImage;
use soccr::criu::image::tcp_stream::TcpStreamImage;
use soccr::criu::record::{ConnectionRecord, LockRecord, NsId, Phase as Recorded, Recorder, Store};
use soccr::criu::tasks::{self, FindError, Finder, Found, Place, Task};
use soccr::kernel::netns::NetNs;
use soccr::lock::{LockName, LockOptions, Method, NetworkLock};
use soccr::repair::{Paused, Probe};

use super::error::chain;
use super::logger::answering;
use super::outcome::{Arrangement, Outcome};

use super::{AgentError, cleaner, outcome, privilege};
use crate::channel::{Answer, Asked, Request, Server};
use crate::fault;

/// A connection that was saved: its socket, kept until the outcome.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) socket: OwnedFd,
    pub(super) tuple: FourTuple,
}

/// What a dump has done so far.
#[derive(Debug)]
pub(super) struct Dump {
    pub(super) images: ImageDir,
    pub(super) criu: Task,
    pub(super) lock_name: LockName,
    options: LockOptions,
    pub(super) tasks: Vec<Task>,
    finder: Finder,
    pub(super) held: Vec<Held>,
    pub(super) locks: HashMap<NetNs, NetworkLock>,
    pub(super) recorder: Recorder,
    queues: Queues,
    /// Whether another agent had begun this dump.
    inherited: bool,
}

fn own_pid() -> i32 {
    nix::unistd::getpid().as_raw()
}

/// Serves the hooks of one `criu dump` until its outcome is carried out.
pub(super) fn serve(images: ImageDir, criu: i32, server: &Server) {
    let Ok(criu) = Task::open(criu) else { return };
    fault::actors(Some(criu.pid), None);
    match Dump::new(images, criu) {
        Ok(dump) => Serving { dump, phase: Phase::Saving, waiting: Vec::new(), criu_lives: true }.run(server),
        Err(error) => refuse_all(server, &error),
    }
}

/// Takes over a dump of which all is saved, from an agent that died: the tasks are still frozen, and the record tells
/// which they are and what is locked.
pub(super) fn take_over(images: ImageDir, criu: i32, server: &Server) {
    fault::disarm();
    let Ok(criu) = Task::open(criu) else { return };
    match Dump::taken_over(images, criu) {
        Ok(dump) => Serving { dump, phase: Phase::Saving, waiting: Vec::new(), criu_lives: true }.run(server),
        Err(error) => refuse_all(server, &error),
    }
}

fn refuse_all(server: &Server, error: &dyn Display) {
    while let Ok(Some(asked)) = server.next() {
        answering(asked.answer, || Err(error));
    }
}

enum Phase {
    /// Hooks are still to come.
    Saving,
    /// exit() was called after a success: the tasks will die or run on.
    Deciding(Outcome),
    /// All is done.
    Over,
}

struct Serving {
    dump: Dump,
    phase: Phase,
    /// Who waits until the connections are where they belong.
    waiting: Vec<Answer>,
    criu_lives: bool,
}

enum Event {
    Asked(Asked),
    CriuGone,
    Look,
}

impl Serving {
    fn run(mut self, server: &Server) {
        while !self.may_leave() {
            match self.wait(server) {
                Event::Asked(asked) => self.serve(asked),
                Event::CriuGone => {
                    self.criu_lives = false;
                    if matches!(self.phase, Phase::Saving) {
                        self.end_alive(); // criu was killed: the kernel lets the tasks run
                    }
                }
                Event::Look => {}
            }
            self.decide();
        }
        for answer in self.waiting {
            answer.finish(true);
        }
    }

    /// The agent stays as long as criu may ask: one that is gone before is one that was killed. But a criu whose child
    /// it is (the first process of a PID namespace) waits for all its children before it asks.
    fn may_leave(&self) -> bool {
        let awaited = || self.dump.tasks_gone() && getppid().as_raw() == self.dump.criu.pid;
        matches!(self.phase, Phase::Over) && (!self.criu_lives || !self.waiting.is_empty() || awaited())
    }

    /// The next thing to look at. While the outcome is open the tasks are looked at again and again, since no event
    /// tells that a task is traced no more.
    fn wait(&self, server: &Server) -> Event {
        let timeout = match &self.phase {
            Phase::Deciding(outcome) => PollTimeout::from(outcome.patience_ms()),
            _ => PollTimeout::NONE,
        };
        let mut fds = vec![];
        if self.criu_lives {
            fds.push(PollFd::new(self.dump.criu.pidfd(), PollFlags::POLLIN));
            fds.push(PollFd::new(server.as_fd(), PollFlags::POLLIN));
        }
        if matches!(self.phase, Phase::Deciding(_)) {
            let alive = self.dump.tasks.iter().find(|task| !task.gone());
            fds.extend(alive.map(|task| PollFd::new(task.pidfd(), PollFlags::POLLIN)));
        }
        if poll(&mut fds, timeout).is_err() {
            return Event::Look;
        }
        let ready = |index: usize| fds.get(index).is_some_and(|fd| fd.any() == Some(true));
        if self.criu_lives && ready(1) {
            match server.next() {
                Ok(Some(asked)) => return Event::Asked(asked),
                Ok(None) => return Event::CriuGone,
                Err(_) => {}
            }
        }
        if self.criu_lives && ready(0) { Event::CriuGone } else { Event::Look }
    }

    fn serve(&mut self, asked: Asked) {
        let Asked { request, file, answer } = asked;
        match request {
            Request::Checkpoint(pid) => {
                answering(answer, || self.dump.checkpoint(pid));
                privilege::be_prompt(false);
            }
            Request::DumpFile(id) => {
                answering(answer, || self.dump.external(id, file));
            }
            Request::DumpEnd(ret) => {
                answering(answer, || self.end(ret));
            }
            Request::Settle => self.waiting.push(answer),
            _ => {
                answering(answer, || Err("this is the agent of a dump"));
            }
        }
    }

    fn end(&mut self, ret: i32) -> Result<(), AgentError> {
        if ret != 0 {
            self.end_alive(); // a failed dump lets the tasks run on
            return Ok(());
        }
        let made = fault::point("dump.end").map_err(AgentError::from).and_then(|()| {
            if self.dump.inherited {
                Arrangement::of_dead_agent(&self.dump).map(Some)
            } else {
                Arrangement::make(&self.dump)
            }
        });
        let (arrangement, result) = match made {
            Ok(Some(arrangement)) => (arrangement, Ok(())),
            Ok(None) => {
                log::info!("CRIU carries the connections itself");
                self.end_alive();
                return Ok(());
            }
            // CRIU kills the tasks all the same: the images are as they are, and the locks are needed.
            Err(error) => (Arrangement::as_it_is(), Err(error)),
        };
        self.dump.recorder.keep_after_death(arrangement.ours_stays());
        self.dump.note(Recorded::Deciding);
        self.phase = Phase::Deciding(Outcome::new(arrangement));
        result.and(fault::point("dump.arranged").map_err(AgentError::from))
    }

    fn decide(&mut self) {
        let Phase::Deciding(outcome) = &mut self.phase else { return };
        match outcome.look(&self.dump.tasks) {
            outcome::Verdict::Open => {}
            outcome::Verdict::Stopped => {
                // Left stopped: that may last, and criu need not wait for it.
                self.dump.note(Recorded::LeftStopped);
                for answer in self.waiting.drain(..) {
                    answer.finish(true);
                }
            }
            outcome::Verdict::Alive => self.end_alive(),
            outcome::Verdict::Dead => {
                let Phase::Deciding(outcome) = std::mem::replace(&mut self.phase, Phase::Over) else {
                    return;
                };
                outcome.carry_out_death(&mut self.dump);
            }
        }
    }

    fn end_alive(&mut self) {
        self.dump.let_live();
        self.phase = Phase::Over;
    }
}

impl Dump {
    fn taken_over(images: ImageDir, criu: Task) -> Result<Self, AgentError> {
        let gone = || AgentError::Protocol("there is no record of what the dead agent has done");
        let store = Store::open()?.ok_or_else(gone)?;
        let record = cleaner::of(&store, criu.pid)?.into_iter().next().ok_or_else(gone)?;
        let recorder = Recorder::take_over(&record.id, criu.pid)?.ok_or_else(gone)?;
        let lock_name = LockName::criu(record.id.as_str())?;
        let mut dump = Self::begun(images, criu, lock_name, recorder)?;
        dump.inherited = true;
        for task in record.tasks.iter().filter(|task| task.lives()) {
            dump.tasks
                .push(Task::open(task.pid).map_err(|source| AgentError::Task { pid: task.pid, source })?);
        }
        for task in &dump.tasks {
            for Found { socket, tuple, ns, .. } in dump.finder.of_task(task)? {
                let lock = || NetworkLock::adopt(&ns, &dump.lock_name, &dump.options);
                dump.locks.entry(ns.clone()).or_insert_with(lock);
                dump.held.push(Held { socket, tuple });
            }
        }
        log::warn!("took over from an agent that died: {} connections", dump.held.len());
        Ok(dump)
    }

    fn new(images: ImageDir, criu: Task) -> Result<Self, AgentError> {
        fault::point("dump.init")?;
        let lock_name = LockName::criu(&format!("soccr-{}", super::random_id()?))?;
        let recorder = Recorder::new(lock_name.id(), Recorded::Saving, images.as_fd(), criu.pid)?;
        Self::begun(images, criu, lock_name, recorder)
    }

    fn begun(
        images: ImageDir,
        criu: Task,
        lock_name: LockName,
        recorder: Recorder,
    ) -> Result<Self, AgentError> {
        Ok(Self {
            inherited: false,
            images,
            criu,
            lock_name,
            recorder,
            options: LockOptions::from_env()?,
            tasks: Vec::new(),
            finder: Finder::default(),
            held: Vec::new(),
            locks: HashMap::new(),
            queues: Queues::default(),
        })
    }

    fn checkpoint(&mut self, pid: i32) -> Result<(), AgentError> {
        if self.tasks.iter().any(|task| task.pid == pid) {
            return Ok(()); // came with the tree
        }
        fault::actors(None, Some(pid));
        fault::point("dump.asked")?;
        let mut pids = tasks::frozen_tree(pid, self.criu.pid).map_err(AgentError::Tree)?;
        pids.retain(|pid| self.tasks.iter().all(|task| task.pid != *pid));
        if let Some((uid, gid)) = tasks::foreign_root(pid).map_err(|error| FindError::Proc(pid, error))? {
            self.images.give_new_files_to(uid, gid);
        }
        let first = self.tasks.len();
        for pid in pids {
            self.tasks.push(Task::open(pid).map_err(|source| AgentError::Task { pid, source })?);
        }
        fault::point("dump.tree")?;
        let mut found = Vec::new();
        for task in self.tasks.iter().skip(first) {
            found.extend(self.finder.of_task(task)?);
        }
        fault::point("dump.found")?;
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

    /// Writes down what is about to be changed on this host, while nothing is.
    fn record(&mut self, found: &[Found]) -> Result<(), AgentError> {
        if found.is_empty() {
            return Ok(());
        }
        for connection in found.iter().filter(|_| self.options.method != Method::Skip) {
            let ns = NsId::from(&connection.ns);
            let lock = LockRecord { ns, name: self.lock_name.clone(), method: self.options.method };
            self.recorder.add_lock(lock);
        }
        for task in &self.tasks {
            self.recorder.add_task(task.pid);
        }
        self.recorder.add_connections(found.iter().map(ConnectionRecord::from));
        self.recorder.save(Recorded::Saving)?;
        Ok(())
    }

    /// The record follows. What it told before is enough to find and undo all, so this may fail.
    pub(super) fn note(&mut self, phase: Recorded) {
        if let Err(error) = self.recorder.enter(phase) {
            log::error!("{}", chain(&error));
        }
    }

    /// All is undone.
    pub(super) fn forget_record(&mut self) {
        if let Err(error) = self.recorder.remove() {
            log::error!("{}", chain(&error));
        }
    }

    /// One transaction per namespace.
    fn lock(&mut self, found: &[Found]) -> Result<(), AgentError> {
        let mut tuples: HashMap<&NetNs, Vec<FourTuple>> = HashMap::new();
        for connection in found.iter().filter(|connection| connection.tuple.local.port() != 0) {
            tuples.entry(&connection.ns).or_default().push(connection.tuple);
        }
        for (ns, tuples) in tuples {
            match self.locks.get_mut(ns) {
                Some(lock) => lock.add(&tuples)?,
                None => {
                    let lock = NetworkLock::lock(ns, &self.lock_name, &tuples, &self.options)?;
                    self.locks.insert(ns.clone(), lock);
                }
            }
        }
        Ok(())
    }

    fn save(&mut self, found: Found) -> Result<(), AgentError> {
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
        self.held.push(Held { socket: found.socket, tuple: found.tuple });
        Ok(())
    }

    /// Reads the connection into `queues` and leaves the socket as it was.
    fn read(&mut self, found: &Found) -> Result<ControlBlock, AgentError> {
        let paused = Paused::pause(found.socket.as_fd())?;
        fault::point("dump.paused")?;
        let tcp = paused.save(&mut self.queues);
        fault::point("dump.read")?;
        paused.resume(Probe::None)?;
        tcp.map_err(|source| AgentError::Save { place: found.place, source })
    }

    /// A connection that criu hands over as an external file.
    fn external(&mut self, id: i32, file: Option<OwnedFd>) -> Result<(), AgentError> {
        let socket = file.ok_or(AgentError::Protocol("no descriptor came along"))?;
        let found = Finder::default().connection(socket, Place::Given)?;
        let found = found.ok_or(AgentError::Protocol("the descriptor is not a TCP connection"))?;
        let known = self.held.iter().any(|held| held.tuple == found.tuple);
        if self.tasks.is_empty() {
            // A host without CHECKPOINT_DEVICES: the fate of the socket is that of whoever has it.
            let holders = tasks::holders(u64::from(found.inode)).map_err(AgentError::Tree)?;
            let others = holders.into_iter().filter(|pid| ![self.criu.pid, own_pid()].contains(pid));
            self.tasks.extend(others.filter_map(|pid| Task::open(pid).ok()));
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
            usec_ts_known: false,
            lock_id: Some(self.lock_name.id().to_owned()),
        };
        image
            .write(&self.images, id.cast_unsigned(), &self.queues.recv, &self.queues.send)
            .map_err(|source| AgentError::Image { tuple: found.tuple, place: found.place, source })?;
        if !known {
            self.held.push(Held { socket: found.socket, tuple: found.tuple });
        }
        Ok(())
    }

    fn tasks_gone(&self) -> bool {
        self.tasks.iter().all(Task::gone)
    }

    /// The tasks run on: nothing was changed in them, so the lock is all there is to undo.
    pub(super) fn let_live(&mut self) {
        let mut unlocked = true;
        for (ns, lock) in self.locks.drain() {
            if let Err(error) = lock.unlock() {
                log::error!("{ns}: the connections stay locked: {}", chain(&error));
                unlocked = false;
            }
        }
        self.held.clear();
        if unlocked {
            self.forget_record();
        }
    }

    /// The tasks are dead, and ours are the last descriptors of their sockets: in repair mode a socket is closed without
    /// a word to the peer.
    pub(super) fn close_silently(&mut self) {
        let _ = fault::point("dump.dead");
        for held in self.held.drain(..) {
            let _ = fault::point("dump.closing");
            match Paused::pause(held.socket.as_fd()) {
                Ok(paused) => drop(paused.release()),
                Err(error) => log::error!("{}: closed aloud: {}", held.tuple, chain(&error)),
            }
        }
        let _ = fault::point("dump.closed");
    }
}
