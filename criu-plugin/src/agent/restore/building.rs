//! The connections are built as their tasks come, locked and in repair mode.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use soccr::connection::{FourTuple, Queues};
use soccr::criu::image::index::Packet;
use soccr::criu::parallel;
use soccr::criu::rules::Action;
use soccr::criu::tasks::{self, Duplicates, Fate, FindError, OwnerMap, SocketNamespaces, Task, in_flight};
use soccr::criu::warm::Warmth;
use soccr::forge::Forge;
use soccr::kernel::netns::NetNs;
use soccr::kernel::process::RemoteFd;
use soccr::kernel::{SysError, interface, sockopt, tcp};
use soccr::repair::{Paused, Probe, four_tuple};

use super::builder::{Begun, Builder, Built, Made, Standing, Wanted, Windows, must_live};
use super::locks::Locks;
use super::plan::Plan;
use super::preloaded::Preloaded;
use crate::agent::error::AgentError;
use crate::agent::profile::Profile;
use crate::agent::queued::{Putter, Queued, Source, Waiting};
use crate::fault;

/// A restore whose connections are not all built yet.
#[derive(Debug)]
pub struct Building<'a> {
    pub criu: &'a Task,
    pub plan: Plan,
    pub preloaded: Preloaded,
    pub locks: Locks,
    /// CRIU's numbers of the namespaces that are locked as tasks live in them.
    locked: HashSet<u32>,
    pub tree: Tree,
    /// What was not found in a task yet.
    pub missing: Missing,
    namespaces: SocketNamespaces,
    pub forge: Forge,
    windows: Windows,
    pub built: Vec<Standing>,
    /// The sockets of those that are built.
    pub duplicates: Duplicates,
    /// Listeners whose queues were not empty, by their inodes at the dump.
    listeners: HashMap<u32, Rc<OwnedFd>>,
    /// What is in their queues again.
    pub waiting: Vec<Waiting>,
}

/// The restored tasks.
#[derive(Debug, Default)]
pub struct Tree {
    /// The root, once it is there.
    root: Option<Task>,
    /// Those whose hook has come.
    pub restored: Vec<Task>,
    /// Inner pids of those whose hook is still to come.
    awaited: HashSet<u32>,
}

/// What is still to be brought back.
#[derive(Debug)]
pub struct Missing {
    /// File ids of connections.
    pub connections: HashSet<u32>,
    /// File ids and inodes of other sockets of which CRIU's images do not tell all, or whose queues were not empty.
    unconnected: HashMap<u32, u32>,
    /// What was in flight in unix sockets, by their file ids.
    in_flight: HashMap<u32, Vec<Packet>>,
    /// Connections that RESTORE_EXT_FILE makes, with their SO_REUSEADDR.
    external: HashMap<FourTuple, bool>,
}

impl<'a> Building<'a> {
    /// Nothing is built, and nothing locked.
    pub fn begin(mut plan: Plan, locks: Locks, criu: &'a Task) -> Self {
        let alive = plan.index.tasks.iter().filter(|(_, task)| task.alive);
        let tree = Tree { awaited: alive.map(|(pid, _)| *pid).collect(), ..Tree::default() };
        let missing = Missing {
            unconnected: plan.unconnected(),
            connections: plan.index.carried().map(|connection| connection.file_id).collect(),
            in_flight: std::mem::take(&mut plan.index.in_flight),
            external: plan.external.clone(),
        };
        let (namespaces, forge) = (SocketNamespaces::default(), Forge::behind(locks.method()));
        let usual = if locks.are_of_dump() { Warmth::Keep } else { Warmth::Fresh };
        let windows = Windows::new(plan.rules.warm.unwrap_or(usual));
        let preloaded = Preloaded::none_of(&plan.index);
        let locked = plan.index.root_net_ns_id.into_iter().collect();
        Self {
            criu,
            plan,
            preloaded,
            locks,
            locked,
            tree,
            missing,
            namespaces,
            forge,
            windows,
            built: Vec::new(),
            duplicates: Duplicates::default(),
            listeners: HashMap::new(),
            waiting: Vec::new(),
        }
    }

