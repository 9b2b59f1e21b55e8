//! stub
use std::os::fd::BorrowedFd;
/// s
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NetNs(u8);
impl NetNs {
    /// s
    pub fn of_socket(_: BorrowedFd<'_>) -> std::io::Result<Self> {
        Ok(Self(0))
    }
    /// s
    pub fn run<R>(&self, f: impl FnOnce() -> R) -> std::io::Result<R> {
        Ok(f())
    }
}
