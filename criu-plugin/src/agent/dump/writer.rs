//! Images are written on a thread of their own, while the next connections are read.
//!
//! They go there in batches: to wake a thread for each would cost more than to write it. Who reads does not wait for who
//! writes, which is no real-time process: while two batches are under way, it writes the third itself.

use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread;

use soccr::connection::{ControlBlock, FourTuple, Queues};
use soccr::criu::image::ImageDir;
use soccr::criu::image::tcp_stream::TcpStreamImage;
use soccr::criu::tasks::Place;

use crate::agent::error::AgentError;
use crate::fault;

/// A batch is full with so many connections, or so many bytes of their queues.
const FULL: usize = 64;
const FULL_BYTES: usize = 1 << 20;

/// A connection that is read.
#[derive(Debug)]
pub struct Image {
    pub ino: u32,
    pub tuple: FourTuple,
    pub place: Place,
    pub tcp: ControlBlock,
    pub queues: Queues,
}

/// Where images are to go.
#[derive(Debug)]
pub struct Writer<'a> {
    images: &'a ImageDir,
    batch: Vec<Image>,
    bytes: usize,
    /// `None` where no thread could be had, or is worth it.
    thread: Option<SyncSender<Vec<Image>>>,
}

/// Has `read` give so many images to the writer, and comes back when all are written, or one is not.
pub fn writing(
    images: &ImageDir,
    count: usize,
    read: impl FnOnce(&mut Writer<'_>) -> Result<(), AgentError>,
) -> Result<(), AgentError> {
    thread::scope(|scope| {
        let (sender, batches) = sync_channel(1);
        let start = move || {
            let thread = thread::Builder::new().name("soccr-writer".into());
            thread.spawn_scoped(scope, move || batches.iter().try_for_each(|batch| write(images, batch))).ok()
        };
        let thread = if count > FULL { start() } else { None };
        let mut writer =
            Writer { images, batch: Vec::new(), bytes: 0, thread: thread.is_some().then_some(sender) };
        let done = read(&mut writer).and_then(|()| writer.flush());
        drop(writer);
        let written = thread
            .map_or(Ok(()), |thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        // Where the thread has stopped, its error says why.
        written.and(done)
    })
}

impl Writer<'_> {
    pub fn add(&mut self, image: Image) -> Result<(), AgentError> {
        self.bytes += image.queues.recv.len() + image.queues.send.len();
        self.batch.push(image);
        if self.batch.len() < FULL && self.bytes < FULL_BYTES { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> Result<(), AgentError> {
        let batch = std::mem::take(&mut self.batch);
        self.bytes = 0;
        let Some(thread) = &self.thread else { return write(self.images, batch) };
        match thread.try_send(batch) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(batch)) => write(self.images, batch),
            Err(TrySendError::Disconnected(_)) => Err(AgentError::Protocol("images are written no more")),
        }
    }
}

fn write(images: &ImageDir, batch: Vec<Image>) -> Result<(), AgentError> {
    batch.into_iter().try_for_each(|Image { ino, tuple, place, tcp, queues }| {
        TcpStreamImage::write(images, ino, &tcp, &queues.recv, &queues.send)
            .map_err(|source| AgentError::Image { tuple, place, source })?;
        Ok(fault::point("dump.written")?)
    })
}
