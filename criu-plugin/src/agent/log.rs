//! The agent's log: each line goes with the answer to the request that is being worked on.

use std::sync::Mutex;

use log::{LevelFilter, Log, Metadata, Record};
use soccr::chain;

use super::error::AgentError;
use super::server::{Answer, Server};
use crate::protocol::Reply;

static CURRENT: Mutex<Option<Answer>> = Mutex::new(None);
static LOGGER: Logger = Logger;

struct Logger;

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        reply(Reply::Log(record.level(), record.args().to_string().as_bytes()));
    }

    fn flush(&self) {}
}

/// Makes this the process's log.
pub fn install(level: LevelFilter) {
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(level);
    }
}

/// Sends the log lines of `work` along with the answer, then its result; says whether it was done.
pub fn answering(answer: Answer, work: impl FnOnce() -> Result<(), AgentError>) -> bool {
    set(answer.duplicate().ok());
    let result = work();
    if let Err(error) = &result {
        log::error!("{}", chain(error));
    }
    set(None);
    answer.finish(result.is_ok());
    result.is_ok()
}

/// Refuses whatever is asked, for this reason.
pub fn refuse_all(server: &Server, error: AgentError) {
    let mut reason = Some(error);
    while let Ok(Some(asked)) = server.next() {
        let why = reason.take().unwrap_or(AgentError::Protocol("the agent could not begin"));
        answering(asked.answer, || Err(why));
    }
}

/// Tells whoever waits for the answer that there is no way back from here on.
pub fn commit() {
    reply(Reply::Committed);
}

/// Tells whoever waits for the answer that he need not.
pub fn proceed() {
    reply(Reply::Proceed);
}

fn reply(reply: Reply<'_>) {
    if let Ok(current) = CURRENT.lock()
        && let Some(answer) = &*current
    {
        answer.send(reply);
    }
}

fn set(answer: Option<Answer>) {
    if let Ok(mut current) = CURRENT.lock() {
        *current = answer;
    }
}
