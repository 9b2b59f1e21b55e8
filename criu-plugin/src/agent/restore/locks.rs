//! The locks of a restore, and the record that tells of them.

use std::collections::{HashMap, HashSet};

use soccr::chain;
use soccr::connection::FourTuple;
use soccr::criu::image::inventory::NetworkLock as ImageLock;
use soccr::criu::image::side::{Place, TreeListener};
use soccr::criu::keeper;
use soccr::criu::record::{self, LockRecord, NsId, Phase, Record, RecordError, Recorder};
use soccr::criu::stock;
use soccr::criu::tasks::Task;
use soccr::kernel::diag;
use soccr::kernel::netns::NetNs;
use soccr::lock::conntrack;
use soccr::lock::held::{HeldPackets, Holder};
use soccr::lock::{self, Listener, LockError, LockName, LockOptions, Method, NetworkLock};

use super::plan::Plan;
use crate::agent::error::AgentError;
use crate::agent::listeners;
use crate::agent::path::Path;

/// What keeps the connections still until all are built. It ends in [`unlock`](Self::unlock) or
/// [`put_back`](Self::put_back).
#[derive(Debug)]
pub struct Locks {
    /// The namespace that criu runs in.
    criu_ns: NetNs,
    /// The namespace of the tree's root, once it is there.
    root_ns: Option<NetNs>,
    options: LockOptions,
    name: LockName,
    left: LeftByDump,
    recorder: Recorder,
    held: HashMap<NetNs, Locked>,
    /// The lock on the way to namespaces other than criu's.
    path: Path,
    /// What the locks keep from the sockets.
    pub holder: Holder,
    listeners: Vec<TreeListener>,
    /// The ports at which others listen, where that was known before CRIU could listen at ours.
    taken: HashMap<NetNs, HashSet<u16>>,
    /// What conntrack is still to know as established before it is unlocked.
    unknown: Vec<(NetNs, Vec<FourTuple>)>,
}

/// The lock of one namespace.
#[derive(Debug)]
struct Locked {
    lock: NetworkLock,
    tuples: HashSet<FourTuple>,
}

/// What the dump, or an earlier try, has left on this host.
#[derive(Debug)]
struct LeftByDump {
    /// How the dump kept packets away, as the images say.
    method: ImageLock,
    /// The table of the criu that dumped.
    run_lock: Option<LockName>,
    /// All tables that the images name.
    tables: Vec<LockName>,
    /// There is a lock that waits for this restore.
    waits: bool,
    /// The dump, or an earlier restore of it, did not come to its end.
    interrupted: bool,
}

impl Locks {
    /// Nothing is locked yet.
    pub fn new(plan: &Plan, criu: &Task, taken: HashMap<NetNs, HashSet<u16>>) -> Result<Self, AgentError> {
        let name = plan.lock_name()?;
        let recorder = plan.recorder(&name, criu.pid)?;
        let waits = !recorder.record().locks.is_empty();
        let left = LeftByDump {
            method: plan.index.network_lock,
            run_lock: plan.index.run_lock(),
            tables: plan.dump_locks.clone(),
            waits,
            interrupted: waits && recorder.record().phase != Phase::Dumped,
        };
        let criu_ns = NetNs::of_task(criu.pid.cast_unsigned())?;
        let waited = (!left.interrupted).then(|| record::ended_locks(recorder.record(), &criu_ns));
        waited.iter().flatten().for_each(|ended| log::warn!("{ended}"));
        if left.interrupted {
            destroy_recorded_orphans(recorder.record(), &criu_ns, &plan.tuples(|_| true));
        }
        let options = LockOptions::from_env()?;
        let mut path = Path::new(&criu_ns, &plan.path_owner()?);
        let recorded = recorder.record().translations.iter();
        // Those of the old addresses concern nobody.
        let recorded = recorded.filter(|_| plan.rules.remap.is_empty());
        path.add_translations(recorded.chain(&plan.translations).copied());
        let (held, holder, listeners) = (HashMap::new(), Holder::from_env()?, plan.listeners.clone());
        let (root_ns, unknown) = (None, Vec::new());
        Ok(Self {
            criu_ns,
            root_ns,
            options,
            name,
            left,
            recorder,
            held,
            path,
            holder,
            listeners,
            taken,
            unknown,
        })
    }

    /// What keeps packets away.
    pub fn method(&self) -> Method {
        self.options.method
    }

    /// Whether there are locks of the dump, or of an earlier try: it was made on this host.
    pub fn are_of_dump(&self) -> bool {
        self.left.waits
    }

