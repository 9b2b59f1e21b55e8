//! The network lock.
