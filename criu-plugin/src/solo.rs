//! Descriptors that CRIU hands over one by one (DUMP_EXT_FILE, RESTORE_EXT_FILE).

#![allow(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, IntoRawFd};

use soccr::connection::Queues;
use soccr::criu::image::ImageDir;
use soccr::criu::image::external::ExternalImage;
use soccr::forge::Forge;
use soccr::kernel::sockopt;
use soccr::repair::{Paused, four_tuple};
use soccr::restore::RoomForQueues;

/// The descriptor, if a TCP connection is behind it.
pub fn tcp_socket<'fd>(fd: i32) -> Option<BorrowedFd<'fd>> {
    if fd < 0 {
        return None;
    }
    // SAFETY: CRIU keeps the descriptor open during the hook.
    let socket = unsafe { BorrowedFd::borrow_raw(fd) };
    (sockopt::is_tcp(socket) && four_tuple(socket).is_ok()).then_some(socket)
}

/// Makes a socket from the image with this id and leaves it in repair mode, locked, for the agent to wake; `None`
/// when there is no such image.
///
/// # Errors
/// What went wrong with which connection.
pub fn restore(images: BorrowedFd<'_>, id: i32) -> Result<Option<i32>, String> {
    let images = ImageDir::duplicate(images).map_err(|error| soccr::chain(&error))?;
    let id = id.cast_unsigned();
    if !images.contains(&ExternalImage::name(id)) {
        return Ok(None);
    }
    let mut queues = Queues::default();
    let image = ExternalImage::read(&images, id, &mut queues).map_err(|error| soccr::chain(&error))?;
    build(&image, &queues).map(Some).map_err(|error| soccr::chain(error.as_ref()))
}

fn build(image: &ExternalImage, queues: &Queues) -> Result<i32, Box<dyn std::error::Error>> {
    let domain = if image.tuple.local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let socket = sockopt::socket(domain, libc::SOCK_STREAM, libc::IPPROTO_TCP)?;
    soccr::kernel::options::write(socket.as_fd(), &image.options)?;
    let paused = Paused::pause(socket)?;
    let room = RoomForQueues::make(paused.socket(), &image.tcp)?;
    let forge = Forge::new();
    let restored = paused.restore(&image.tuple, &image.tcp, &queues.recv, &queues.send, &forge);
    if restored.is_err() {
        drop(paused.release()); // closed silently
        return Err(Box::new(restored.err().ok_or("restored")?));
    }
    forge.finish()?;
    if let Some(room) = room {
        room.give_back()?;
    }
    let socket = paused.release();
    Ok(socket.into_raw_fd())
}
