//! Whether CRIU may go on while a restore is prepared.
//!
//! It makes its listeners as soon as a task is there, before POST_FORKING has waited for us. Only orphans are in their way
//! (a dump or restore that was interrupted has left them), only external files are connected as early, and only who gives
//! sockets other addresses, or waits for theirs, has something to do before CRIU binds them.

use soccr::criu::image::ImageDir;
use soccr::criu::image::inventory::{self, Inventory};
use soccr::criu::image::side::SideImage;
use soccr::criu::record::{Phase, Record, RecordId, Store};
use soccr::criu::rules::Rules;

/// Whether the record of the dump says that it came to its end, no connection is an external file, and addresses are as they
/// were.
pub fn is_safe(images: &ImageDir, external_ids: &[u32], rules: &Rules) -> bool {
    let as_they_were = rules.remap.is_empty() && rules.wait_address.is_none();
    let ended = || record(images).is_some_and(|record| record.phase == Phase::Dumped);
    external_ids.is_empty() && as_they_were && ended()
}

/// `None` also where the images name another record than that of their own dump.
fn record(images: &ImageDir) -> Option<Record> {
    if !images.contains(inventory::NAME) {
        return None;
    }
    let own: RecordId = SideImage::read_id(images).ok()??.parse().ok()?;
    let store = Store::open().ok()??;
    let named = Inventory::read(images).ok()?.dump_run_id.and_then(|id| id.parse().ok());
    if let Some(other) = named.filter(|named| *named != own)
        && !matches!(store.head(&other), Ok(None))
    {
        return None;
    }
    store.head(&own).ok()?
}
