//! CRIU image files.
//!
//! An image directory holds one file per kind of object. Most files are *containers*: one or two
//! magic words, then messages, each behind its length ([`container`]). The directory is somebody
//! else's input: files are opened relative to it, never through a symbolic link, every length is
//! checked against the file before memory is taken for it, and an [`ImageError`] names the file
//! and the offset.
//!
//! | file | module |
//! |---|---|
//! | `tcp-stream-<inode hex>.img` | [`tcp_stream`] |
//! | `soccr-ext-<id hex>.img`, this project's own | [`external`] |
//! | `soccr.img`, likewise | [`side`] |
//! | `inventory.img` | [`inventory`] |
//! | `nftables-<ns>.img` | [`nftables`] |
//! | `netns-<ns>.img` | [`netns`] |
//! | the way from a task's descriptor to its connection, over seven kinds of files | [`index`] |

mod allowance;
pub mod container;
mod dir;
mod error;
pub mod external;
pub mod index;
pub mod inventory;
pub mod netns;
pub mod nftables;
pub mod side;
pub mod tcp_stream;

pub use crate::encoding::{Fault, ImageMessage, Nested, proto};
pub use dir::ImageDir;
pub use error::ImageError;

use crate::encoding::wire;
