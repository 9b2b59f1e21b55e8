//! Who gets the sockets: a program that takes our place, or one that listens at a unix socket.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{IoSlice, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Error, Result, bail};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::dup2;
use soccr::repair::four_tuple;

use crate::handover::Numbered;
use crate::host;

/// The first descriptor that is passed (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;
/// What one message takes (`SCM_MAX_FD`).
const MOST: usize = 253;

/// An environment variable has 128 KiB, its name included (`MAX_ARG_STRLEN`).
const LONGEST: usize = (128 << 10) - "LISTEN_FDNAMES==".len();

type Sockets = Vec<Numbered<OwnedFd>>;

pub enum Receiver {
    /// Takes our place; the descriptors keep the numbers free under which it expects the sockets.
    Program(Box<Command>, Vec<OwnedFd>),
    Unix(UnixStream),
}

impl Receiver {
    /// The program, which must be one that can be started, and the numbers for so many sockets.
    pub fn program(words: &[String], sockets: usize) -> Result<Self> {
        let [program, arguments @ ..] = words else { bail!("there is no command") };
        let path = Path::new(program);
        let is_path = program.contains('/');
        if !(if is_path { host::is_program(path) } else { host::find(program).is_some() }) {
            bail!("{program}: there is no such program");
        }
        let mut command = Command::new(program);
        command.args(arguments);
        Ok(Self::Program(Box::new(command), reserve(sockets)?))
    }

    /// The program that listens there.
    pub fn at(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).with_context(|| path.display().to_string())?;
        Ok(Self::Unix(stream))
    }

    /// Hands over the sockets; gives them back where that fails.
    pub fn give(self, sockets: Sockets) -> Result<(), (Sockets, Error)> {
        match self {
            Self::Program(command, numbers) => execute(*command, numbers, sockets),
            Self::Unix(stream) => match send(&stream, &sockets) {
                Ok(()) => Ok(()),
                Err(error) => Err((sockets, error.context("cannot send the sockets"))),
            },
        }
    }
}

/// Takes the numbers from `FIRST` on.
fn reserve(count: usize) -> Result<Vec<OwnedFd>> {
    let mut numbers = Vec::with_capacity(count);
    for wanted in (FIRST..).take(count) {
        // The kernel gives the lowest number that is free.
        let number = OwnedFd::from(File::open("/dev/null").context("cannot have so many descriptors")?);
        if number.as_raw_fd() != wanted {
            bail!(
                "descriptor {wanted} is open, and is to be a socket's number: close it ({wanted}>&- in a shell)"
            );
        }
        numbers.push(number);
    }
    Ok(numbers)
}

/// As systemd starts a program with sockets: see sd_listen_fds(3).
fn execute(
    mut command: Command,
    numbers: Vec<OwnedFd>,
    mut sockets: Sockets,
) -> Result<(), (Sockets, Error)> {
    let names: Vec<String> = sockets.iter().map(|socket| format!("fd{}", socket.fd)).collect();
    command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_PID", std::process::id().to_string());
    // Longer than the kernel lets a variable be.
    let names = names.join(":");
    if names.len() < LONGEST {
        command.env("LISTEN_FDNAMES", names);
    }
    for (numbered, mut number) in sockets.iter_mut().zip(numbers) {
        // Without close-on-exec.
        match dup2(&numbered.socket, &mut number) {
            Ok(()) => numbered.socket = number,
            Err(errno) => return Err((sockets, errno.into())),
        }
    }
    let error = command.exec();
    let program = command.get_program().to_string_lossy().into_owned();
    Err((sockets, Error::from(error).context(format!("cannot run {program}"))))
}

/// A line for each, `fdN LOCAL REMOTE`, in the message that carries it.
fn send(stream: &UnixStream, sockets: &[Numbered<OwnedFd>]) -> Result<()> {
    for batch in sockets.chunks(MOST) {
        let mut text = String::new();
        for Numbered { fd, socket, .. } in batch {
            let tuple = four_tuple(socket.as_fd())?;
            writeln!(text, "fd{fd} {} {}", tuple.local, tuple.remote)?;
        }
        let raw: Vec<RawFd> = batch.iter().map(|numbered| numbered.socket.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let data = [IoSlice::new(text.as_bytes())];
        let sent = sendmsg::<()>(stream.as_raw_fd(), &data, &rights, MsgFlags::MSG_NOSIGNAL, None)?;
        (&*stream).write_all(&text.as_bytes()[sent..])?;
    }
    Ok(())
}
