//! `soccr save`.

use std::collections::HashSet;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use soccr::criu::record::{Phase, RecordId, Recorder, Store};
use soccr::criu::tasks::{self, Fate, ProcessId, Task};
use soccr::kernel::tcp;
use soccr::repair;
use soccr::{Connection, Frozen};

use crate::handover::folder::Folder;
use crate::handover::{self, ManyFiles, Numbered, Uninterrupted};
use crate::sockets::{Owner, Socket, Tree};
use crate::{print_json, warn};

#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("which").required(true))]
pub struct Arguments {
    /// The task that has the connections.
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pid: i32,
    /// The connection behind this descriptor of the task; can be given more than once.
    #[arg(long, value_name = "N", group = "which")]
    fd: Vec<u32>,
    /// All connections of the task.
    #[arg(long, group = "which")]
    all: bool,
    /// The folder to write them into, which is made where it is missing.
    #[arg(short = 'D', long, value_name = "DIR")]
    images_dir: PathBuf,
    /// Let the connections go on in the task: what is written is a look at them, not a hand-over.
    #[arg(long)]
    keep: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Told {
    /// The record's; none where the connections go on in the task, or are not locked.
    id: Option<RecordId>,
    images: PathBuf,
    connections: Vec<Saved>,
}

#[derive(Debug, Serialize)]
struct Saved {
    fd: u32,
    local: String,
    remote: String,
    state: String,
}

pub fn run(arguments: &Arguments) -> Result<bool> {
    let _files = ManyFiles::allow();
    handover::open_task(arguments.pid)?;
    choose(arguments)?; // so that nothing is touched where something is refused
    let folder = Folder::create(&arguments.images_dir)?;
    let uninterrupted = Uninterrupted::begin()?;
    let told = save(arguments, &folder)?;
    drop(uninterrupted);
    if arguments.json {
        print_json(&told)?;
    } else {
        print(arguments, &told).context("cannot print")?;
    }
    Ok(true)
}

fn save(arguments: &Arguments, folder: &Folder) -> Result<Told> {
    let name = soccr::lock_name();
    let own = std::process::id().cast_signed();
    let mut still =
        Still { recorder: Recorder::new(name.id(), Phase::Saving, folder.as_fd(), own)?, tasks: Vec::new() };
    let sockets = still.stop_all(arguments);
    let Still { mut recorder, tasks } = still;
    let sockets = match sockets {
        Ok(sockets) => sockets,
        Err(error) => return give_up(recorder, tasks, error),
    };
    let numbers: Vec<u32> = sockets.iter().map(|socket| socket.fd).collect();
    let frozen = match handover::write(folder, &name, &mut recorder, sockets) {
        Ok(frozen) => frozen,
        Err(error) => return give_up(recorder, tasks, error),
    };
    let connections = numbers.into_iter().zip(frozen.connections()).map(saved).collect();
    let id = end(arguments, folder, frozen, recorder, tasks)?;
    Ok(Told { id, images: arguments.images_dir.clone(), connections })
}

/// The record goes when the tasks go on, and not before.
fn give_up<T>(mut recorder: Recorder, tasks: Vec<StoppedTask>, error: anyhow::Error) -> Result<T> {
    drop(tasks);
    recorder.remove()?;
    Err(error)
}

/// The files are whole: the connections go on in the task, or end there.
fn end(
    arguments: &Arguments,
    folder: &Folder,
    frozen: Frozen<OwnedFd>,
    mut recorder: Recorder,
    tasks: Vec<StoppedTask>,
) -> Result<Option<RecordId>> {
    if arguments.keep {
        handover::resume(frozen);
        drop(tasks);
        recorder.remove()?;
        return Ok(None);
    }
    // From here on they are in the folder, and nowhere else: who finds the task stopped completes this.
    if let Err(error) = recorder.save(Phase::Dumped) {
        folder.remove_files()?;
        handover::resume(frozen);
        return give_up(recorder, tasks, error.into());
    }
    for socket in frozen.release() {
        if let Err(error) = repair::end(socket.as_fd()) {
            // It must not run into a socket in repair mode.
            std::mem::forget(tasks);
            let id = &recorder.record().id;
            return Err(error)
                .context(format!("{id}: the task stays stopped; `soccr restore` goes on from here"));
        }
    }
    drop(tasks);
    recorder.forget_tasks();
    if !recorder.record().has_locks() {
        recorder.remove()?; // SOCCR_LOCK=skip
        return Ok(None);
    }
    recorder.save(Phase::Dumped)?;
    Ok(Some(recorder.record().id.clone()))
}

fn saved((fd, connection): (u32, &Connection)) -> Saved {
    let tuple = connection.four_tuple();
    Saved {
        fd,
        local: tuple.local.to_string(),
        remote: tuple.remote.to_string(),
        state: connection.control_block().state.to_string(),
    }
}

/// The connections that were asked for, each once, by its lowest descriptor.
fn choose(arguments: &Arguments) -> Result<Vec<(u32, Socket)>> {
    let Tree { sockets, in_flight, .. } = Tree::of_task(arguments.pid)?;
    let at = |fd: u32| format!("pid {} fd {fd}", arguments.pid);
    for fd in &arguments.fd {
        if !sockets.iter().any(|socket| socket.owners.iter().any(|owner| owner.fd == *fd)) {
            bail!("{}: not a TCP socket", at(*fd));
        }
    }
    let mut chosen = Vec::new();
    for socket in sockets {
        let numbers = socket.owners.iter().map(|owner| owner.fd);
        let Some(fd) = numbers.clone().filter(|fd| arguments.all || arguments.fd.contains(fd)).min() else {
            continue;
        };
        match socket.tuple() {
            Some(tuple) if socket.multipath => bail!(
                "{tuple} ({}): an MPTCP connection, which cannot be carried: have the program use TCP \
                 (GODEBUG=multipathtcp=0 for one in Go)",
                at(fd)
            ),
            Some(tuple) if tcp::in_repair(socket.fd())? => {
                bail!(
                    "{tuple} ({}): in repair mode, as a save or dump leaves it that was killed: see soccr status",
                    at(fd)
                )
            }
            Some(_) => chosen.push((fd, socket)),
            None if arguments.all => {}
            None => bail!("{}: a socket without a peer, so no connection", at(fd)),
        }
    }
    if chosen.is_empty() {
        bail!("pid {} has no TCP connection", arguments.pid);
    }
    if arguments.all {
        for crate::sockets::InFlight { socket: Owner { fd, .. }, descriptors } in in_flight {
            warn(&format!(
                "{}: {descriptors} descriptors wait in this unix socket and are not saved",
                at(fd)
            ));
        }
    }
    chosen.sort_by_key(|(fd, _)| *fd);
    Ok(chosen)
}

/// A task that was stopped for the save, and is continued when this value goes.
struct StoppedTask(Task);

impl Drop for StoppedTask {
    fn drop(&mut self) {
        let _ = self.0.carry_on(); // it has ended meanwhile
    }
}

/// Who has the connections stands still: their calls would fail while the sockets are in repair mode. A signal does it,
/// since a task that is stopped so stays stopped whatever becomes of this program, until somebody looks at its record.
struct Still {
    recorder: Recorder,
    tasks: Vec<StoppedTask>,
}

impl Still {
    /// Stops the task, and whoever else has its connections, and finds them.
    fn stop_all(&mut self, arguments: &Arguments) -> Result<Vec<Numbered<OwnedFd>>> {
        let own = std::process::id().cast_signed();
        let mut known = vec![own];
        let mut next = vec![arguments.pid];
        loop {
            for pid in next {
                self.stop(pid).with_context(|| format!("pid {pid}"))?;
                known.push(pid);
            }
            let chosen = choose(arguments)?;
            let inodes: HashSet<u64> = chosen.iter().map(|(_, socket)| socket.inode).collect();
            next = tasks::holders_of(|inode| inodes.contains(&inode))?
                .into_iter()
                .filter(|pid| !known.contains(pid))
                .collect();
            if next.is_empty() {
                let pid = arguments.pid;
                let numbered =
                    |(fd, socket): (u32, Socket)| Numbered { fd, socket: socket.into_fd(), owner: Some(pid) };
                return Ok(chosen.into_iter().map(numbered).collect());
            }
        }
    }

