//! `struct libsoccr_sk_data` to and from the engine's description of a connection.

use std::mem::size_of;

use engine::connection::{
    ControlBlock, Negotiated, OPT_ECN, OPT_TIMESTAMPS, OPT_WSCALE, State, UnsupportedState, Window,
    WindowScale,
};
use libc::{c_int, c_uint};

/// In libsoccr_sk_data.flags: the five window fields hold data, 0 included (since Linux 4.8).
pub const SOCCR_FLAGS_WINDOW: c_uint = 0x1;

/// What a connection is, apart from its addresses and the bytes in its queues. Sequences are in
/// host byte order and count a FIN; lengths are in bytes and do not.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct libsoccr_sk_data {
    /// TCP_ESTABLISHED, TCP_SYN_SENT, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_CLOSE_WAIT,
    /// TCP_LAST_ACK, TCP_CLOSING or TCP_CLOSE.
    pub state: u32,
    /// Bytes received and not read yet.
    pub inq_len: u32,
    /// Sequence of the next byte to be received (rcv_nxt).
    pub inq_seq: u32,
    /// Bytes written and not acknowledged yet.
    pub outq_len: u32,
    /// Sequence of the next byte to be written (write_seq).
    pub outq_seq: u32,
    /// How many of outq_len, the last of them, were never sent.
    pub unsq_len: u32,
    /// TCPI_OPT_ bits: what the ends agreed on.
    pub opt_mask: u32,
    /// The largest segment that the peer takes.
    pub mss_clamp: u32,
    /// Shift of the windows that the peer announces, with TCPI_OPT_WSCALE.
    pub snd_wscale: u32,
    /// Shift of the windows that we announce, with TCPI_OPT_WSCALE.
    pub rcv_wscale: u32,
    /// The timestamp clock, with TCPI_OPT_TIMESTAMPS.
    pub timestamp: u32,
    /// SOCCR_FLAGS_ bits: which of the fields below hold data.
    pub flags: u32,
    /// SOCCR_FLAGS_WINDOW: sequence of the segment that last updated snd_wnd.
    pub snd_wl1: u32,
    /// SOCCR_FLAGS_WINDOW: the peer's window.
    pub snd_wnd: u32,
    /// SOCCR_FLAGS_WINDOW: the largest window that the peer ever announced.
    pub max_window: u32,
    /// SOCCR_FLAGS_WINDOW: our window.
    pub rcv_wnd: u32,
    /// SOCCR_FLAGS_WINDOW: rcv_nxt when our window was last announced.
    pub rcv_wup: u32,
}

/// Bytes of the structure: what a save fills in, and the least that a caller may have.
pub(crate) const SIZE: c_int = 68;
const _: () = assert!(size_of::<libsoccr_sk_data>() == 17 * size_of::<u32>());

/// The caller's structure with all of its `size` bytes zeroed; `None` if it is NULL or too
/// small.
///
/// # Safety `data` is NULL or points to `size` writable bytes that nobody else uses meanwhile.
pub unsafe fn zeroed<'a>(data: *mut libsoccr_sk_data, size: c_uint) -> Option<&'a mut libsoccr_sk_data> {
    if !fits(data, size) {
        return None;
    }
    // SAFETY: the caller vouches for `size` bytes, and zeros are a valid value.
    unsafe { data.cast::<u8>().write_bytes(0, size as usize) };
    // SAFETY: not NULL, as long as the structure at least, and just initialised.
    unsafe { data.as_mut() }
}

/// A copy of the caller's structure; `None` if it is NULL or too small.
///
/// # Safety `data` is NULL or points to `size` readable bytes.
pub unsafe fn read(data: *const libsoccr_sk_data, size: c_uint) -> Option<libsoccr_sk_data> {
    // SAFETY: not NULL and as long as the structure at least.
    fits(data, size).then(|| unsafe { data.read() })
}

fn fits(data: *const libsoccr_sk_data, size: c_uint) -> bool {
    !data.is_null() && size as usize >= size_of::<libsoccr_sk_data>()
}

impl From<&ControlBlock> for libsoccr_sk_data {
    fn from(tcp: &ControlBlock) -> Self {
        let scale = tcp.negotiated.wscale.unwrap_or_default();
        let window = tcp.window.unwrap_or_default();
        Self {
            state: tcp.state as u32,
            inq_len: tcp.recv_len,
            inq_seq: tcp.rcv_nxt,
            outq_len: tcp.send_len,
            outq_seq: tcp.write_seq,
            unsq_len: tcp.unsent_len,
            opt_mask: tcp.negotiated.mask,
            mss_clamp: tcp.negotiated.mss_clamp,
            snd_wscale: scale.snd.into(),
            rcv_wscale: scale.rcv.into(),
            timestamp: tcp.negotiated.timestamp.unwrap_or(0),
            flags: if tcp.window.is_some() { SOCCR_FLAGS_WINDOW } else { 0 },
            snd_wl1: window.snd_wl1,
            snd_wnd: window.snd_wnd,
            max_window: window.max_window,
            rcv_wnd: window.rcv_wnd,
            rcv_wup: window.rcv_wup,
        }
    }
}

/// A C program's data that describes no connection.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub enum DataError {
    /// The state cannot be carried.
    #[error(transparent)]
    State(#[from] UnsupportedState),
    /// A window scale is none.
    #[error("a window scale of {0} (at most 14)")]
    Scale(u32),
}

impl TryFrom<&libsoccr_sk_data> for ControlBlock {
    type Error = DataError;

    fn try_from(data: &libsoccr_sk_data) -> Result<Self, DataError> {
        Ok(Self {
            state: State::try_from(u8::try_from(data.state).unwrap_or(u8::MAX))?,
            recv_len: data.inq_len,
            rcv_nxt: data.inq_seq,
            send_len: data.outq_len,
            write_seq: data.outq_seq,
            unsent_len: data.unsq_len,
            negotiated: negotiated(data)?,
            window: (data.flags & SOCCR_FLAGS_WINDOW != 0).then_some(Window {
                snd_wl1: data.snd_wl1,
                snd_wnd: data.snd_wnd,
                max_window: data.max_window,
                rcv_wnd: data.rcv_wnd,
                rcv_wup: data.rcv_wup,
            }),
        })
    }
}

fn negotiated(data: &libsoccr_sk_data) -> Result<Negotiated, DataError> {
    let wscale = if data.opt_mask & OPT_WSCALE == 0 {
        None
    } else {
        Some(WindowScale { snd: scale(data.snd_wscale)?, rcv: scale(data.rcv_wscale)? })
    };
    Ok(Negotiated {
        // Only a SYN agrees on ECN, and whether a lock keeps that from the peer is not ours to know.
        mask: data.opt_mask & !OPT_ECN,
        mss_clamp: data.mss_clamp,
        wscale,
        timestamp: (data.opt_mask & OPT_TIMESTAMPS != 0).then_some(data.timestamp),
    })
}

fn scale(shift: u32) -> Result<u8, DataError> {
    u8::try_from(shift).ok().filter(|shift| *shift <= 14).ok_or(DataError::Scale(shift))
}