    /// Whether hooks of tasks are still to come.
    pub fn awaits_tasks(&self) -> bool {
        !self.tree.awaited.is_empty()
    }

    /// init(): what is alive in criu's own namespace, or in one that criu was given, is not restored again, and not locked.
    pub fn refuse_living(&self, inherited: &[NetNs]) -> Result<(), AgentError> {
        let accepted = self.plan.accepted.iter().map(|accepted| accepted.tuple).collect();
        self.locks.refuse_living(self.locks.criu_ns(), self.beside_criu(), &accepted)?;
        let passing = self.plan.passing();
        let mut others = inherited.iter().filter(|ns| *ns != self.locks.criu_ns());
        others.try_for_each(|ns| self.locks.refuse_living(ns, passing.clone(), &accepted))
    }

    fn beside_criu(&self) -> Vec<FourTuple> {
        let mut tuples = self.plan.tuples(|net_ns_id| self.plan.is_beside_criu(net_ns_id));
        tuples.extend(self.plan.external.keys());
        tuples
    }

    /// init(): locks what is to be restored in criu's own namespace, and what passes through it.
    pub fn lock_beside_criu(&mut self) -> Result<(), AgentError> {
        let tuples = self.beside_criu();
        self.locks.lock_path(self.plan.passing())?;
        let ns = self.locks.criu_ns().clone();
        self.locks.lock(HashMap::from([(ns.clone(), tuples)]))?;
        self.plan.add_held(self.locks.take_kept());
        self.await_addresses(&ns, |id| id.is_none() || id == self.plan.index.root_net_ns_id)
    }

    /// Those that sockets of these namespaces have, and no longer than the rules say. What is bound to an address that is not
    /// there then says so itself. CRIU binds its listeners after init(), but in namespaces other than its own before we
    /// know these.
    fn await_addresses(&self, ns: &NetNs, here: impl Fn(Option<u32>) -> bool) -> Result<(), AgentError> {
        let Some(patience) = self.plan.rules.wait_address else { return Ok(()) };
        let until = Instant::now() + patience;
        for (_, ip) in self.plan.addresses.iter().filter(|(id, _)| here(*id)) {
            if self.is_local(ns, *ip, Instant::now())? {
                continue;
            }
            log::warn!("{ip} is no address here yet: waiting for at most {} s", patience.as_secs());
            if !self.is_local(ns, *ip, until)? {
                log::warn!("{ip} is no address here after {} s", patience.as_secs());
            }
        }
        Ok(())
    }

    fn is_local(&self, ns: &NetNs, ip: IpAddr, until: Instant) -> Result<bool, AgentError> {
        let failed = |source| AgentError::Task { pid: self.criu.pid, source };
        ns.run(|| interface::await_local(ip, until))?.map_err(failed)
    }

    /// init(): where CRIU does not make the tree's namespace itself, it was given it as a descriptor (`--inherit-fd`): peers
    /// reach it already.
    pub fn lock_inherited(&mut self, inherited: Vec<NetNs>) -> Result<(), AgentError> {
        let passing = self.plan.passing();
        let inherited: HashSet<NetNs> =
            inherited.into_iter().filter(|ns| ns != self.locks.criu_ns() && !passing.is_empty()).collect();
        if inherited.len() == 1 {
            inherited.iter().for_each(|ns| self.locks.found_root(ns.clone()));
        }
        self.locks.lock(inherited.into_iter().map(|ns| (ns, passing.clone())).collect())
    }

    /// POST_FORKING: the root task is there, and no other has entered a namespace of its own.
    pub fn forked(&mut self) -> Result<(), AgentError> {
        if (!self.missing.connections.is_empty() || !self.plan.accepted.is_empty())
            && let Some(inner) = self.plan.index.root
            && let Some(pid) = tasks::restored_child(self.criu.pid, inner).map_err(AgentError::Tree)?
        {
            self.found_root(pid)?;
            self.lock_namespaces(&[pid])?;
        }
        Ok(fault::point("restore.forked")?)
    }

