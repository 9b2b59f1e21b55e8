//! Fuzz targets for everything that soccr reads and did not write.

pub mod targets;