    fn stop(&mut self, pid: i32) -> Result<()> {
        let task = Task::open(pid)?;
        let id = ProcessId::of(pid).context("cannot tell when it started")?;
        let runs = match task.fate() {
            Fate::Traced => bail!("it is traced: by a debugger, or a criu"),
            Fate::Ending | Fate::Gone => bail!("it is ending"),
            Fate::Stopped => false,
            Fate::Running => true,
        };
        self.recorder.add_task(pid);
        if runs {
            self.recorder.add_stopped(id);
        }
        self.recorder.save(Phase::Saving)?;
        self.refuse_others_work(id)?;
        if runs {
            let task = StoppedTask(task);
            task.0.stop()?;
            self.tasks.push(task);
        }
        Ok(())
    }

    /// Of two saves that begin at the same time at least one finds the other's record.
    fn refuse_others_work(&self, task: ProcessId) -> Result<()> {
        let listed = Store::open()?.map_or_else(|| Ok(Vec::new()), |store| store.list())?;
        let mut others = listed.into_iter().filter_map(|listed| listed.record.ok());
        let own = &self.recorder.record().id;
        match others.find(|other| other.id != *own && other.state().at_work() && other.tasks.contains(&task))
        {
            Some(other) => bail!("{} is {}, and has this task", other.id, other.state()),
            None => Ok(()),
        }
    }
}

fn print(arguments: &Arguments, told: &Told) -> std::io::Result<()> {
    let mut out = crate::out();
    let (count, images) = (told.connections.len(), told.images.display());
    let pid = arguments.pid;
    match &told.id {
        Some(id) => writeln!(out, "{id}: {count} connections of pid {pid} are in {images} now, and locked"),
        None if arguments.keep => {
            writeln!(out, "{count} connections of pid {pid} were written to {images}, and go on")
        }
        None => writeln!(out, "{count} connections of pid {pid} are in {images} now, and not locked"),
    }
}