    fn found_root(&mut self, pid: i32) -> Result<(), AgentError> {
        self.tree.root = Some(Task::open(pid).map_err(|source| AgentError::Task { pid, source })?);
        self.locks.found_root(NetNs::of_task(pid.cast_unsigned())?);
        Ok(())
    }

    /// Locks what is to be restored in the namespaces that these tasks live in. A task that cannot be looked at is a helper
    /// of CRIU that ends.
    fn lock_namespaces(&mut self, pids: &[i32]) -> Result<(), AgentError> {
        let (mut wanted, mut ids) = (HashMap::<_, Vec<_>>::new(), Vec::new());
        for pid in pids {
            let Ok(ns) = NetNs::of_task(pid.cast_unsigned()) else { continue };
            let task = tasks::inner_pid(*pid).ok().and_then(|inner| self.plan.index.tasks.get(&inner));
            if let Some(id) = task.and_then(|task| task.net_ns_id)
                && self.locked.insert(id)
            {
                let tuples = self.plan.tuples(|net_ns_id| net_ns_id == Some(id));
                ids.push((ns.clone(), id));
                wanted.entry(ns).or_default().extend(tuples);
            }
        }
        self.locks.lock(wanted)?;
        ids.iter().try_for_each(|(ns, id)| self.await_addresses(ns, |its| its == Some(*id)))
    }

    /// RESUME_DEVICES_LATE: brings back the connections of one task.
    pub fn bring_back(&mut self, pid: i32) -> Result<(), AgentError> {
        fault::actors(None, Some(pid));
        fault::point("restore.asked")?;
        let mut profile = Profile::start("restore");
        let inner = tasks::inner_pid(pid).map_err(AgentError::Tree)?;
        if self.plan.index.root == Some(inner) && self.tree.root.is_none() {
            self.found_root(pid)?;
        }
        if self.tree.restored.is_empty() {
            self.lock_whole_tree(pid)?;
        }
        self.tree.awaited.remove(&inner);
        let task = Task::open(pid).map_err(|source| AgentError::Task { pid, source })?;
        let wanted = self.find(&task, inner)?;
        profile.lap("find");
        self.lock_sockets(&wanted, pid)?;
        profile.lap("lock");
        self.keep_listeners(&wanted, pid)?;
        let Self { criu, plan, preloaded, forge, windows, .. } = self;
        let owners = OwnerMap::of(pid).map_err(|error| FindError::Proc(pid, error))?;
        let builder = Builder { plan, preloaded, forge, windows, criu, pid, owners };
        let (begun, result) =
            parallel::for_each(wanted, Queues::default, |queues, wanted| builder.build(wanted, queues));
        let (mut all, mut opened) = (Vec::new(), Vec::new());
        for begun in begun.into_iter().flatten() {
            match begun {
                Begun::Built(built) => all.push(built),
                Begun::Opened(ready, opening) => opened.push((ready, opening)),
            }
        }
        result?;
        // They were opened all together, and the time after which each is answered has passed for all of them.
        let (built, result) = parallel::for_each(opened, Queues::default, |queues, (ready, opening)| {
            builder.build_opened(*ready, opening, queues)
        });
        result?;
        all.into_iter().chain(built).try_for_each(|built| self.keep(built))?;
        self.adopt_external(&task)?;
        profile.lap("build");
        self.tree.restored.push(task);
        Ok(())
    }

    /// Until all are built.
    fn keep(&mut self, built: Built) -> Result<(), AgentError> {
        let Built { tuple, reuse_port, probe, .. } = built;
        let paused = built.into_paused();
        let reuse_addr = paused.reuse_addr();
        let slot = self.duplicates.add(paused.release()).map_err(AgentError::Duplicates)?;
        self.built.push(Standing { slot, tuple, reuse_addr, reuse_port, probe });
        Ok(())
    }

