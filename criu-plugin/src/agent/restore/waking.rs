//! The last step: all connections are whole, and go on.

use std::convert::Infallible;

use soccr::chain;
use soccr::criu::parallel;
use soccr::criu::tasks::{Duplicates, Opened, Task};
use soccr::kernel::sockopt;
use soccr::lock::held::HeldPackets;
use soccr::repair::{self, Paused, Probe};

use super::builder::{Standing, must_live};
use super::building::Building;
use crate::agent::error::AgentError;
use crate::agent::log;
use crate::agent::profile::Profile;
use crate::agent::queued::Waiting;
use crate::fault;

/// Something was missing in the last step, and nothing is unlocked.
pub struct Failed<'a> {
    /// What can be given up.
    pub building: Building<'a>,
    /// What was missing.
    pub error: AgentError,
}

/// All tasks are complete: leaves repair mode, then unlocks, then wakes who waits. Gives the tasks back.
#[allow(clippy::result_large_err)] // once in a restore
pub fn wake(mut building: Building<'_>) -> Result<Vec<Task>, Failed<'_>> {
    if let Err(error) = complete(&mut building) {
        return Err(Failed { building, error });
    }
    let mut profile = Profile::start("restore");
    // Out of repair mode while still locked, and silently: should we die here, all of it can be done again.
    let built = std::mem::take(&mut building.built);
    let duplicates = &building.duplicates;
    let (whole, left) =
        parallel::for_each(built, Opened::default, |opened, built| leave_repair(built, duplicates, opened));
    if let Err(error) = left.and_then(|()| may_wake(&mut building)) {
        enter_repair(&whole, &building.duplicates);
        return Err(Failed { building, error });
    }
    profile.lap("leave repair");
    // From here on packets pass: the tasks must live, and whatever fails is only told.
    log::commit();
    let Building { mut locks, tree, plan, waiting, duplicates, .. } = building;
    if let Err(error) = locks.unlock() {
        ::log::error!("the connections stay locked, see soccr status: {}", chain(&error));
        return Ok(tree.restored);
    }
    let _ = fault::point("restore.unlocked");
    profile.lap("unlock");
    let mut held = plan.held;
    held.append(&locks.take_held());
    locks.let_in(&mut held);
    let count = release(held, &whole, &duplicates, &waiting);
    let _ = fault::point("restore.released");
    probe(&whole, &duplicates);
    let _ = fault::point("restore.awake");
    profile.lap("wake");
    locks.forget_record();
    if !whole.is_empty() {
        ::log::info!("{} TCP connections go on, with {count} packets that were held for them", whole.len());
    }
    Ok(tree.restored)
}

fn complete(building: &mut Building<'_>) -> Result<(), AgentError> {
    let missing = building.missing.connections.iter();
    let names = missing.filter_map(|id| building.plan.index.connections.get(id));
    let names: Vec<String> = names.map(|connection| connection.tuple.to_string()).collect();
    if !names.is_empty() {
        return Err(AgentError::NotFound(names.join(", ")));
    }
    fault::point("restore.all-built")?;
    building.fill_queues()?;
    Ok(std::mem::take(&mut building.forge).finish()?)
}

/// The last checks before packets pass.
fn may_wake(building: &mut Building<'_>) -> Result<(), AgentError> {
    fault::point("restore.unlocking")?;
    must_live(building.criu)?;
    building.tasks_live()?;
    Ok(building.locks.record_waking(&building.tree.restored)?)
}

/// The sockets get what was held for them. Gives the number of packets.
fn release(held: HeldPackets, whole: &[Standing], duplicates: &Duplicates, waiting: &[Waiting]) -> usize {
    let tuples = whole.iter().map(|whole| whole.tuple);
    let mut release = held.release_to(tuples.chain(waiting.iter().map(|waiting| waiting.end().1)));
    let mut opened = Opened::default();
    for Standing { slot, tuple, .. } in whole {
        if release.has(tuple) {
            match duplicates.get(*slot, &mut opened) {
                Ok(socket) => release.bring(socket, *tuple),
                Err(error) => ::log::debug!("{tuple}: what was held has to be sent again: {error}"),
            }
        }
    }
    waiting.iter().map(Waiting::end).for_each(|(socket, tuple)| release.bring(socket, tuple));
    release.count()
}

fn probe(whole: &[Standing], duplicates: &Duplicates) {
    let sockets: Vec<&Standing> = whole.iter().filter(|whole| whole.probe == Probe::Send).collect();
    let (_, _) = parallel::for_each(sockets, Opened::default, |opened, whole| {
        let _ = fault::point("restore.waking");
        let Standing { slot, tuple, reuse_addr, .. } = *whole;
        let socket = duplicates.get(slot, opened).map_err(AgentError::Duplicates);
        if let Err(error) = socket.and_then(|socket| Ok(repair::probe(socket, reuse_addr)?)) {
            ::log::warn!("{tuple}: it waits for its peer to send: {}", chain(&error));
        }
        Ok::<_, Infallible>(())
    });
}

fn leave_repair(
    built: Standing,
    duplicates: &Duplicates,
    opened: &mut Opened,
) -> Result<Standing, AgentError> {
    let Standing { slot, tuple, reuse_addr, reuse_port, .. } = built;
    let failed = |source| AgentError::Socket { tuple, pid: 0, source };
    let socket = duplicates.get(slot, opened).map_err(failed)?;
    if let Some(on) = reuse_port {
        sockopt::set_reuse_port(socket, on).map_err(failed)?;
    }
    repair::resume(socket, reuse_addr)?;
    Ok(built)
}

/// Only in repair mode a socket is closed without a word, and gives its addresses back at once.
fn enter_repair(whole: &[Standing], duplicates: &Duplicates) {
    let mut opened = Opened::default();
    for Standing { slot, tuple, .. } in whole {
        let socket = duplicates.get(*slot, &mut opened).map_err(AgentError::Duplicates);
        match socket.and_then(|socket| Ok(Paused::pause_only(socket)?)) {
            Ok(paused) => drop(paused.release()),
            Err(error) => ::log::error!("{tuple}: its peer hears that it is closed: {}", chain(&error)),
        }
    }
}