    /// Whether this one is.
    pub fn has(&self, ns: &NetNs, tuple: &FourTuple) -> bool {
        self.held.get(ns).is_some_and(|locked| locked.tuples.contains(tuple))
    }

    /// The namespace that criu runs in.
    pub fn criu_ns(&self) -> &NetNs {
        &self.criu_ns
    }

    /// The root task lives in this namespace.
    pub fn found_root(&mut self, ns: NetNs) {
        self.root_ns = Some(ns);
    }

    /// A dump that was restored already has no record. Its connections are alive then, and a lock would harm them.
    ///
    /// Of a dump that waits a task may still be about to end. But those that nobody had `accepted` are in no task since then:
    /// the images can name somebody else's.
    pub fn refuse_living(
        &self,
        ns: &NetNs,
        mut tuples: Vec<FourTuple>,
        accepted: &HashSet<FourTuple>,
    ) -> Result<(), AgentError> {
        tuples.retain(|tuple| !self.left.waits || accepted.contains(tuple));
        if tuples.is_empty() {
            return Ok(());
        }
        match ns.run(|| diag::find_owned(&tuples))? {
            Ok(Some(tuple)) => Err(AgentError::Alive(tuple)),
            Ok(None) => Ok(()),
            Err(error) => {
                log::warn!("cannot tell whether the connections are alive already: {error}");
                Ok(())
            }
        }
    }

    /// Locks these connections where their packets pass through criu's own namespace. The record comes first.
    pub fn lock_path(&mut self, passing: Vec<FourTuple>) -> Result<(), AgentError> {
        self.holder.expect(passing.iter().copied());
        self.path.add(passing);
        self.path.listeners = self.listeners_at(Place::OnPath);
        self.holder.expect_translated(self.path.translations());
        if let Some(lock) = self.path.record(&self.options) {
            self.recorder.add_lock(lock);
            self.recorder.set_translations(self.path.translations());
            self.recorder.save(Phase::Restoring)?;
        }
        self.path.lock(&self.holder.options(&self.criu_ns, &self.options), self.holder.newcomers)?;
        let unknown = self.path.take_unknown();
        if !unknown.is_empty() {
            self.unknown.push((self.criu_ns.clone(), unknown));
        }
        Ok(())
    }

    /// Locks these connections, those that are not locked yet, each in its namespace. The record comes first.
    pub fn lock(&mut self, wanted: HashMap<NetNs, Vec<FourTuple>>) -> Result<(), AgentError> {
        let mut missing = wanted;
        for (ns, tuples) in &mut missing {
            if let Some(locked) = self.held.get(ns) {
                tuples.retain(|tuple| !locked.tuples.contains(tuple));
            }
        }
        missing.retain(|ns, tuples| {
            let listens = || !self.held.contains_key(ns) && !self.listeners_in(ns).is_empty();
            !tuples.is_empty() || listens()
        });
        let new: Vec<&NetNs> = missing.keys().filter(|ns| !self.held.contains_key(ns)).collect();
        if !new.is_empty() && self.options.method != Method::Skip {
            for ns in new {
                self.recorder.add_lock(self.record_of(ns, self.name.clone()));
            }
            self.recorder.save(Phase::Restoring)?;
        }
        missing.into_iter().try_for_each(|(ns, tuples)| self.lock_in(ns, tuples))
    }

    fn lock_in(&mut self, ns: NetNs, tuples: Vec<FourTuple>) -> Result<(), AgentError> {
        self.holder.expect(tuples.iter().copied());
        if let Some(locked) = self.held.get_mut(&ns) {
            locked.lock.add(&tuples)?;
            locked.tuples.extend(&tuples);
        } else {
            let options = self.holder.options(&ns, &self.options);
            let lock = NetworkLock::lock(&ns, &self.name, &tuples, &options)?;
            self.taken.entry(ns.clone()).or_insert_with(|| listeners::taken_ports(&ns));
            let listeners = self.own_listeners_in(&ns);
            let held = *self.home() == ns;
            if held {
                self.holder.expect_newcomers(&listeners);
            }
            listeners::stop_newcomers(&lock, &listeners, self.holder.newcomers, held);
            self.held.insert(ns.clone(), Locked { lock, tuples: tuples.iter().copied().collect() });
        }
        if self.left.interrupted {
            destroy_orphans(&ns, &tuples);
        }
        self.unknown.push((ns, tuples));
        Ok(())
    }