    /// All tasks are there when the first of these hooks comes, each in its namespace. A criu without POST_FORKING (before
    /// 4.2) has told of none of them yet.
    fn lock_whole_tree(&mut self, first: i32) -> Result<(), AgentError> {
        let namespaces = self.plan.index.tasks.values().filter_map(|task| task.net_ns_id);
        if namespaces.into_iter().all(|id| self.locked.contains(&id)) {
            return Ok(());
        }
        let root = self.tree.root.as_ref().map_or(first, |root| root.pid);
        self.lock_namespaces(&tasks::tree(root))
    }

    /// The sockets that CRIU has made for connections in this task.
    fn find(&mut self, task: &Task, inner: u32) -> Result<Vec<Wanted>, AgentError> {
        let fds = self.plan.index.tasks.get(&inner).map(|task| task.fds.clone()).unwrap_or_default();
        self.duplicates.leave_room(fds.len()).map_err(AgentError::Duplicates)?;
        let mut wanted = Vec::new();
        for fd in fds.iter() {
            let Ok(number) = u32::try_from(fd.fd) else { continue };
            let copy =
                || task.copy(RemoteFd(number)).map_err(|source| AgentError::Task { pid: task.pid, source });
            if let Some(kind) = self.missing.take(fd.file_id) {
                wanted.push((kind, copy()?));
            } else if self.missing.in_flight.contains_key(&fd.file_id) {
                self.missing.find_in_flight(fd.file_id, &copy()?, task.pid, &mut wanted)?;
            }
        }
        Ok(wanted)
    }

    /// Nothing is built where it is not locked: each socket's own namespace counts, whatever the images say.
    fn lock_sockets(&mut self, sockets: &[Wanted], pid: i32) -> Result<(), AgentError> {
        let mut wanted: HashMap<NetNs, Vec<FourTuple>> = HashMap::new();
        for (made, socket) in sockets {
            let Made::Connection(file_id) = made else { continue };
            let Some(connection) = self.plan.index.connections.get(file_id) else { continue };
            if connection.tuple.local.port() != 0 {
                let ns = self.namespaces.of(socket.as_fd()).map_err(|source| AgentError::SocketNs {
                    tuple: connection.tuple,
                    pid,
                    source,
                })?;
                if !self.locks.has(&ns, &connection.tuple) {
                    wanted.entry(ns).or_default().push(connection.tuple);
                }
            }
        }
        self.locks.lock(wanted)
    }

