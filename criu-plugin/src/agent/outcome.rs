//! The outcome of a dump: do the tasks die or run on?
//!
//! criu's last hook comes before it kills or resumes the tasks, and does not say which: after a success they may
//! still run on (`--leave-running`, a post-dump script that fails). So the agent watches the tasks themselves.

use soccr::criu::image::inventory::{self, Inventory, NetworkLock as ImageLock};
use soccr::criu::image::nftables;
use soccr::criu::record::Phase;
use soccr::criu::tasks::{Fate, Task};
use soccr::kernel::netns::NetNs;
use soccr::lock::{self, LockName, Method};

use super::AgentError;
use super::dump::Dump;

use crate::host::{FinalState, final_state};

/// What the locks will be once the tasks are dead, arranged in the images already.
#[derive(Debug)]
pub(super) struct Arrangement {
    /// Our locks stay, in the images' name; otherwise CRIU's own lock of the whole namespace stays.
    ours_stays: bool,
    /// A table that CRIU made beside ours, and that nobody would delete.
    stray: Option<(NetNs, LockName)>,
}

impl Arrangement {
    /// Where the images could not be made stock's: the plugin restores them all the same.
    pub(super) fn as_it_is() -> Self {
        Self { ours_stays: true, stray: None }
    }

    /// Whether the tasks' death leaves our locks where they are.
    pub(super) fn ours_stays(&self) -> bool {
        self.ours_stays
    }

    /// The arrangement of an agent that died, as far as its record and the images tell.
    pub(super) fn of_dead_agent(dump: &Dump) -> Result<Self, AgentError> {
        let record = dump.recorder.record();
        if record.phase == Phase::Deciding {
            return Ok(Self { ours_stays: record.kept_after_death, stray: None });
        }
        let there = dump.images.contains(inventory::NAME);
        let arranged =
            there && Inventory::read(&dump.images)?.dump_run_id.as_deref() == Some(dump.lock_name.id());
        // Without --tcp-close there would have been nothing to take over.
        Ok(if arranged {
            Self::as_it_is()
        } else {
            Self::make(dump)?.unwrap_or(Self { ours_stays: false, stray: None })
        })
    }

    /// Makes the images ones that stock CRIU restores with `--tcp-established`: it must find no `tcp_close` in them, and
    /// a lock that it removes by itself. `None`: criu ran without `--tcp-close` and carried the connections itself.
    ///
    /// Where the tree shares criu's network namespace, that lock is ours: a table with the name that stock CRIU gives to
    /// its own. Where the tree has a namespace of its own, CRIU has locked that one as a whole (and, if it dumps the
    /// namespace, its rules are in the images): then ours must not come back with the namespace.
    pub(super) fn make(dump: &Dump) -> Result<Option<Self>, AgentError> {
        if !dump.images.contains(inventory::NAME) {
            return Ok(Some(Self::as_it_is())); // a host that is not CRIU
        }
        let inventory = Inventory::read(&dump.images)?;
        if !inventory.tcp_close {
            return Ok(None);
        }
        let criu_ns = NetNs::of_task(dump.criu.pid.cast_unsigned())?;
        let root_ns = match dump.tasks.first() {
            Some(root) => NetNs::of_task(root.pid.cast_unsigned())?,
            None => criu_ns.clone(),
        };
        let shared = root_ns == criu_ns;
        let ours_stays = shared || inventory.network_lock == ImageLock::Skip;
        if ours_stays {
            inventory::release_to_stock(&dump.images, Some(dump.lock_name.id()))?;
        } else {
            nftables::strip_table(&dump.images, "inet", dump.lock_name.as_str())?;
            inventory::release_to_stock(&dump.images, None)?;
        }
        let made = shared && inventory.network_lock == ImageLock::Nftables;
        let id = inventory.dump_run_id.filter(|_| made);
        let stray = id.and_then(|id| LockName::of_run(&id)).map(|name| (criu_ns, name));
        Ok(Some(Self { ours_stays, stray }))
    }
}

/// What one look at the tasks says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing yet.
    Open,
    /// They are left stopped: dead or alive later on.
    Stopped,
    /// They run on.
    Alive,
    /// They are dead.
    Dead,
}

/// The outcome that is being waited for.
#[derive(Debug)]
pub(super) struct Outcome {
    arrangement: Arrangement,
    /// Looks in a row that found a task running.
    running: u32,
    stopped: bool,
}

impl Outcome {
    pub(super) fn new(arrangement: Arrangement) -> Self {
        Self { arrangement, running: 0, stopped: false }
    }

    /// How long to wait for an event until the next look.
    pub(super) fn patience_ms(&self) -> u16 {
        if self.stopped { 50 } else { 1 }
    }

    /// Looks at all tasks. A task that was killed runs for a moment towards its end and cannot always be told from one
    /// that lives, so "alive" must be seen several times in a row, unless CRIU's options say the same.
    pub(super) fn look(&mut self, tasks: &[Task]) -> Verdict {
        let convinced = if final_state() == FinalState::Alive { 1 } else { 5 };
        let fates: Vec<Fate> = tasks.iter().map(Task::fate).collect();
        self.running = if fates.contains(&Fate::Running) { self.running + 1 } else { 0 };
        let settled = |fate: &Fate| matches!(fate, Fate::Stopped | Fate::Gone);
        self.stopped = false;
        if fates.iter().all(|fate| *fate == Fate::Gone) {
            Verdict::Dead
        } else if self.running >= convinced {
            Verdict::Alive
        } else if fates.iter().all(settled) {
            self.stopped = true;
            Verdict::Stopped
        } else {
            Verdict::Open
        }
    }

    /// The tasks are dead: the connections leave this host without a word, and the locks become what was arranged.
    pub(super) fn carry_out_death(self, dump: &mut Dump) {
        dump.close_silently();
        if self.arrangement.ours_stays {
            dump.locks.drain().for_each(|(_, lock)| lock.keep());
            dump.note(Phase::Dumped);
        } else {
            dump.let_live();
        }
        if dump.recorder.record().locks.is_empty() {
            dump.forget_record(); // SOCCR_LOCK=skip
        }
        if let Some((ns, name)) = &self.arrangement.stray
            && let Err(error) = lock::remove(ns, Method::Nftables, name)
        {
            log::error!("{ns}: CRIU's table inet {name} stays: {error}");
        }
    }
}
