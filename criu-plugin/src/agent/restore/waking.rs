//! The last step: all connections are whole, and go on.

use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};

use soccr::chain;
use soccr::connection::FourTuple;
use soccr::criu::tasks::Task;
use soccr::kernel::sockopt;
use soccr::repair::{self, PauseError, Paused, Probe};

use super::builder::{Built, must_live};
use super::building::Building;
use super::parallel;
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

/// A connection that is whole, out of repair mode, and waits to be unlocked.
struct Whole {
    socket: OwnedFd,
    tuple: FourTuple,
    reuse_addr: bool,
    probe: Probe,
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
    let (whole, left) = parallel::for_each(built, || (), |(), built| leave_repair(built));
    if let Err(error) = left.and_then(|()| may_wake(&mut building)) {
        building.built = whole.into_iter().filter_map(enter_repair).collect();
        return Err(Failed { building, error });
    }
    profile.lap("leave repair");
    // From here on packets pass: the tasks must live, and whatever fails is only told.
    log::commit();
    let Building { mut locks, tree, plan, waiting, .. } = building;
    if let Err(error) = locks.unlock() {
        ::log::error!("the connections stay locked, see soccr status: {}", chain(&error));
        return Ok(tree.restored);
    }
    let _ = fault::point("restore.unlocked");
    profile.lap("unlock");
    let mut held = plan.held;
    held.append(&locks.take_held());
    let sockets = whole.iter().map(|whole| (whole.socket.as_fd(), whole.tuple));
    held.let_in(locks.home());
    let count = held.release(sockets.chain(waiting.iter().map(Waiting::end)));
    let _ = fault::point("restore.released");
    probe(&whole);
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

fn probe(whole: &[Whole]) {
    let sockets: Vec<&Whole> = whole.iter().filter(|whole| whole.probe == Probe::Send).collect();
    let (_, _) = parallel::for_each(
        sockets,
        || (),
        |(), Whole { socket, reuse_addr, .. }| {
            let _ = fault::point("restore.waking");
            if let Err(error) = repair::probe(socket.as_fd(), *reuse_addr) {
                ::log::warn!("{}: it waits for its peer to send", chain(&error));
            }
            Ok::<_, Infallible>(())
        },
    );
}

fn leave_repair(built: Built) -> Result<Whole, AgentError> {
    let Built { tuple, reuse_port, probe, .. } = built;
    let paused = built.into_paused();
    let failed = |source| AgentError::Socket { tuple, pid: 0, source };
    if let Some(on) = reuse_port {
        sockopt::set_reuse_port(paused.socket(), on).map_err(failed)?;
    }
    let reuse_addr = paused.reuse_addr();
    let socket = paused.resume(Probe::None)?;
    Ok(Whole { socket, tuple, reuse_addr, probe })
}

/// Only in repair mode a socket is closed without a word, and gives its addresses back at once.
fn enter_repair(whole: Whole) -> Option<Built> {
    let Whole { socket, tuple, probe, .. } = whole;
    let told =
        |error: &PauseError| ::log::error!("{tuple}: its peer hears that it is closed: {}", chain(error));
    let paused = Paused::pause_only(socket).inspect_err(told).ok()?;
    Some(Built::new(paused, tuple, None, probe))
}
