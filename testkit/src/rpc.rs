//! CRIU as programs call it: a message there and one back (its `images/rpc.proto`).

use std::fs::File;
use std::io::{IoSlice, pipe};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Child;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, sendmsg, socket, socketpair,
};
use nix::unistd::Pid;

use crate::criu::{field, last_errors, pass_on};
use crate::stage::{PATIENCE, Stage};
use crate::task::wait_readable;

/// `enum criu_req_type`.
#[derive(Clone, Copy, Debug)]
enum Request {
    Dump = 1,
    Restore = 2,
}

/// Who takes requests.
#[derive(Debug)]
pub enum Rpc<'a> {
    /// A `criu swrk` for each, with one end of a pair of sockets, as runtimes have it.
    Swrk(&'a Stage),
    /// Who listens.
    Service(Service),
}

/// A `criu service`, which ends with this value.
#[derive(Debug)]
pub struct Service {
    criu: Child,
    socket: PathBuf,
}

impl Service {
    /// Comes back when it listens, at a socket in the stage's folder.
    pub fn start(stage: &Stage) -> Result<Self> {
        let socket = stage.dir().join("service.socket");
        let (ready, status) = pipe()?;
        let status = OwnedFd::from(status);
        let mut command = stage.criu_command();
        command.args(["service", "-v4", "-o", "service.log", "-W"]).arg(stage.dir());
        command.arg("--address").arg(&socket).arg("--status-fd").arg(status.as_raw_fd().to_string());
        pass_on(&mut command, status);
        let service = Self { criu: command.spawn()?, socket };
        let log = || last_errors(&stage.dir().join("service.log"));
        ensure!(wait_readable(&ready, PATIENCE)?, "criu service does not listen:\n{}", log());
        Ok(service)
    }

    fn connect(&self) -> Result<OwnedFd> {
        let ours = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        connect(ours.as_raw_fd(), &UnixAddr::new(&self.socket)?).context("criu service")?;
        Ok(ours)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.criu.kill();
        let _ = self.criu.wait();
    }
}

impl Rpc<'_> {
    /// Dumps as runc does: it asks for `--tcp-established`, and leaves the rest to this configuration file.
    pub fn dump(&self, pid: Pid, images: &Path, config: &Path) -> Result<()> {
        let pid = number(2, u64::try_from(pid.as_raw())?);
        self.request(Request::Dump, images, &[pid, text(10, "dump.log")].concat(), config).map(drop)
    }

    /// Restores as runc does; the root's process id.
    pub fn restore(&self, images: &Path, config: &Path) -> Result<Pid> {
        let mut options = text(10, "restore.log");
        if let Self::Swrk(_) = self {
            options.extend(number(26, 1)); // rst_sibling, which a service refuses
        }
        let answer = self.request(Request::Restore, images, &options, config)?;
        let pid = field(&answer, 4).and_then(|(restored, _)| Some(field(restored, 1)?.1));
        Ok(Pid::from_raw(i32::try_from(pid.context("criu restored no process")?)?))
    }

    fn request(&self, request: Request, images: &Path, options: &[u8], config: &Path) -> Result<Vec<u8>> {
        let (ours, mut criu) = match self {
            Self::Swrk(stage) => swrk(stage).map(|(ours, criu)| (ours, Some(criu)))?,
            Self::Service(service) => (service.connect()?, None),
        };
        let folder = File::open(images)?;
        let options = [
            number(1, u64::try_from(folder.as_raw_fd())?),
            number(5, 1), // tcp_established
            number(9, 4), // log_level
            text(51, &config.display().to_string()),
            options.to_vec(),
        ];
        let message = [number(1, request as u64), bytes(2, &options.concat())].concat();
        sendmsg::<()>(ours.as_raw_fd(), &[IoSlice::new(&message)], &[], MsgFlags::empty(), None)?;
        let answered = wait_readable(&ours, PATIENCE * 3)?;
        if let Some(criu) = criu.as_mut().filter(|_| !answered) {
            criu.kill()?;
        }
        let mut answer = vec![0; 4096];
        let len = recv(ours.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT).unwrap_or(0);
        answer.truncate(len);
        drop(ours); // no more requests
        criu.map(|mut criu| criu.wait()).transpose()?;
        let success = field(&answer, 2).is_some_and(|(_, success)| success == 1);
        let log = || last_errors(&images.join(format!("{request:?}.log").to_lowercase()));
        ensure!(success, "{request:?}, asked for by RPC:\n{}", log());
        Ok(answer)
    }
}

fn swrk(stage: &Stage) -> Result<(OwnedFd, Child)> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let mut command = stage.criu_command();
    command.arg("swrk").arg(theirs.as_raw_fd().to_string());
    pass_on(&mut command, theirs); // the command's, and gone with it
    Ok((ours, command.spawn()?))
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value > 0x7f {
        bytes.push(0x80 | value.to_le_bytes()[0] & 0x7f);
        value >>= 7;
    }
    bytes.push(value.to_le_bytes()[0]);
    bytes
}

/// A protobuf field that is a number, or bytes, or text.
fn number(field: u64, value: u64) -> Vec<u8> {
    [varint(field << 3), varint(value)].concat()
}

fn bytes(field: u64, value: &[u8]) -> Vec<u8> {
    [varint(field << 3 | 2), varint(value.len() as u64), value.to_vec()].concat()
}

fn text(field: u64, value: &str) -> Vec<u8> {
    bytes(field, value.as_bytes())
}
