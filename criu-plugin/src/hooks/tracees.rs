//! The tasks that criu traces while it restores them.

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, gettid};
use procfs::process::{Status, all_processes};

/// Kills them all, and reaps all but their init: CRIU waits for that one alone, which waits for every task of its PID
/// namespace, which wait for their tracer.
pub fn end() {
    let tracees = tracees();
    for tracee in &tracees {
        let _ = kill(Pid::from_raw(tracee.tgid), Signal::SIGKILL);
    }
    let inits = tracees.iter().filter(|tracee| is_init(tracee));
    let Some(init) = inits.min_by_key(|init| depth(init)) else { return };
    let mut others: Vec<_> = tracees.iter().map(|tracee| tracee.pid).filter(|&pid| pid != init.pid).collect();
    // Which of them is the next that can be reaped is the kernel's affair: any thread of an init may be the one that waits
    // for all the others in its namespace.
    while !others.is_empty() {
        others.retain(|&pid| !is_reaped(Pid::from_raw(pid)));
        std::thread::yield_now();
    }
}

/// The threads that this one traces.
fn tracees() -> Vec<Status> {
    let me = gettid().as_raw();
    let threads =
        all_processes().into_iter().flatten().flatten().filter_map(|process| process.tasks().ok()).flatten();
    threads
        .flatten()
        .filter_map(|thread| thread.status().ok())
        .filter(|status| status.tracerpid == me)
        .collect()
}

fn is_init(status: &Status) -> bool {
    status.nspid.as_ref().is_some_and(|pids| pids.len() > 1 && pids.last() == Some(&1))
}

/// Of its PID namespace.
fn depth(status: &Status) -> usize {
    status.nspid.as_ref().map_or(0, Vec::len)
}

fn is_reaped(thread: Pid) -> bool {
    match waitpid(thread, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)) {
        Ok(status) => matches!(status, WaitStatus::Exited(..) | WaitStatus::Signaled(..)),
        Err(_) => true, // another's, or gone
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    use nix::sys::ptrace;

    use super::*;

    /// With a namespace in it, and a program of several threads in that.
    #[test]
    fn an_init_ends_when_its_traced_tasks_have() {
        const THREADS: &str = "import threading, time\n\
            for _ in range(3): threading.Thread(target=time.sleep, args=(1000,)).start()\n\
            print('ready', flush=True)";
        let nest = "unshare --pid --fork sh -c 'sleep 1000 & exec python3 -c \"$0\"' \"$0\" & wait";
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--pid", "--fork", "sh", "-c", nest, THREADS]);
        let mut outermost = command.stdout(Stdio::piped()).spawn().expect("unshare runs");
        let mut line = String::new();
        BufReader::new(outermost.stdout.as_mut().expect("a pipe")).read_line(&mut line).expect("a line");
        assert_eq!(line, "ready\n");

        let family = family_of(outermost.id().cast_signed());
        for &thread in &family {
            ptrace::seize(Pid::from_raw(thread), ptrace::Options::empty()).expect("seize");
            ptrace::interrupt(Pid::from_raw(thread)).expect("interrupt");
        }
        let traced = tracees();
        assert_eq!((traced.len(), traced.iter().filter(|status| is_init(status)).count()), (family.len(), 2));
        end();
        let left: Vec<_> = tracees().iter().map(|status| status.pid).collect();
        assert!(left.len() <= 1, "{left:?} are still traced");
        for init in left {
            let _ = waitpid(Pid::from_raw(init), Some(WaitPidFlag::__WALL));
        }
        outermost.wait().expect("unshare ends");
    }

    /// All threads below a process.
    fn family_of(pid: i32) -> Vec<i32> {
        let process = procfs::process::Process::new(pid).expect("a process");
        let mut threads = Vec::new();
        for task in process.tasks().expect("tasks").flatten() {
            for child in task.children().expect("children") {
                let child = child.cast_signed();
                let tasks = procfs::process::Process::new(child).expect("a process").tasks().expect("tasks");
                threads.extend(tasks.flatten().map(|task| task.tid));
                threads.extend(family_of(child));
            }
        }
        threads
    }
}
