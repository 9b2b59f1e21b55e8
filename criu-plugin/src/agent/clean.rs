//! Does what an agent has left undone that was killed: its record tells.

use soccr::criu::record::{self, CleanOptions, Phase, Record, RecordError, Store};
use soccr::criu::tasks::ProcessId;

use super::error::AgentError;
use super::log::answering;
use super::server::Server;
use crate::fault;
use crate::protocol::Request;

/// Serves the one request of this kind.
pub fn serve(criu: i32, server: &Server) {
    fault::disarm();
    if let Ok(Some(asked)) = server.next() {
        answering(asked.answer, || match asked.request {
            Request::Clean => clean(criu),
            Request::Complete => complete(criu),
            _ => Err(AgentError::Protocol("this agent only cleans up")),
        });
    }
}

/// Undoes what was done for this criu, but for what waits for a restore: a dump whose tasks are dead, or a restore that
/// did not come to its end.
fn clean(criu: i32) -> Result<(), AgentError> {
    let Some(store) = Store::open()? else { return Ok(()) };
    for record in of(&store, criu)? {
        let dead = !record.tasks.is_empty() && !record.tasks.iter().any(ProcessId::lives);
        if record.phase == Phase::Restoring {
            continue;
        }
        if record.kept_after_death && dead {
            leave(&store, &record);
        } else {
            undo(&store, &record);
        }
    }
    Ok(())
}

/// Of CRIU's lock and ours one waits for the restore, which the images name: stock CRIU would leave the other there for good.
fn leave(store: &Store, record: &Record) {
    let ours = record.locks.iter().filter(|lock| record.criu_locks.contains(&lock.ns)).cloned().collect();
    let problems = if record.criu_replaced {
        record::remove_criu_locks(store, record)
    } else {
        record::remove_locks(&Record { locks: ours, ..record.clone() })
    };
    problems.iter().for_each(|problem| log::error!("{problem}"));
}

/// A restore's last step, if its record says that the step had begun.
fn complete(criu: i32) -> Result<(), AgentError> {
    let not_begun = || AgentError::Protocol("the connections were not whole");
    let store = Store::open()?.ok_or_else(not_begun)?;
    let record = of(&store, criu)?.into_iter().find(|record| record.phase == Phase::Waking);
    undo(&store, &record.ok_or_else(not_begun)?);
    Ok(())
}

fn undo(store: &Store, record: &Record) {
    let report = record::clean(store, record, CleanOptions::default());
    for connection in &report.revived {
        log::warn!("{connection}: brought back after the agent's death");
    }
    for queue in &report.lost {
        log::error!("{queue} are lost with the agent");
    }
    for problem in &report.problems {
        log::error!("{problem}");
    }
}

/// The records of this criu.
pub fn of(store: &Store, criu: i32) -> Result<Vec<Record>, RecordError> {
    let Ok(criu) = ProcessId::of(criu) else { return Ok(Vec::new()) };
    let records = store.list()?.into_iter().filter_map(|listed| listed.record.ok());
    Ok(records.filter(|record| record.criu == criu).collect())
}
