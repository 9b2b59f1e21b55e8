//! What CRIU adds to a connection: image files, tasks, records of what was done on a host, and what stock CRIU leaves
//! behind. This half knows TCP's half; never the other way round.

pub mod hold;
pub mod image;
pub mod keeper;
pub mod parallel;
pub mod record;
pub mod rules;
pub mod stock;
pub mod tasks;
pub mod warm;
