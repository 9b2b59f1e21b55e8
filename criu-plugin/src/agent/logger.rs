//! The agent's log: each line goes with the answer to the request that is being worked on.

use std::sync::Mutex;

use log::{Log, Metadata, Record};

use crate::channel::Answer;
use crate::host;

static CURRENT: Mutex<Option<Answer>> = Mutex::new(None);
static LOGGER: Logger = Logger;

struct Logger;

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        if let Ok(current) = CURRENT.lock()
            && let Some(answer) = &*current
        {
            answer.log(record.level(), &record.args().to_string());
        }
    }

    fn flush(&self) {}
}

/// Makes this the process's log.
pub fn install() {
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(host::log_level());
    }
}

/// Sends the log lines of `work` along with the answer, then its result; says whether it was done.
pub fn answering<E: std::fmt::Display>(answer: Answer, work: impl FnOnce() -> Result<(), E>) -> bool {
    set(answer.duplicate().ok());
    let result = work();
    if let Err(error) = &result {
        log::error!("{error}");
    }
    set(None);
    answer.finish(result.is_ok());
    result.is_ok()
}

/// Tells whoever waits for the answer that there is no way back from here on.
pub fn commit() {
    if let Ok(current) = CURRENT.lock()
        && let Some(answer) = &*current
    {
        answer.commit();
    }
}

fn set(answer: Option<Answer>) {
    if let Ok(mut current) = CURRENT.lock() {
        *current = answer;
    }
}
