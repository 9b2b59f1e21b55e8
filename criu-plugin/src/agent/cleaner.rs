//! Undoes what an agent has left that was killed: its record tells.

use soccr::criu::record::{self, CleanOptions, Phase, Record, RecordError, Store};
use soccr::criu::tasks::ProcessId;

use super::AgentError;
use super::logger::answering;
use crate::channel::{Request, Server};
use crate::fault;

/// Serves the one request of this kind.
pub(super) fn serve(criu: i32, server: &Server) {
    fault::disarm();
    if let Ok(Some(asked)) = server.next() {
        answering(asked.answer, || match asked.request {
            Request::Clean => clean(criu),
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
        if record.phase == Phase::Restoring || (record.kept_after_death && dead) {
            continue;
        }
        let report = record::clean(&store, &record, CleanOptions::default());
        for connection in &report.revived {
            log::warn!("{connection}: brought back after the agent's death");
        }
        for problem in &report.problems {
            log::error!("{problem}");
        }
    }
    Ok(())
}

/// The records of this criu.
pub(super) fn of(store: &Store, criu: i32) -> Result<Vec<Record>, RecordError> {
    let Ok(criu) = ProcessId::of(criu) else { return Ok(Vec::new()) };
    let records = store.list()?.into_iter().filter_map(|listed| listed.record.ok());
    Ok(records.filter(|record| record.criu == criu).collect())
}