    /// The queues of these listeners were not empty, and will be filled when all is built.
    fn keep_listeners(&mut self, sockets: &[Wanted], pid: i32) -> Result<(), AgentError> {
        for (made, socket) in sockets {
            if let Made::Unconnected(ino) = made
                && self.plan.accepted.iter().any(|accepted| accepted.listener == *ino)
            {
                let failed = |error: std::io::Error| {
                    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(0));
                    AgentError::Task { pid, source: SysError { call: "duplicate a listener", errno } }
                };
                let copy = socket.try_clone().map_err(failed)?;
                self.listeners.insert(*ino, Rc::new(copy));
            }
        }
        Ok(())
    }

    /// Connections that RESTORE_EXT_FILE has built in the task, and left in repair mode.
    fn adopt_external(&mut self, task: &Task) -> Result<(), AgentError> {
        if self.missing.external.is_empty() {
            return Ok(());
        }
        let failed = |source| AgentError::Task { pid: task.pid, source };
        let sockets = task.sockets().map_err(|_| AgentError::Protocol("cannot list a task's sockets"))?;
        for (fd, _) in sockets {
            let socket = task.copy(fd).map_err(failed)?;
            let ours = sockopt::is_tcp(socket.as_fd()) && tcp::in_repair(socket.as_fd()).map_err(failed)?;
            let Some(tuple) = four_tuple(socket.as_fd()).ok().filter(|_| ours) else { continue };
            if let Some(reuse_addr) = self.missing.external.remove(&tuple) {
                let mut paused = Paused::pause(socket)?;
                paused.set_reuse_addr(reuse_addr);
                self.keep(Built::new(paused, tuple, None, Probe::Send))?;
            }
        }
        Ok(())
    }

    /// A host that restores descriptors only has them itself.
    pub fn adopt_without_tasks(&mut self) -> Result<(), AgentError> {
        if !self.plan.index.tasks.is_empty() {
            return Ok(());
        }
        self.adopt_external(self.criu)
    }

    /// Puts those that nobody had accepted back for their listeners, behind the lock of each listener's own namespace.
    pub fn fill_queues(&mut self) -> Result<(), AgentError> {
        let mut queued = Vec::new();
        for accepted in std::mem::take(&mut self.plan.accepted) {
            let tuple = accepted.tuple;
            let listener = self.listeners.get(&accepted.listener);
            let listener = listener.cloned().ok_or_else(|| AgentError::NotFound(tuple.to_string()))?;
            let ns = self.namespaces.of(listener.as_fd());
            let ns = ns.map_err(|source| AgentError::SocketNs { tuple, pid: 0, source })?;
            queued.push(Queued { listener, ns, accepted, source: Source::Image, action: Action::Keep });
        }
        if queued.is_empty() {
            return Ok(());
        }
        let mut wanted: HashMap<NetNs, Vec<FourTuple>> = HashMap::new();
        for (ns, tuple) in queued.iter().map(Queued::end) {
            wanted.entry(ns).or_default().push(tuple);
        }
        self.locks.lock(wanted)?;
        let (mut putter, count) = (Putter::default(), queued.len());
        for mut queued in queued {
            must_live(self.criu)?;
            self.waiting.push(putter.put(&mut queued, &self.plan.images, &self.forge)?);
        }
        log::info!("{count} connections wait to be accepted again");
        Ok(())
    }

    /// A task that was killed meanwhile makes criu fail, and the restore shall be one that can be tried again.
    pub fn tasks_live(&self) -> Result<(), AgentError> {
        let dead = |task: &&Task| matches!(task.fate(), Fate::Ending | Fate::Gone);
        match self.tree.restored.iter().find(dead) {
            Some(task) => Err(AgentError::Killed(task.pid)),
            None => Ok(()),
        }
    }

    /// Ends the tasks that are there, and waits until they have ended.
    pub fn kill_tasks(&self) {
        let tree = self.tree.root.as_ref().map(|root| tasks::tree(root.pid));
        let tree: Vec<Task> = tree.into_iter().flatten().filter_map(|pid| Task::open(pid).ok()).collect();
        for task in &tree {
            let _ = kill(Pid::from_raw(task.pid), Signal::SIGKILL);
        }
        for task in &tree {
            let mut gone = [PollFd::new(task.pidfd(), PollFlags::POLLIN)];
            let _ = poll(&mut gone, PollTimeout::from(5000_u16));
        }
    }

    /// Closes silently what was built, and leaves the locks as they were before the restore.
    pub fn give_up(self) {
        let Self { duplicates, locks, .. } = self;
        drop(duplicates);
        locks.put_back();
    }
}

impl Missing {
    fn take(&mut self, file_id: u32) -> Option<Made> {
        if self.connections.remove(&file_id) {
            return Some(Made::Connection(file_id));
        }
        self.unconnected.remove(&file_id).map(Made::Unconnected)
    }

    /// Connections inside a unix socket's queue, which holds the same packets as at the dump.
    fn find_in_flight(
        &mut self,
        unix_id: u32,
        unix: &OwnedFd,
        pid: i32,
        wanted: &mut Vec<Wanted>,
    ) -> Result<(), AgentError> {
        let Some(expected) = self.in_flight.remove(&unix_id) else { return Ok(()) };
        let messages = in_flight::peek(unix.as_fd()).map_err(|source| AgentError::Task { pid, source })?;
        for (expected, message) in expected.iter().zip(messages) {
            if expected.files.len() != message.files.len() {
                return Err(AgentError::Protocol("a unix socket's queue is not as in the images"));
            }
            for (file_id, socket) in expected.files.iter().zip(message.files) {
                if let Some(kind) = self.take(*file_id) {
                    wanted.push((kind, socket));
                } else if self.in_flight.contains_key(file_id) {
                    self.find_in_flight(*file_id, &socket, pid, wanted)?;
                }
            }
        }
        Ok(())
    }
}
