//! The agent of a restore.
//!
//! CRIU has made the sockets, set their options and shut them down. What is missing is the connection. Between CRIU's own
//! unlocking and its late hook peers' packets would meet a socket without a connection and be answered with RST, so our
//! lock is there before: in criu's namespace from the start, in a namespace that the restore makes or enters as soon as
//! it is there. Each connection is built, still locked and in repair mode, when the hook of its task comes. After the last
//! task all leave repair mode, silently; then they are unlocked, from where there is no way back; and then a probe from
//! each wakes its flow.
//!
//! When anything fails the sockets are closed in repair mode, silently, and the lock is what it was before, under the
//! name that the images know: the restore can be tried again, by us or by stock CRIU.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};
use soccr::connection::{FourTuple, Queues};
use soccr::criu::image::ImageDir;
use soccr::criu::image::external::ExternalImage;
use soccr::criu::image::index::{Index, InetConnection};
use soccr::criu::image::inventory::{self, NetworkLock as ImageLock};
use soccr::criu::record::{self, ConnectionRecord, LockRecord, NsId, Phase, RecordId, Recorder};
use soccr::criu::stock;
use soccr::criu::tasks::{self, Fate, Task, in_flight};
use soccr::forge::Forge;
use soccr::kernel::netns::NetNs;
use soccr::kernel::process::{self, RemoteFd};
use soccr::kernel::{diag, sockopt, tcp};
use soccr::lock::{self, LockError, LockName, LockOptions, Method, NetworkLock};
use soccr::repair::{self, Paused, Probe, four_tuple};

use super::AgentError;
use super::build::{Builder, Built, Wanted, must_live};
use super::error::chain;
use super::logger::{self, answering};
use super::parallel;
use crate::channel::{Asked, Request, Server};
use crate::fault;

