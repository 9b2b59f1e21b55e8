//! The kernel interface.
#![allow(unsafe_code)]
