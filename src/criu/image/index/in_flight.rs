//! Descriptors that were in flight inside unix sockets (`SCM_RIGHTS`).

use std::collections::HashMap;

use crate::criu::image::allowance::{Allowance, in_hash_table, in_vector};
use crate::criu::image::container::{Magic, Reader};
use crate::criu::image::proto::sk_packet::Sk_packet_entry;
use crate::criu::image::{ImageDir, ImageError};

/// An unread packet in a unix socket's receive queue that carries descriptors.
///
/// Packets are as CRIU read them, and as it sends them again at the restore: those of a stream
/// socket it may have joined with bytes that came before without a descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// How many bytes are in the queue before it: the `SO_PEEK_OFF` at which it is seen.
    pub offset: u64,
    /// How many packets are in the queue before it, those without descriptors included.
    pub position: u64,
    /// Its own bytes.
    pub length: u32,
    /// The file ids of the descriptors, in their order.
    pub files: Box<[u32]>,
}

/// Reads the packets with descriptors, by the receiving socket's file id.
pub(super) fn read(
    dir: &ImageDir,
    allowance: &mut Allowance,
) -> Result<HashMap<u32, Vec<Packet>>, ImageError> {
    const SCM_RIGHTS: u32 = libc::SCM_RIGHTS.unsigned_abs();
    let mut in_flight: HashMap<u32, Vec<Packet>> = HashMap::new();
    let mut queued: HashMap<u32, (u64, u64)> = HashMap::new();
    let Some(mut reader) = Reader::open_if_there(dir, "sk-queues.img", Magic::SkQueues)? else {
        return Ok(in_flight);
    };
    while let Some(entry) = reader.next_message::<Sk_packet_entry>()? {
        let length = entry.length();
        let in_file = 4 + reader.message().len() + length as usize;
        reader.skip_raw(length.into())?;
        let rights = entry.scm.iter().filter(|scm| scm.type_() == SCM_RIGHTS);
        let files: Box<[u32]> = rights.flat_map(|scm| scm.rights.iter().copied()).collect();
        let first = !queued.contains_key(&entry.id_for());
        allowance.take(memory_for(&files, first), in_file).map_err(|fault| reader.bad_message(fault))?;
        let (offset, position) = queued.entry(entry.id_for()).or_default();
        if !files.is_empty() {
            let packet = Packet { offset: *offset, position: *position, length, files };
            in_flight.entry(entry.id_for()).or_default().push(packet);
        }
        *offset += u64::from(length);
        *position += 1;
    }
    Ok(in_flight)
}

/// What a packet with these descriptors takes, and its socket if it is the first one there.
fn memory_for(files: &[u32], first: bool) -> usize {
    const FIRST_PIECE: usize = 4; // a vector's
    let queued = if first { in_hash_table::<(u32, (u64, u64))>() } else { 0 };
    if files.is_empty() {
        return queued;
    }
    let packets = in_vector::<Packet>().max(FIRST_PIECE * size_of::<Packet>());
    queued + in_hash_table::<(u32, Vec<Packet>)>() + packets + in_vector::<u32>() * files.len()
}