/// Serves the hooks of one `criu restore`.
///
/// A criu whose child the agent is (the first process of a PID namespace), and that was not told to detach, waits for
/// all its children before its last hook: then the agent leaves when the restored tasks have ended.
pub(super) fn serve(images: ImageDir, criu: i32, server: &Server) {
    let Ok(criu_fd) = process::pidfd_open(criu) else { return };
    fault::actors(Some(criu), None);
    let mut restore = None;
    loop {
        let waits_for_us = getppid().as_raw() == criu;
        let done = restore.as_ref().filter(|restore: &&Restore| restore.finished && waits_for_us);
        let running = done.map(|restore| restore.restored.iter().find(|task| !task.gone()));
        if matches!(running, Some(None)) {
            return;
        }
        let mut fds = vec![
            PollFd::new(server.as_fd(), PollFlags::POLLIN),
            PollFd::new(criu_fd.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(running.flatten().map(|task| PollFd::new(task.pidfd(), PollFlags::POLLIN)));
        if poll(&mut fds, PollTimeout::NONE).is_err() {
            continue;
        }
        if fds[0].any() == Some(true) {
            match server.next() {
                Ok(Some(asked)) => {
                    if handle(&images, criu, &mut restore, asked) {
                        return;
                    }
                    continue;
                }
                Ok(None) => break,
                Err(_) => {}
            }
        }
        if fds[1].any() == Some(true) {
            break;
        }
    }
    if let Some(restore) = restore {
        restore.criu_died();
    }
}

/// Answers one request; whether it was the last.
fn handle(images: &ImageDir, criu: i32, restore: &mut Option<Restore>, asked: Asked) -> bool {
    let Asked { request, answer, .. } = asked;
    let last = matches!(request, Request::RestoreEnd(_));
    answering(answer, || match (request, &mut *restore) {
        (Request::Prepare, _) => {
            fault::point("restore.init")?;
            let mut prepared = Restore::new(images, criu)?;
            fault::point("restore.prepared")?;
            prepared.lock_at_home()?;
            fault::point("restore.locked")?;
            *restore = Some(prepared);
            Ok(())
        }
        (Request::Forked, Some(restore)) => {
            restore.lock_abroad()?;
            Ok(fault::point("restore.forked")?)
        }
        (Request::Resume(pid), Some(restore)) => restore.resume(pid),
        (Request::RestoreEnd(ret), _) => restore.take().map_or(Ok(()), |restore| restore.end(ret)),
        (_, None) => Ok(()),
        _ => Err(AgentError::Protocol("this is the agent of a restore")),
    });
    last
}

#[derive(Debug)]
struct Restore {
    images: ImageDir,
    criu: Task,
    index: Index,
    /// Connections that CRIU gave to the plugin as external files, by their addresses, with their SO_REUSEADDR.
    external: HashMap<FourTuple, bool>,
    home: NetNs,
    options: LockOptions,
    lock_name: LockName,
    locks: Vec<(NetworkLock, Vec<FourTuple>)>,
    /// The tables that the dump left.
    dump_locks: Vec<LockName>,
    recorder: Recorder,
    /// The dump, or an earlier restore of it, did not come to its end.
    interrupted: bool,
    /// The root task, once it is there.
    root: Option<Task>,
    /// Tasks whose hook has come.
    restored: Vec<Task>,
    /// Inner pids of the tasks whose hook is still to come.
    awaited: HashSet<u32>,
    /// File ids of the connections still to be brought back.
    missing: HashSet<u32>,
    built: Vec<Built>,
    forge: Forge,
    failed: bool,
    finished: bool,
}

impl Restore {
    fn new(images: &ImageDir, criu: i32) -> Result<Self, AgentError> {
        let index = if images.contains(inventory::NAME) { Index::read(images)? } else { Index::empty() };
        let carried = index.connections.iter().filter(|(_, connection)| connection.has_stream);
        let missing: HashSet<u32> = carried.map(|(id, _)| *id).collect();
        let awaited = index.tasks.iter().filter(|(_, task)| task.alive).map(|(pid, _)| *pid).collect();
        let mut dump_locks: Vec<LockName> = dump_lock(&index).into_iter().collect();
        let mut external = HashMap::new();
        ExternalImage::for_each(images, |image| {
            let lock = image.lock_id.as_deref().and_then(|id| LockName::criu(id).ok());
            dump_locks.extend(lock.filter(|name| !dump_locks.contains(name)));
            external.insert(image.tuple, soccr::kernel::options::reuse_addr(&image.options));
        })?;
        let lock_name = lock_name(&index)?;
        let recorder = recorder(&index, &lock_name, images, criu)?;
        Ok(Self {
            interrupted: !recorder.record().locks.is_empty() && recorder.record().phase != Phase::Dumped,
            recorder,
            lock_name,
            dump_locks,
            images: ImageDir::duplicate(images.as_fd())?,
            criu: Task::open(criu).map_err(|source| AgentError::Task { pid: criu, source })?,
            index,
            external,
            home: NetNs::of_task(criu.cast_unsigned())?,
            options: LockOptions::from_env()?,
            locks: Vec::new(),
            root: None,
            restored: Vec::new(),
            awaited,
            missing,
            built: Vec::new(),
            forge: Forge::new(),
            failed: false,
            finished: false,
        })
    }

    fn at_home(&self, connection: &InetConnection) -> bool {
        connection.net_ns_id.is_none() || connection.net_ns_id == self.index.root_net_ns_id
    }

    fn tuples(&self, wanted: impl Fn(&InetConnection) -> bool) -> Vec<FourTuple> {
        let carried = self.index.connections.values().filter(|connection| connection.has_stream);
        let with_packets = carried.filter(|connection| connection.tuple.local.port() != 0);
        with_packets.filter(|connection| wanted(connection)).map(|connection| connection.tuple).collect()
    }

    /// Locks what is to be restored in criu's own namespace.
    fn lock_at_home(&mut self) -> Result<(), AgentError> {
        let mut tuples = self.tuples(|connection| self.at_home(connection));
        tuples.extend(self.external.keys().copied());
        self.refuse_living(&tuples)?;
        self.lock(&self.home.clone(), tuples)
    }

    /// A dump that was restored already has no record. Its connections are alive then, and a lock would harm them.
    fn refuse_living(&self, tuples: &[FourTuple]) -> Result<(), AgentError> {
        let waits = !self.recorder.record().locks.is_empty();
        if waits || tuples.is_empty() {
            return Ok(());
        }
        match self.home.run(|| diag::find_owned(tuples))? {
            Ok(Some(tuple)) => Err(AgentError::Alive(tuple)),
            Ok(None) => Ok(()),
            Err(error) => {
                log::warn!("cannot tell whether the connections are alive already: {error}");
                Ok(())
            }
        }
    }

    /// Locks in the namespace of the root task, where that is not criu's.
    fn lock_abroad(&mut self) -> Result<(), AgentError> {
        if self.missing.is_empty() {
            return Ok(());
        }
        let Some(root) = self.index.root else { return Ok(()) };
        let Some(pid) = tasks::restored_child(self.criu.pid, root).map_err(AgentError::Tree)? else {
            log::warn!("the root task is not found, so its network namespace is locked late");
            return Ok(());
        };
        self.root = Task::open(pid).ok();
        let ns = NetNs::of_task(pid.cast_unsigned())?;
        let ns_id = self.index.tasks.get(&root).and_then(|task| task.net_ns_id);
        if ns == self.home || ns_id.is_none() || ns_id == self.index.root_net_ns_id {
            return Ok(());
        }
        let tuples = self.tuples(|connection| connection.net_ns_id == ns_id);
        self.lock(&ns, tuples)
    }

    fn lock(&mut self, ns: &NetNs, tuples: Vec<FourTuple>) -> Result<(), AgentError> {
        if !tuples.is_empty() {
            if self.options.method != Method::Skip {
                let (name, method) = (self.lock_name.clone(), self.options.method);
                self.recorder.add_lock(LockRecord { ns: NsId::from(ns), name, method });
                self.recorder.save(Phase::Restoring)?;
            }
            let lock = NetworkLock::lock(ns, &self.lock_name, &tuples, &self.options)?;
            if self.interrupted {
                destroy_orphans(ns, &tuples);
            }
            self.locks.push((lock, tuples));
        }
        Ok(())
    }

    /// Brings back the connections of one task, and wakes all of them after the last task.
    fn resume(&mut self, pid: i32) -> Result<(), AgentError> {
        if self.failed {
            return Err(AgentError::FailedBefore);
        }
        let result = self.bring_back(pid).and_then(|()| {
            let nothing_awaited = self.awaited.is_empty();
            if nothing_awaited && !self.finished { self.finish() } else { Ok(()) }
        });
        self.failed = result.is_err();
        result
    }

    fn bring_back(&mut self, pid: i32) -> Result<(), AgentError> {
        fault::actors(None, Some(pid));
        fault::point("restore.asked")?;
        let inner = tasks::inner_pid(pid).map_err(AgentError::Tree)?;
        if self.index.root == Some(inner) && self.root.is_none() {
            self.root = Task::open(pid).ok();
        }
        self.awaited.remove(&inner);
        let task = Task::open(pid).map_err(|source| AgentError::Task { pid, source })?;
        let fds = self.index.tasks.get(&inner).map(|task| task.fds.clone()).unwrap_or_default();
        let mut wanted = Vec::new();
        for fd in fds.iter() {
            let Ok(number) = u32::try_from(fd.fd) else { continue };
            if self.missing.remove(&fd.file_id) {
                wanted.push((fd.file_id, copy(&task, number)?));
            } else if self.index.in_flight.contains_key(&fd.file_id) {
                let unix = copy(&task, number)?;
                self.in_flight(fd.file_id, &unix, pid, &mut wanted)?;
            }
        }
        let builder =
            Builder { images: &self.images, index: &self.index, forge: &self.forge, criu: &self.criu, pid };
        let (built, result) =
            parallel::for_each(wanted, Queues::default, |queues, wanted| builder.build(wanted, queues));
        self.built.extend(built.into_iter().flatten());
        result?;
        self.adopt_external(&task)?;
        self.restored.push(task);
        Ok(())
    }

    /// Connections inside a unix socket's queue, which holds the same packets as at the dump.
    fn in_flight(
        &mut self,
        unix_id: u32,
        unix: &OwnedFd,
        pid: i32,
        wanted: &mut Vec<Wanted>,
    ) -> Result<(), AgentError> {
        let Some(expected) = self.index.in_flight.remove(&unix_id) else { return Ok(()) };
        let source = |source| AgentError::Task { pid, source };
        let packets = in_flight::peek(unix.as_fd()).map_err(source)?;
        for (expected, packet) in expected.iter().zip(packets) {
            if expected.files.len() != packet.files.len() {
                return Err(AgentError::Protocol("a unix socket's queue is not as in the images"));
            }
            for (file_id, socket) in expected.files.iter().zip(packet.files) {
                if self.missing.remove(file_id) {
                    wanted.push((*file_id, socket));
                } else if self.index.in_flight.contains_key(file_id) {
                    self.in_flight(*file_id, &socket, pid, wanted)?;
                }
            }
        }
        Ok(())
    }

    /// A task that was killed meanwhile makes criu fail, and the restore shall be one that can be tried again.
    fn tasks_live(&self) -> Result<(), AgentError> {
        let dead = |task: &&Task| matches!(task.fate(), Fate::Ending | Fate::Gone);
        match self.restored.iter().find(dead) {
            Some(task) => Err(AgentError::Killed(task.pid)),
            None => Ok(()),
        }
    }

    /// Connections that RESTORE_EXT_FILE has built in the task, and left in repair mode.
    fn adopt_external(&mut self, task: &Task) -> Result<(), AgentError> {
        if self.external.is_empty() {
            return Ok(());
        }
        let failed = |source| AgentError::Task { pid: task.pid, source };
        let sockets = task.sockets().map_err(|_| AgentError::Protocol("cannot list a task's sockets"))?;
        for (fd, _) in sockets {
            let socket = task.copy(fd).map_err(failed)?;
            let ours = sockopt::is_tcp(socket.as_fd()) && tcp::in_repair(socket.as_fd()).map_err(failed)?;
            let Some(tuple) = four_tuple(socket.as_fd()).ok().filter(|_| ours) else { continue };
            if let Some(reuse_addr) = self.external.remove(&tuple) {
                let mut paused = Paused::pause(socket)?;
                paused.set_reuse_addr(reuse_addr);
                self.built.push(Built::new(paused, tuple, None));
            }
        }
        Ok(())
    }

    /// All tasks are complete: unlock, then leave repair mode.
    fn finish(&mut self) -> Result<(), AgentError> {
        if !self.missing.is_empty() {
            let names = self.missing.iter().filter_map(|id| self.index.connections.get(id));
            let names: Vec<String> = names.map(|connection| connection.tuple.to_string()).collect();
            return Err(AgentError::NotFound(names.join(", ")));
        }
        fault::point("restore.all-built")?;
        std::mem::take(&mut self.forge).finish()?;
        // Out of repair mode while still locked, and silently: should we die here, all of it can be done again.
        let built = std::mem::take(&mut self.built);
        let (awake, left) = parallel::for_each(built, || (), |(), built| leave_repair(built));
        if let Err(error) = left.and_then(|()| self.may_wake()) {
            self.built = awake.into_iter().filter_map(enter_repair).collect();
            return Err(error);
        }
        // From here on packets pass: the tasks must live, and whatever fails is only told.
        self.finished = true;
        logger::commit();
        if let Err(error) = self.unlock() {
            log::error!("the connections stay locked, see soccr status: {}", chain(&error));
            return Ok(());
        }
        let _ = fault::point("restore.unlocked");
        let count = awake.len();
        let (_, _) = parallel::for_each(
            awake,
            || (),
            |(), awake| {
                let _ = fault::point("restore.waking");
                if let Err(error) = repair::probe(awake.socket.as_fd(), awake.reuse_addr) {
                    log::warn!("{}: it waits for its peer to send", chain(&error));
                }
                Ok::<_, Infallible>(())
            },
        );
        let _ = fault::point("restore.awake");
        if let Err(error) = self.recorder.remove() {
            log::error!("{}", chain(&error));
        }
        if count > 0 {
            log::info!("{count} TCP connections go on");
        }
        Ok(())
    }

    /// The last checks before packets pass.
    fn may_wake(&mut self) -> Result<(), AgentError> {
        fault::point("restore.unlocking")?;
        must_live(&self.criu)?;
        self.tasks_live()?;
        self.recorder.forget_tasks();
        self.restored.iter().for_each(|task| self.recorder.add_task(task.pid));
        Ok(self.recorder.enter(Phase::Waking)?)
    }

    fn unlock(&mut self) -> Result<(), AgentError> {
        for (lock, tuples) in self.locks.drain(..) {
            let ns = lock.namespace().clone();
            // What the dump left here: our lock (which stock CRIU removes in its own namespace only), maybe made by
            // another method, or the rules of a stock dump, which CRIU leaves alone with --tcp-close.
            for name in &self.dump_locks {
                lock::remove(&ns, self.options.method, name)?;
            }
            // Not ours, which goes last: after a deletion the kernel lets the next transaction wait.
            let others = |left: &&LockRecord| left.ns == NsId::from(&ns) && left.name != *lock.name();
            for left in self.recorder.record().locks.iter().filter(others) {
                lock::remove(&ns, left.method, &left.name)?;
            }
            if self.index.network_lock == ImageLock::Iptables && ns == self.home {
                stock::remove_rules(&ns, &tuples)?;
            }
            lock.unlock()?;
            self.recorder.forget_locks_in(&ns);
        }
        // The dump may have been made in a namespace that nothing of this restore lives in.
        for problem in record::remove_locks(self.recorder.record()) {
            log::error!("{problem}");
        }
        Ok(())
    }

    /// exit() of the restore.
    fn end(mut self, ret: i32) -> Result<(), AgentError> {
        fault::point("restore.end")?;
        if self.finished {
            return Ok(());
        }
        if ret != 0 || self.failed {
            self.give_up();
            return Ok(());
        }
        if self.index.tasks.is_empty() && !self.external.is_empty() {
            let host = Task::open(self.criu.pid)
                .map_err(|source| AgentError::Task { pid: self.criu.pid, source })?;
            self.adopt_external(&host)?;
        }
        self.finish()
    }

    /// criu was killed. The kernel lets the tasks run then, which are not complete: their connections are shut down, or in
    /// repair mode. They are ended before they can do much, and the restore can be tried again.
    fn criu_died(self) {
        let tree = self.root.as_ref().filter(|_| !self.finished).map(|root| tasks::tree(root.pid));
        let tree: Vec<Task> = tree.into_iter().flatten().filter_map(|pid| Task::open(pid).ok()).collect();
        for task in &tree {
            let _ = kill(Pid::from_raw(task.pid), Signal::SIGKILL);
        }
        for task in &tree {
            let mut gone = [PollFd::new(task.pidfd(), PollFlags::POLLIN)];
            let _ = poll(&mut gone, PollTimeout::from(5000_u16));
        }
        self.give_up();
    }

    /// Closes silently what was built, and leaves the locks as they were before the restore.
    fn give_up(mut self) {
        self.built.clear();
        if self.finished {
            return;
        }
        for (lock, tuples) in std::mem::take(&mut self.locks) {
            let ns = lock.namespace().clone();
            match self.lock_as_before(lock, &tuples) {
                Ok(name) => self.record_lock(&ns, name),
                Err(error) => log::error!("{ns}: the connections may be unlocked: {}", chain(&error)),
            }
        }
        self.recorder.forget_tasks();
        let waits = !self.recorder.record().locks.is_empty();
        let kept = if waits { self.recorder.enter(Phase::Dumped) } else { self.recorder.remove() };
        if let Err(error) = kept {
            log::error!("{}", chain(&error));
        }
    }

    /// Records the lock that is left in a namespace. Where a stock dump's own is there again, as if nothing had been,
    /// it is none of ours.
    fn record_lock(&mut self, ns: &NetNs, name: Option<LockName>) {
        self.recorder.forget_locks_in(ns);
        let id = self.recorder.record().id.as_str();
        if let Some(name) = name.filter(|name| name.id() == id) {
            self.recorder.add_lock(LockRecord { ns: NsId::from(ns), name, method: self.options.method });
        }
    }

    /// Leaves the lock as it was before the restore, and says which is there.
    fn lock_as_before(&self, lock: NetworkLock, tuples: &[FourTuple]) -> Result<Option<LockName>, LockError> {
        match (self.index.network_lock, dump_lock(&self.index)) {
            // CRIU may have removed the dump's table by now.
            (ImageLock::Nftables, Some(name)) => {
                let ns = lock.namespace().clone();
                let ours = lock.name().clone();
                lock.keep();
                lock::rename(&ns, &ours, &name, tuples, &self.options)?.keep();
                Ok(Some(name))
            }
            // The dump's rules are still there.
            (ImageLock::Iptables, _) if *lock.namespace() == self.home => {
                lock.unlock()?;
                Ok(None)
            }
            _ => {
                let name = lock.name().clone();
                lock.keep();
                Ok(Some(name))
            }
        }
    }
}

/// The dump's record, or a new one where that was made by stock CRIU, on another host, or before a reboot.
fn recorder(index: &Index, lock: &LockName, images: &ImageDir, criu: i32) -> Result<Recorder, AgentError> {
    let named = index.dump_run_id.as_deref().filter(|_| !index.tcp_close);
    let id = match named.and_then(|id| id.parse::<RecordId>().ok()) {
        None => Recorder::id_of_folder(images.as_fd())?,
        some => some,
    };
    match id.map_or(Ok(None), |id| Recorder::take_over(&id, criu)) {
        Ok(Some(recorder)) => return Ok(recorder),
        // The images have all that a restore needs.
        Err(error) if error.is_unreadable() => log::warn!("{}", chain(&error)),
        other => drop(other?),
    }
    let mut recorder = Recorder::new(lock.id(), Phase::Restoring, images.as_fd(), criu)?;
    let connections = index.connections.values().filter(|connection| connection.has_stream);
    recorder.add_connections(connections.map(|connection| ConnectionRecord {
        local: connection.tuple.local,
        remote: connection.tuple.remote,
        ino: connection.ino,
        cookie: 0,
        pid: None,
        fd: None,
        reuse_addr: connection.reuseaddr,
    }));
    Ok(recorder)
}

/// Where an agent died before it could close the sockets silently, their tasks' end has closed them aloud. Behind the lock
/// they wait in vain for an answer to their FINs, and hold addresses that CRIU needs for its listeners.
fn destroy_orphans(ns: &NetNs, tuples: &[FourTuple]) {
    match ns.run(|| diag::destroy_orphans(tuples)) {
        Ok(Ok(0)) => {}
        Ok(Ok(count)) => log::info!("{ns}: destroyed {count} orphans that held the connections' addresses"),
        Ok(Err(error)) => log::warn!("{ns}: orphans may hold the connections' addresses: {}", chain(&error)),
        Err(error) => log::warn!("{ns}: orphans may hold the connections' addresses: {}", chain(&error)),
    }
}

/// The lock of this restore: the same at every try, so that the next one replaces it.
fn lock_name(index: &Index) -> Result<LockName, AgentError> {
    let id = index.dump_run_id.as_deref().unwrap_or("restore");
    let short: String = id.chars().filter(char::is_ascii_alphanumeric).take(20).collect();
    Ok(LockName::soccr(if short.is_empty() { "restore" } else { &short })?)
}

/// The table that the images say they are locked by.
fn dump_lock(index: &Index) -> Option<LockName> {
    LockName::of_run(index.dump_run_id.as_deref()?)
}

fn copy(task: &Task, number: u32) -> Result<OwnedFd, AgentError> {
    task.copy(RemoteFd(number)).map_err(|source| AgentError::Task { pid: task.pid, source })
}

/// A connection that is whole, out of repair mode, and waits to be unlocked.
struct Awake {
    socket: OwnedFd,
    tuple: FourTuple,
    reuse_addr: bool,
}

fn leave_repair(built: Built) -> Result<Awake, AgentError> {
    let (tuple, reuse_port, paused) = (built.tuple, built.reuse_port, built.into_paused());
    let failed = |source| AgentError::Socket { tuple, pid: 0, source };
    if let Some(on) = reuse_port {
        sockopt::set_reuse_port(paused.socket(), on).map_err(failed)?;
    }
    let reuse_addr = paused.reuse_addr();
    let socket = paused.resume(Probe::None)?;
    Ok(Awake { socket, tuple, reuse_addr })
}

/// Only in repair mode a socket is closed without a word, and gives its addresses back at once.
fn enter_repair(awake: Awake) -> Option<Built> {
    let Awake { socket, tuple, .. } = awake;
    let paused =
        Paused::pause_only(socket).inspect_err(|error| log::error!("closed aloud: {}", chain(error))).ok()?;
    Some(Built::new(paused, tuple, None))
}
