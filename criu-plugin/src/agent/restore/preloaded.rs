//! Images that are read while CRIU makes the sockets.

use std::collections::HashMap;

use soccr::connection::{Queues, State};
use soccr::criu::image::ImageDir;
use soccr::criu::image::index::Index;
use soccr::criu::image::tcp_stream::TcpStreamImage;

/// Bytes at most, and one image more.
const ROOM: usize = 16 << 20;
/// What an image takes beside its queues.
const EACH: usize = 256;
/// So many at a time: a hook does not wait long.
const SOME: usize = 32;

/// Images by file id; those that are not here are read when they are needed.
#[derive(Debug)]
pub struct Preloaded {
    images: HashMap<u32, (TcpStreamImage, Queues)>,
    left: Vec<(u32, u32, State)>,
    bytes: usize,
}

impl Preloaded {
    /// None yet, of all that are to be restored.
    pub fn none_of(index: &Index) -> Self {
        let left = index.carried().map(|connection| (connection.file_id, connection.ino, connection.state));
        Self { images: HashMap::new(), left: left.collect(), bytes: 0 }
    }

    /// Whether there is anything to read, and room for it.
    pub fn wants_more(&self) -> bool {
        !self.left.is_empty() && self.bytes < ROOM
    }

    /// Reads some. What is wrong with an image is told when its connection is built.
    pub fn read_some(&mut self, dir: &ImageDir) {
        for _ in 0..SOME {
            let Some((file_id, ino, state)) = self.left.pop().filter(|_| self.bytes < ROOM) else { return };
            let mut queues = Queues::default();
            if let Ok(image) = TcpStreamImage::read(dir, ino, state, &mut queues) {
                self.bytes += EACH + queues.recv.len() + queues.send.len();
                self.images.insert(file_id, (image, queues));
            }
        }
    }

    /// The image and its queues, if they are here.
    pub fn get(&self, file_id: u32) -> Option<&(TcpStreamImage, Queues)> {
        self.images.get(&file_id)
    }
}
