//! What `soccr save` leaves when it dies: tasks that it has stopped, with sockets in repair mode.

use std::collections::HashSet;
use std::os::fd::AsFd;

use super::{Record, Store};
use crate::chain;
use crate::criu::tasks::{Fate, Task, Walker};
use crate::kernel::{sockopt, tcp};
use crate::repair;

/// Completes a save whose images are whole: what it tells of ends in the tasks, silently, and the tasks go on. Says what
/// could not be done.
#[must_use]
pub fn finish(store: &Store, record: &Record) -> Vec<String> {
    let saved: HashSet<u64> = match store.read(&record.id) {
        Ok(read) => {
            read.into_iter().flat_map(|(_, connections)| connections).map(|found| found.cookie).collect()
        }
        Err(error) => return vec![chain(&error)],
    };
    let mut problems = end_in_tasks(record, &saved);
    // Else a program would meet its sockets in repair mode.
    if problems.is_empty() {
        problems = carry_on(record);
    }
    problems
}

fn end_in_tasks(record: &Record, saved: &HashSet<u64>) -> Vec<String> {
    let (mut walker, mut problems) = (Walker::default(), Vec::new());
    if record.stopped.is_empty() {
        return problems;
    }
    for id in record.tasks.iter().filter(|task| task.lives()) {
        let Ok(task) = Task::open(id.pid) else { continue };
        let walked = walker.walk(&task, |socket, _| {
            let fd = socket.as_fd();
            let is_saved = sockopt::cookie(fd).is_ok_and(|cookie| saved.contains(&cookie));
            if is_saved && tcp::in_repair(fd).unwrap_or(false) {
                problems.extend(repair::end(fd).err().map(|error| chain(&error)));
            }
            Ok(Some(socket))
        });
        if let Err(error) = walked
            && id.lives()
        {
            problems.push(chain(&error));
        }
    }
    problems
}

/// Continues the tasks that soccr has stopped; says what could not be done.
pub(super) fn carry_on(record: &Record) -> Vec<String> {
    let mut problems = Vec::new();
    for id in &record.stopped {
        // The pidfd is of the task that was recorded only if that lives after it was opened.
        if let Ok(task) = Task::open(id.pid)
            && id.lives()
            && task.fate() == Fate::Stopped
        {
            problems.extend(task.carry_on().err().map(|error| format!("pid {id}: {error}")));
        }
    }
    problems
}
