//! `inventory.img`: what holds for the whole image.

use super::container::{Magic, Reader};
use super::proto::inventory::Inventory_entry;
use super::wire::{self, Value};
use super::{Fault, ImageDir, ImageError};

/// The file.
pub const NAME: &str = "inventory.img";

const TCP_CLOSE: u32 = 10;
const NETWORK_LOCK_METHOD: u32 = 11;
const DUMP_RUN_ID: u32 = 13;

/// How the dump kept packets from the connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NetworkLock {
    /// Rules in the iptables chain `CRIU`, or one per connection; also what older images mean.
    Iptables,
    /// The table `inet CRIU-<dump run id>`.
    Nftables,
    /// No lock.
    Skip,
    /// A method of a later CRIU.
    Unknown(u32),
}

impl From<Option<u32>> for NetworkLock {
    fn from(value: Option<u32>) -> Self {
        match value {
            None | Some(0) => Self::Iptables,
            Some(1) => Self::Nftables,
            Some(2) => Self::Skip,
            Some(other) => Self::Unknown(other),
        }
    }
}

/// The part of the inventory that concerns connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inventory {
    /// Made with `--tcp-close`: CRIU restores it with that option only.
    pub tcp_close: bool,
    /// How the dump kept packets away.
    pub network_lock: NetworkLock,
    /// Names the dump, and its nftables table; `None` in images of CRIU before 4.2.
    pub dump_run_id: Option<String>,
    /// CRIU's id of the network namespace in which criu itself ran. Sockets and tasks with this id
    /// are restored into the namespace of the criu that restores them.
    pub root_net_ns_id: Option<u32>,
}

impl Inventory {
    /// Reads the inventory.
    ///
    /// # Errors
    /// What is wrong with the file; also an image so old that CRIU 4 refuses it, too.
    pub fn read(dir: &ImageDir) -> Result<Self, ImageError> {
        let mut reader = Reader::open(dir, NAME, Magic::Inventory)?;
        let entry: Inventory_entry = reader.required()?;
        if !entry.fdinfo_per_id() {
            let reason = "the image is from CRIU before 1.1, too old";
            return Err(reader.bad_message(Fault::value("fdinfo_per_id", reason)));
        }
        Ok(Self {
            tcp_close: entry.tcp_close(),
            network_lock: entry.network_lock_method.into(),
            root_net_ns_id: entry.root_ids.as_ref().and_then(|ids| ids.net_ns_id),
            dump_run_id: entry.dump_criu_run_id,
        })
    }
}

/// Makes an image that was dumped with `--tcp-close` one that stock CRIU restores with
/// `--tcp-established`. With `lock_id` it also says that the connections are locked by the nftables
/// table `inet CRIU-<lock_id>`, which stock CRIU then deletes at the end of the restore. All else in
/// the file, fields that are unknown here included, stays byte for byte.
///
/// # Errors
/// What is wrong with the file, or [`ImageError::Unwritable`] if `lock_id` is not 1 to 21 letters,
/// digits and hyphens: CRIU has 31 bytes for family and name of the table. The file is replaced as
/// a whole or stays as it was.
pub fn release_to_stock(dir: &ImageDir, lock_id: Option<&str>) -> Result<(), ImageError> {
    if lock_id.is_some_and(|id| !is_lock_id(id)) {
        return Err(ImageError::unwritable(NAME, "the lock's id is not 1 to 21 letters, digits and hyphens"));
    }
    let mut reader = Reader::open(dir, NAME, Magic::Inventory)?;
    reader.required::<Inventory_entry>()?;
    let new = released(reader.message(), lock_id).map_err(|e| reader.bad_byte(e.0, Fault::Wire))?;
    reader.finish()?;
    let magic = (Magic::Inventory as u32).to_le_bytes();
    let length = u32::try_from(new.len())
        .map_err(|_| ImageError::unwritable(NAME, "the message's length does not fit 32 bits"))?;
    dir.replace(NAME, &[&magic, &length.to_le_bytes(), &new])
}

fn is_lock_id(id: &str) -> bool {
    (1..=21).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// The message without `tcp_close` and, given a lock, with the lock's two fields at the place that
/// the order of field numbers gives them.
fn released(message: &[u8], lock_id: Option<&str>) -> Result<Vec<u8>, wire::NotAField> {
    let mut pending = Vec::new();
    if let Some(id) = lock_id {
        pending.push((NETWORK_LOCK_METHOD, Value::Varint(1)));
        pending.push((DUMP_RUN_ID, Value::Bytes(id.as_bytes())));
    }
    let replaced: Vec<u32> = pending.iter().map(|(number, _)| *number).collect();
    let mut pending = pending.into_iter().peekable();
    let mut out = Vec::with_capacity(message.len() + 32);
    for field in wire::fields(message) {
        let field = field?;
        while let Some((number, value)) = pending.next_if(|(number, _)| *number <= field.number) {
            put(&mut out, number, value);
        }
        if field.number != TCP_CLOSE && !replaced.contains(&field.number) {
            out.extend_from_slice(&message[field.span]);
        }
    }
    pending.for_each(|(number, value)| put(&mut out, number, value));
    Ok(out)
}

fn put(out: &mut Vec<u8>, number: u32, value: Value<'_>) {
    match value {
        Value::Bytes(bytes) => wire::put_bytes(out, number, bytes),
        Value::Varint(value) => wire::put_varint(out, number, value),
        Value::Fixed32 | Value::Fixed64 => {} // the inventory's lock has no such fields
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(fields: &[(u32, Value<'_>)]) -> Vec<u8> {
        let mut out = Vec::new();
        fields.iter().for_each(|(number, value)| put(&mut out, *number, *value));
        out
    }

    const VERSION: (u32, Value<'_>) = (1, Value::Varint(2));
    const OTHERS: [(u32, Value<'_>); 3] =
        [(14, Value::Varint(1)), (99, Value::Bytes(b"later")), (98, Value::Varint(7))];

    #[test]
    fn drops_tcp_close_only() {
        let with = message(&[VERSION, (10, Value::Varint(1)), (12, Value::Bytes(b"")), OTHERS[1], OTHERS[2]]);
        let without = message(&[VERSION, (12, Value::Bytes(b"")), OTHERS[1], OTHERS[2]]);
        assert_eq!(released(&with, None).unwrap(), without);
        assert_eq!(released(&without, None).unwrap(), without);
    }

    #[test]
    fn puts_the_lock_where_stock_has_it() {
        let lock = [(11, Value::Varint(1)), (13, Value::Bytes(b"ours"))];
        let wanted = message(&[VERSION, lock[0], (12, Value::Bytes(b"p")), lock[1], OTHERS[0], OTHERS[1]]);
        for old in [
            message(&[VERSION, (12, Value::Bytes(b"p")), OTHERS[0], OTHERS[1]]),
            message(&[
                VERSION,
                (10, Value::Varint(1)),
                (11, Value::Varint(0)),
                (12, Value::Bytes(b"p")),
                (13, Value::Bytes(b"theirs")),
                OTHERS[0],
                OTHERS[1],
            ]),
        ] {
            assert_eq!(released(&old, Some("ours")).unwrap(), wanted);
        }
        assert_eq!(
            released(&message(&[VERSION]), Some("ours")).unwrap(),
            message(&[VERSION, lock[0], lock[1]])
        );
    }

    #[test]
    fn refuses_ids_that_would_not_name_one_table() {
        for id in ["", "a b", "x{", "1234567890123456789012"] {
            assert!(!is_lock_id(id), "{id}");
        }
        assert!(is_lock_id("soccr-0123456789abcde"));
    }
}
