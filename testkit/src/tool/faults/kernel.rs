//! Kernels that lack something, simulated for one criu and its agent.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, c_long, sock_filter};

/// Where `struct seccomp_data` has the number of the system call, and its arguments.
const NUMBER: u32 = 0;
const ARGUMENTS: u32 = 16;

/// Makes `call` fail with `errno`, in the command and all its descendants, where each of these arguments has that value
/// in its low 32 bits.
pub fn fail(command: &mut Command, call: c_long, arguments: &[(u32, i32)], errno: i32) {
    let number = i32::try_from(call).expect("a system call's number");
    let mut tests = vec![(NUMBER, number)];
    tests.extend(arguments.iter().map(|(nth, value)| (ARGUMENTS + 8 * nth, *value)));
    let mut filter = Vec::new();
    for (nth, (offset, value)) in tests.iter().enumerate() {
        // To the last instruction: past what is left of the tests, and the error.
        let otherwise = u8::try_from(2 * (tests.len() - nth) - 1).expect("a short filter");
        filter.push(instruction(BPF_LD | BPF_W | BPF_ABS, *offset, 0));
        filter.push(instruction(BPF_JMP | BPF_JEQ | BPF_K, value.cast_unsigned(), otherwise));
    }
    filter.push(instruction(BPF_RET | BPF_K, libc::SECCOMP_RET_ERRNO | errno.unsigned_abs(), 0));
    filter.push(instruction(BPF_RET | BPF_K, libc::SECCOMP_RET_ALLOW, 0));
    // SAFETY: between fork and exec only prctl() is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(move || install(&filter));
    }
}

fn instruction(code: u32, k: u32, jf: u8) -> sock_filter {
    sock_filter { code: u16::try_from(code).expect("an instruction"), jt: 0, jf, k }
}

fn install(filter: &[sock_filter]) -> io::Result<()> {
    let len = u16::try_from(filter.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the kernel reads the program, whose length is right, and writes nothing.
    let done = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
