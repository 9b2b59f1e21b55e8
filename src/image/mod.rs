//! CRIU image files.
