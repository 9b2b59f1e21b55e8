//! CRIU as runtimes call it: `criu swrk`, a message there and one back (its `images/rpc.proto`).

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, sendmsg, socketpair};
use nix::unistd::Pid;

use crate::criu::{field, last_errors, pass_on};
use crate::stage::Stage;
use crate::task::wait_readable;

/// `enum criu_req_type`.
#[derive(Clone, Copy, Debug)]
enum Request {
    Dump = 1,
    Restore = 2,
}

impl Stage {
    /// Dumps as runc does: it asks for `--tcp-established`, and leaves the rest to this configuration file.
    pub fn rpc_dump(&self, pid: Pid, images: &Path, config: &Path) -> Result<()> {
        let pid = number(2, u64::try_from(pid.as_raw())?);
        self.request(Request::Dump, images, &[pid, text(10, "dump.log")].concat(), config).map(drop)
    }

    /// Restores as runc does; the root's process id.
    pub fn rpc_restore(&self, images: &Path, config: &Path) -> Result<Pid> {
        let rst_sibling = number(26, 1);
        let options = [rst_sibling, text(10, "restore.log")].concat();
        let answer = self.request(Request::Restore, images, &options, config)?;
        let pid = field(&answer, 4).and_then(|(restored, _)| Some(field(restored, 1)?.1));
        Ok(Pid::from_raw(i32::try_from(pid.context("criu restored no process")?)?))
    }

    fn request(&self, request: Request, images: &Path, options: &[u8], config: &Path) -> Result<Vec<u8>> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        let folder = File::open(images)?;
        let mut command = self.criu_command();
        command.arg("swrk").arg(theirs.as_raw_fd().to_string());
        pass_on(&mut command, theirs);
        let mut criu = command.spawn()?;
        drop(command); // and with it our copy of their end

        let options = [
            number(1, u64::try_from(folder.as_raw_fd())?),
            number(5, 1), // tcp_established
            number(9, 4), // log_level
            text(51, &config.display().to_string()),
            options.to_vec(),
        ];
        let message = [number(1, request as u64), bytes(2, &options.concat())].concat();
        let log = || format!("criu swrk, {request:?}:\n{}", last_errors(&images.join("dump.log")));
        sendmsg::<()>(ours.as_raw_fd(), &[IoSlice::new(&message)], &[], MsgFlags::empty(), None)?;
        let answered = wait_readable(&ours, Duration::from_secs(60))?;
        if !answered {
            criu.kill()?;
        }
        let mut answer = vec![0; 4096];
        let len = recv(ours.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        answer.truncate(len);
        drop(ours); // no more requests
        criu.wait()?;
        ensure!(field(&answer, 2).is_some_and(|(_, success)| success == 1), log());
        Ok(answer)
    }
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
