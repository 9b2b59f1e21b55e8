//! Descriptors that were in flight inside unix sockets (`SCM_RIGHTS`).

use std::collections::HashMap;

use crate::image::container::{Magic, Reader};
use crate::image::proto::sk_packet::Sk_packet_entry;
use crate::image::{ImageDir, ImageError};

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
    pub files: Vec<u32>,
}

/// Reads the packets with descriptors, by the receiving socket's file id.
pub(super) fn read(dir: &ImageDir) -> Result<HashMap<u32, Vec<Packet>>, ImageError> {
    const SCM_RIGHTS: u32 = libc::SCM_RIGHTS.unsigned_abs();
    let mut in_flight: HashMap<u32, Vec<Packet>> = HashMap::new();
    let mut queued: HashMap<u32, (u64, u64)> = HashMap::new();
    let Some(mut reader) = Reader::open_if_there(dir, "sk-queues.img", Magic::SkQueues)? else {
        return Ok(in_flight);
    };
    while let Some(entry) = reader.next_message::<Sk_packet_entry>()? {
        let length = entry.length();
        let (offset, position) = queued.entry(entry.id_for()).or_default();
        let rights = entry.scm.iter().filter(|scm| scm.type_() == SCM_RIGHTS);
        let files: Vec<u32> = rights.flat_map(|scm| scm.rights.iter().copied()).collect();
        if !files.is_empty() {
            let packet = Packet { offset: *offset, position: *position, length, files };
            in_flight.entry(entry.id_for()).or_default().push(packet);
        }
        *offset += u64::from(length);
        *position += 1;
        reader.skip_raw(length.into())?;
    }
    Ok(in_flight)
}