    /// Whether conntrack is still to be told of locked connections.
    pub fn is_behind(&self) -> bool {
        !self.unknown.is_empty()
    }

    /// Tells it of some of them.
    pub fn establish_some(&mut self) {
        const SOME: usize = 256;
        let Some((ns, mut tuples)) = self.unknown.pop() else { return };
        let some = tuples.split_off(tuples.len().saturating_sub(SOME));
        match conntrack::establish(&ns, &some) {
            Ok(()) if tuples.is_empty() => {}
            Ok(()) => self.unknown.push((ns, tuples)),
            Err(error) => {
                log::warn!("{ns}: a stateful firewall may drop the connections' packets: {}", chain(&error))
            }
        }
    }

    /// In a namespace of the tree's own all those that are not beside criu: nobody else listens there.
    fn listeners_in(&self, ns: &NetNs) -> Vec<Listener> {
        self.listeners_at(if *ns == self.criu_ns { Place::BesideCriu } else { Place::Inside })
    }

    /// Of these the tree's alone: at their ports nobody listened before the restore, as far as that is known.
    fn own_listeners_in(&self, ns: &NetNs) -> Vec<Listener> {
        let Some(taken) = self.taken.get(ns) else { return Vec::new() };
        let mut listeners = self.listeners_in(ns);
        listeners.retain(|listener| !taken.contains(&listener.local.port()));
        listeners
    }

    fn listeners_at(&self, place: Place) -> Vec<Listener> {
        let there = self.listeners.iter().filter(|listener| listener.place == place);
        there.map(|listener| listener.listener).collect()
    }

    /// A restore has failed, maybe for want of an address to listen at, which CRIU does not name.
    pub fn name_missing_addresses(&self) {
        let inside = self.root_ns.as_ref().map(|ns| (ns, Place::Inside));
        for (ns, place) in inside.into_iter().chain([(&self.criu_ns, Place::BesideCriu)]) {
            for local in listeners::without_address(ns, &self.listeners_at(place)) {
                log::error!(
                    "{ns}: CRIU cannot listen at {local}, which is no address of this namespace: give it the address, or set \
                     net.ipv4.ip_nonlocal_bind there for the restore (CRIU sets IP_FREEBIND after bind())"
                );
            }
        }
    }

    /// Lets those in who would connect to a listener of the tree, and of the images' nobody else.
    pub fn let_in(&self, held: &mut HeldPackets) {
        held.keep_newcomers_of(&self.own_listeners_in(self.home()));
        held.let_in(self.home());
    }

    /// The namespace whose newcomers are let in.
    fn home(&self) -> &NetNs {
        let beside = self.listeners_at(Place::BesideCriu);
        self.root_ns.as_ref().filter(|_| beside.is_empty()).unwrap_or(&self.criu_ns)
    }

    fn record_of(&self, ns: &NetNs, name: LockName) -> LockRecord {
        LockRecord { ns: NsId::from(ns), name, method: self.options.method }
    }

    /// All connections are whole: from here on the record says so, and that these are their tasks.
    pub fn record_waking(&mut self, tasks: &[Task]) -> Result<(), RecordError> {
        self.recorder.forget_tasks();
        tasks.iter().for_each(|task| self.recorder.add_task(task.pid));
        self.recorder.enter(Phase::Waking)
    }

