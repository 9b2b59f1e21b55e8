//! Tasks and their descriptor tables.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::criu::image::allowance::{Allowance, in_hash_table, in_tree};
use crate::criu::image::container::{Magic, Reader};
use crate::criu::image::proto::core::Task_kobj_ids_entry;
use crate::criu::image::proto::fdinfo::Fdinfo_entry;
use crate::criu::image::wire::{self, Value};
use crate::criu::image::{Fault, ImageDir, ImageError};

/// A dumped task (a process; threads are not counted).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DumpedTask {
    /// Whether it runs, or is stopped, after the restore: only then does CRIU call its late hook. A
    /// zombie is not alive.
    pub alive: bool,
    /// Its descriptor table; tasks that share one have the same id. A zombie has none.
    pub files_id: Option<u32>,
    /// Its network namespace. A zombie has none.
    pub net_ns_id: Option<u32>,
    /// The descriptors, shared between tasks that share the table.
    pub fds: Arc<Vec<Fd>>,
}

/// An open descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fd {
    /// The number in the task.
    pub fd: i32,
    /// What stands behind it; several descriptors may have the same.
    pub file_id: u32,
}

/// Reads all tasks with their descriptors, and which of them is the root of the tree.
pub(super) fn read(
    dir: &ImageDir,
    allowance: &mut Allowance,
) -> Result<(BTreeMap<u32, DumpedTask>, Option<u32>), ImageError> {
    let (mut tasks, mut root) = (BTreeMap::new(), None);
    let mut tables = Tables::new();
    let mut pstree = Reader::open(dir, "pstree.img", Magic::Pstree)?;
    while let Some(message) = pstree.next_bytes()? {
        let in_pstree = 4 + message.len();
        let ids = varint(message, 1, "pid").and_then(|pid| Ok((pid, varint(message, 2, "ppid")?)));
        let (pid, ppid) = ids.map_err(|(at, fault)| pstree.bad_byte(at, fault))?;
        if ppid == 0 {
            root = root.or(Some(pid));
        }
        let (task, in_core) = read_task(dir, pid, &mut tables)?;
        allowance.take(MEMORY, in_pstree + in_core).map_err(|fault| pstree.bad_message(fault))?;
        if tasks.insert(pid, task).is_some() {
            return Err(pstree.bad_message(Fault::value("pid", format!("{pid} stands here twice"))));
        }
    }
    Ok((tasks, root))
}

/// The network namespace of the tree's root, which is the first task.
///
/// # Errors
/// What is wrong with which file, and where in it.
pub fn root_net_ns_id(dir: &ImageDir) -> Result<Option<u32>, ImageError> {
    let mut pstree = Reader::open(dir, "pstree.img", Magic::Pstree)?;
    let Some(message) = pstree.next_bytes()? else { return Ok(None) };
    let pid = varint(message, 1, "pid").map_err(|(at, fault)| pstree.bad_byte(at, fault))?;
    Ok(ids(dir, pid)?.and_then(|ids| ids.net_ns_id))
}

fn ids(dir: &ImageDir, pid: u32) -> Result<Option<Task_kobj_ids_entry>, ImageError> {
    let reader = Reader::open_if_there(dir, &format!("ids-{pid}.img"), Magic::Ids)?;
    reader.map(|mut ids| ids.required()).transpose()
}

/// Descriptor tables by their ids; tasks may share them.
type Tables = HashMap<u32, Arc<Vec<Fd>>>;

/// What a task takes, without the descriptors in its table.
const MEMORY: usize =
    in_tree::<(u32, DumpedTask)>() + in_hash_table::<(u32, Arc<Vec<Fd>>)>() + size_of::<Vec<Fd>>() + 16;

/// A task, and how long its core image's message is.
fn read_task(dir: &ImageDir, pid: u32, tables: &mut Tables) -> Result<(DumpedTask, usize), ImageError> {
    let (alive, in_core) = is_alive(dir, pid)?;
    let Some(ids) = ids(dir, pid)? else {
        return Ok((DumpedTask { alive, files_id: None, net_ns_id: None, fds: Arc::default() }, in_core));
    };
    let files_id = ids.files_id();
    let fds = match tables.entry(files_id) {
        Entry::Occupied(table) => table.get().clone(),
        Entry::Vacant(table) => table.insert(read_table(dir, files_id)?).clone(),
    };
    Ok((DumpedTask { alive, files_id: Some(files_id), net_ns_id: ids.net_ns_id, fds }, in_core))
}

/// A table without a file has no descriptors: CRIU makes no file for nothing.
fn read_table(dir: &ImageDir, files_id: u32) -> Result<Arc<Vec<Fd>>, ImageError> {
    let name = format!("fdinfo-{files_id}.img");
    let Some(mut reader) = Reader::open_if_there(dir, &name, Magic::Fdinfo)? else {
        return Ok(Arc::default());
    };
    // The length, and four required fields of at least two bytes.
    const SHORTEST: u64 = 4 + 8;
    // At once, since a vector that grows takes three times its length.
    let most = usize::try_from(reader.left() / SHORTEST).unwrap_or(0);
    let mut fds = Vec::new();
    fds.try_reserve_exact(most).map_err(|_| reader.no_memory())?;
    while let Some(entry) = reader.next_message::<Fdinfo_entry>()? {
        let fd = i32::try_from(entry.fd()).map_err(|_| {
            reader.bad_message(Fault::value("fd", format!("{} is no descriptor", entry.fd())))
        })?;
        fds.push(Fd { fd, file_id: entry.id() });
    }
    Ok(Arc::new(fds))
}

/// And the length of the core image's message. `task_state` of CRIU (`enum __compel_task_state`): running and stopped tasks come back.
fn is_alive(dir: &ImageDir, pid: u32) -> Result<(bool, usize), ImageError> {
    const ALIVE: u32 = 1;
    const STOPPED: u32 = 3;
    let name = format!("core-{pid}.img");
    let mut reader = Reader::open(dir, &name, Magic::Core)?;
    // Registers and timers make this message large; of it only one number is wanted.
    let (state, length) = match reader.next_bytes()? {
        Some(core) => task_state(core)
            .map(|state| (state, core.len()))
            .map_err(|(at, fault)| reader.bad_byte(at, fault))?,
        None => return Err(reader.bad_byte(0, Fault::Truncated { needed: 4, left: 0 })),
    };
    Ok((matches!(state, ALIVE | STOPPED), length))
}

/// `tc.task_state` of a `core_entry`.
fn task_state(core: &[u8]) -> Result<u32, (usize, Fault)> {
    for field in wire::fields(core) {
        let field = field.map_err(|e| (e.0, Fault::Wire))?;
        if let (3, Value::Bytes(tc)) = (field.number, field.value) {
            let start = field.span.end - tc.len();
            return varint(tc, 1, "task_state").map_err(|(at, fault)| (start + at, fault));
        }
    }
    Err((0, Fault::missing("tc")))
}

/// The 32-bit field `number` of `message`; an error comes with its offset in the message.
fn varint(message: &[u8], number: u32, name: &'static str) -> Result<u32, (usize, Fault)> {
    for field in wire::fields(message) {
        let field = field.map_err(|e| (e.0, Fault::Wire))?;
        if let (true, Value::Varint(value)) = (field.number == number, field.value) {
            return u32::try_from(value).map_err(|_| {
                (field.span.start, Fault::value(name, format!("{value} does not fit 32 bits")))
            });
        }
    }
    Err((0, Fault::missing(name)))
}
