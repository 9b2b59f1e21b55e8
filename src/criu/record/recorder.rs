//! Who keeps a record while a dump or a restore goes on.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::stat::fstat;

use super::file;
use super::{
    ConnectionRecord, Folder, LockRecord, NsId, Phase, QueueRecord, Record, RecordError, RecordId, State,
    Store, current_boot, is_undone, own_pid_ns,
};
use crate::connection::FourTuple;
use crate::criu::rules::Remap;
use crate::criu::tasks::ProcessId;
use crate::kernel::netns::NetNs;
use crate::lock::BadOption;
use crate::lock::conntrack::Translation;

/// The environment variable that turns records off: `SOCCR_RECORD=off`.
pub const RECORD_VARIABLE: &str = "SOCCR_RECORD";

/// Keeps one record up to date. The file is there from the first [`save`](Self::save) until
/// [`remove`](Self::remove); dropping the recorder leaves it as it is, as a crash does.
#[derive(Debug)]
pub struct Recorder {
    /// `None`: records are off.
    store: Option<Store>,
    record: Record,
    /// The connections' lines.
    body: Vec<u8>,
    written: bool,
}

impl Recorder {
    /// A new record, which is not written yet.
    ///
    /// # Errors
    /// [`RecordError`]. The folder of the records is looked at only by [`save`](Self::save).
    pub fn new(id: &str, phase: Phase, images: BorrowedFd<'_>, criu: i32) -> Result<Self, RecordError> {
        let record = Record {
            id: id.parse()?,
            boot: current_boot(),
            pid_ns: own_pid_ns(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            phase,
            images: folder(images),
            criu: identify(criu)?,
            agent: identify(std::process::id().cast_signed())?,
            locks: Vec::new(),
            criu_locks: Vec::new(),
            criu_replaced: false,
            translations: Vec::new(),
            accept_queues: Vec::new(),
            tasks: Vec::new(),
            stopped: Vec::new(),
            kept_after_death: true,
            connections: 0,
        };
        Ok(Self { store: None, record, body: Vec::new(), written: false })
    }

    /// Keeps the record in this folder, whatever the environment says.
    #[must_use]
    pub fn keep_in(mut self, store: Store) -> Self {
        self.store = Some(store);
        self
    }

    /// Whether nothing is left of what it tells, as [`is_undone`] finds out.
    #[must_use]
    pub fn is_undone(&self) -> bool {
        self.store.as_ref().is_some_and(|store| is_undone(store, &self.record))
    }

    /// Takes over the record with this id for the process `criu`; `None` when there is none, or only one from
    /// before the host was started anew.
    ///
    /// # Errors
    /// [`RecordError::AtWork`] when another criu restores it right now, and whatever is wrong with the record.
    pub fn take_over(id: &RecordId, criu: i32) -> Result<Option<Self>, RecordError> {
        Self::take_over_if(id, criu, |_, _| Ok(()))
    }

    /// As [`take_over`](Self::take_over), for a restore of these connections.
    ///
    /// Images can come from anybody, and name any record. So the record must tell of the very connections that they hold:
    /// wherever it is, such a folder is the dump or a copy of it, and what it releases it also restores. `remap` has given
    /// them other addresses, perhaps.
    ///
    /// # Errors
    /// [`RecordError::OtherDump`] when it tells of others, and as [`take_over`](Self::take_over).
    pub fn take_over_for(
        id: &RecordId,
        criu: i32,
        connections: impl Iterator<Item = FourTuple>,
        remap: &Remap,
    ) -> Result<Option<Self>, RecordError> {
        Self::take_over_if(id, criu, |record, recorded| {
            let recorded = comparable(recorded.iter().map(|it| remap.four_tuple(it.tuple())));
            if comparable(connections) == recorded {
                return Ok(());
            }
            Err(RecordError::OtherDump { id: id.clone(), folder: record.images.path.clone() })
        })
    }

    fn take_over_if(
        id: &RecordId,
        criu: i32,
        check: impl FnOnce(&Record, &[ConnectionRecord]) -> Result<(), RecordError>,
    ) -> Result<Option<Self>, RecordError> {
        if !is_on()? {
            return Ok(None);
        }
        let Some(store) = Store::open()? else { return Ok(None) };
        let Some((mut record, connections, body)) = store.read_whole(id)? else { return Ok(None) };
        if record.boot != current_boot() {
            store.remove(id)?;
            return Ok(None);
        }
        check(&record, &connections)?;
        let criu = identify(criu)?;
        if record.state() == State::Restoring && record.criu != criu {
            return Err(RecordError::AtWork { id: id.clone(), criu: record.criu });
        }
        record.criu = criu;
        record.agent = identify(std::process::id().cast_signed())?;
        Ok(Some(Self { store: Some(store), record, body, written: true }))
    }

    /// The record of the last dump into this folder that waits for its restore, where the images do not name it: the
    /// agent died, or the folder was full, before they could.
    ///
    /// # Errors
    /// When the folder of the records cannot be read.
    pub fn id_of_folder(images: BorrowedFd<'_>) -> Result<Option<RecordId>, RecordError> {
        let Some(store) = Store::open()?.filter(|_| is_on().unwrap_or(false)) else { return Ok(None) };
        let here = folder(images);
        let records = store.list()?.into_iter().filter_map(|listed| listed.record.ok());
        let waiting = records.filter(|record| {
            (record.images.dev, record.images.ino) == (here.dev, here.ino)
                && !record.state().at_work()
                && !record.tasks.iter().any(ProcessId::lives)
        });
        Ok(waiting.max_by_key(|record| record.created).map(|record| record.id))
    }

    /// The record as it will be at the next [`save`](Self::save).
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Adds connections.
    pub fn add_connections(&mut self, connections: impl IntoIterator<Item = ConnectionRecord>) {
        for connection in connections {
            file::append_connection(&mut self.body, &connection);
            self.record.connections += 1;
        }
    }

    /// Adds a lock that is about to be made.
    pub fn add_lock(&mut self, lock: LockRecord) {
        if !self.record.locks.contains(&lock) {
            self.record.locks.push(lock);
        }
    }

    /// Adds a namespace that CRIU is about to lock as a whole.
    pub fn add_criu_lock(&mut self, ns: &NetNs) {
        let ns = NsId::from(ns);
        if !self.record.criu_locks.contains(&ns) {
            self.record.criu_locks.push(ns);
        }
    }

    /// Says that they will go when the tasks are dead, and ours stay.
    pub fn replace_criu_locks(&mut self) {
        self.record.criu_replaced = true;
    }

    /// Says that CRIU's own locks are removed.
    pub fn forget_criu_locks(&mut self) {
        self.record.criu_locks.clear();
    }

    /// Says that this lock is not there any more.
    pub fn forget_lock(&mut self, lock: &LockRecord) {
        self.record.locks.retain(|known| known != lock);
    }

    /// Says how connections are translated where they are locked on their way.
    pub fn set_translations(&mut self, translations: &[Translation]) {
        self.record.translations = translations.to_vec();
    }

    /// Adds an accept queue that is about to be emptied.
    pub fn add_accept_queue(&mut self, queue: QueueRecord) {
        self.record.accept_queues.push(queue);
    }

    /// Says which locks there are.
    pub fn set_locks(&mut self, locks: Vec<LockRecord>) {
        self.record.locks = locks;
    }

    /// Says that the locks in this namespace are removed.
    pub fn forget_locks_in(&mut self, ns: &NetNs) {
        let ns = NsId::from(ns);
        self.record.locks.retain(|lock| lock.ns != ns);
    }

    /// Adds a task; one that has ended meanwhile needs no mention.
    pub fn add_task(&mut self, pid: i32) {
        if let Ok(task) = ProcessId::of(pid)
            && !self.record.tasks.contains(&task)
        {
            self.record.tasks.push(task);
        }
    }

    /// Says that this task is about to be stopped.
    pub fn add_stopped(&mut self, task: ProcessId) {
        self.record.stopped.push(task);
    }

    /// Says that there are no tasks any more but those that are added later.
    pub fn forget_tasks(&mut self) {
        self.record.tasks.clear();
        self.record.stopped.clear();
    }

    /// Says what the tasks' death will make of the locks.
    pub fn keep_after_death(&mut self, keep: bool) {
        self.record.kept_after_death = keep;
    }

    /// Writes the record with this phase.
    ///
    /// # Errors
    /// [`RecordError`]; the file is as it was.
    pub fn save(&mut self, phase: Phase) -> Result<(), RecordError> {
        self.record.phase = phase;
        if self.store.is_none() {
            if !is_on()? {
                return Ok(());
            }
            self.store = Some(Store::create()?);
        }
        if let Some(store) = &self.store {
            store.write(self.record.agent, &self.record, &self.body)?;
            self.written = true;
        }
        Ok(())
    }

    /// Writes the phase, if the record was written before and had another.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn enter(&mut self, phase: Phase) -> Result<(), RecordError> {
        if self.written && self.record.phase != phase { self.save(phase) } else { Ok(()) }
    }