    /// Removes all that keeps the connections still, the dump's included.
    pub fn unlock(&mut self) -> Result<(), LockError> {
        while self.is_behind() {
            self.establish_some();
        }
        self.unlock_path()?;
        for (ns, Locked { lock, tuples }) in self.held.drain() {
            let tuples: Vec<FourTuple> = tuples.into_iter().collect();
            // Our lock (which stock CRIU removes in its own namespace only), maybe made by another method, or the rules of
            // a stock dump, which CRIU leaves alone with --tcp-close.
            for name in &self.left.tables {
                lock::remove(&ns, self.options.method, name)?;
            }
            // Not the restore's own, which goes last: after a deletion the kernel lets the next transaction wait.
            let others = |left: &&LockRecord| left.ns == NsId::from(&ns) && left.name != *lock.name();
            for left in self.recorder.record().locks.iter().filter(others) {
                lock::remove(&ns, left.method, &left.name)?;
            }
            if self.left.method == ImageLock::Iptables && ns == self.criu_ns {
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

    /// What was held since the dump. From here on our own locks hold.
    pub fn take_kept(&self) -> HeldPackets {
        self.recorder.held().filter(|_| self.left.waits).map(|door| keeper::take(&door)).unwrap_or_default()
    }

    /// What the locks have kept from the sockets.
    pub fn take_held(&mut self) -> HeldPackets {
        std::mem::take(&mut self.holder).finish()
    }

    fn unlock_path(&mut self) -> Result<(), LockError> {
        self.path.unlock()?;
        self.path.record(&self.options).iter().for_each(|lock| self.recorder.forget_lock(lock));
        Ok(())
    }

    /// The restore is done: there is nothing to tell any more.
    pub fn forget_record(&mut self) {
        if let Err(error) = self.recorder.remove() {
            log::error!("{}", chain(&error));
        }
    }

    /// The restore failed: the locks become what they were before it.
    pub fn put_back(mut self) {
        for (ns, Locked { lock, tuples }) in std::mem::take(&mut self.held) {
            match self.put_back_one(lock, tuples) {
                Ok(name) => self.record_left(&ns, name),
                Err(error) => log::error!("{ns}: the connections may be unlocked: {}", chain(&error)),
            }
        }
        // What nobody has held before may be alive elsewhere on this host.
        if self.left.waits {
            self.path.keep();
        } else if let Err(error) = self.unlock_path() {
            log::error!("the connections stay locked on their way: {}", chain(&error));
        }
        self.recorder.forget_tasks();
        let waits = self.recorder.record().has_locks();
        let kept = if waits { self.recorder.enter(Phase::Dumped) } else { self.recorder.remove() };
        if let Err(error) = kept {
            log::error!("{}", chain(&error));
        }
    }

    /// Leaves the lock as it was before the restore, and says what is there of ours.
    fn put_back_one(
        &self,
        lock: NetworkLock,
        tuples: HashSet<FourTuple>,
    ) -> Result<Option<LockName>, LockError> {
        let ns = lock.namespace().clone();
        let dumped_here = ns == self.criu_ns || Some(&ns) == self.root_ns.as_ref();
        match (self.left.method, &self.left.run_lock) {
            // CRIU may have removed the dump's table by now.
            (ImageLock::Nftables, Some(name)) if dumped_here => {
                let ours = lock.name().clone();
                lock.keep();
                let tuples: Vec<FourTuple> = tuples.into_iter().collect();
                let dumps = lock::rename(&ns, &ours, name, &tuples, &self.options)?;
                listeners::stop_newcomers(&dumps, &self.listeners_in(&ns), self.holder.newcomers, false);
                dumps.keep();
                // A stock dump's own, as if nothing had been, is none of ours.
                let is_ours = name.id() == self.recorder.record().id.as_str();
                Ok(is_ours.then(|| name.clone()))
            }
            // The dump's rules are still there.
            (ImageLock::Iptables, _) if ns == self.criu_ns => lock.unlock().map(|_| None),
            _ => {
                let name = lock.name().clone();
                lock.keep();
                Ok(Some(name))
            }
        }
    }

    /// Records what is left of ours in a namespace; the dump's is recorded already.
    fn record_left(&mut self, ns: &NetNs, name: Option<LockName>) {
        let restores = self.record_of(ns, self.name.clone());
        self.recorder.forget_lock(&restores);
        if let Some(name) = name {
            self.recorder.add_lock(self.record_of(ns, name));
        }
    }
}

/// In namespaces that criu or its tasks will enter, and where the dump's lock is: CRIU makes its listeners as soon as a task
/// is there, and does not wait for us.
fn destroy_recorded_orphans(record: &Record, criu_ns: &NetNs, tuples: &[FourTuple]) {
    let there = record::all_namespaces();
    let locked: HashSet<NsId> = record.locks.iter().map(|lock| lock.ns).collect();
    for ns in locked.into_iter().filter_map(|ns| there.get(ns)).filter(|ns| *ns != criu_ns) {
        destroy_orphans(ns, tuples);
    }
}

/// Where an agent died before it could close the sockets silently, their tasks' end has closed them with a FIN. Behind the
/// lock they wait in vain for an answer to it, and hold addresses that CRIU needs for its listeners.
fn destroy_orphans(ns: &NetNs, tuples: &[FourTuple]) {
    match ns.run(|| diag::destroy_orphans(tuples)) {
        Ok(Ok(0)) => {}
        Ok(Ok(count)) => log::info!("{ns}: destroyed {count} orphans that held the connections' addresses"),
        Ok(Err(error)) => log::warn!("{ns}: orphans may hold the connections' addresses: {}", chain(&error)),
        Err(error) => log::warn!("{ns}: orphans may hold the connections' addresses: {}", chain(&error)),
    }
}
