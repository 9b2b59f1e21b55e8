//! Descriptors that CRIU hands over one by one (DUMP_EXT_FILE, RESTORE_EXT_FILE).

#![allow(unsafe_code)]

use std::os::fd::{BorrowedFd, IntoRawFd};

use soccr::chain;
use soccr::connection::Queues;
use soccr::criu::image::ImageDir;
use soccr::criu::image::external::ExternalImage;
use soccr::forge::Forge;
use soccr::kernel::sockopt;
use soccr::lock::Method;
use soccr::repair::four_tuple;

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
    let images = ImageDir::duplicate(images).map_err(|error| chain(&error))?;
    let id = id.cast_unsigned();
    if !images.contains(&ExternalImage::name(id)) {
        return Ok(None);
    }
    let mut queues = Queues::default();
    let image = ExternalImage::read(&images, id, &mut queues).map_err(|error| chain(&error))?;
    let forge = Forge::behind(Method::from_env().map_err(|error| chain(&error))?);
    let paused = soccr::build(&image, &queues, &forge).map_err(|error| chain(&error))?;
    let socket = paused.release(); // the agent wakes it; until then it would be closed silently
    forge.finish().map_err(|error| chain(&error))?;
    Ok(Some(socket.into_raw_fd()))
}