    /// Where who holds packets for the record's restore listens; `None` while there is no record.
    #[must_use]
    pub fn held(&self) -> Option<PathBuf> {
        self.store.as_ref().filter(|_| self.written).map(|store| store.held(&self.record.id))
    }

    /// Removes the record: all is undone.
    ///
    /// # Errors
    /// [`RecordError::Io`]: it is still there.
    pub fn remove(&mut self) -> Result<(), RecordError> {
        match &self.store {
            Some(store) if self.written => {
                store.remove(&self.record.id)?;
                self.written = false;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// What images and records both tell of connections that packets can reach.
fn comparable(tuples: impl Iterator<Item = FourTuple>) -> Vec<[(IpAddr, u16); 2]> {
    let ends =
        tuples.map(|tuple| [tuple.local, tuple.remote].map(|end| (end.ip().to_canonical(), end.port())));
    let mut ends: Vec<_> = ends.filter(|ends| ends.iter().all(|(_, port)| *port != 0)).collect();
    ends.sort_unstable();
    ends.dedup();
    ends
}

fn is_on() -> Result<bool, BadOption> {
    match crate::lock::variable(RECORD_VARIABLE).as_str() {
        "" | "on" => Ok(true),
        "off" => Ok(false),
        other => Err(BadOption { variable: RECORD_VARIABLE, value: other.into(), expected: "on or off" }),
    }
}

fn identify(pid: i32) -> Result<ProcessId, RecordError> {
    ProcessId::of(pid).map_err(|source| RecordError::Process { pid, source })
}

fn folder(dir: BorrowedFd<'_>) -> Folder {
    let path = std::fs::read_link(format!("/proc/self/fd/{}", dir.as_raw_fd())).unwrap_or_default();
    let (dev, ino) = fstat(dir.as_fd()).map_or((0, 0), |stat| (stat.st_dev, stat.st_ino));
    Folder { path: path.to_string_lossy().into_owned(), dev, ino }
}
