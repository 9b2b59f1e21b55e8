//! The data of one TCP connection: what a checkpoint reads and a restore writes.
//!
//! Sequence numbers are those of the kernel and of RFC 9293, in host byte order. Lengths are in
//! bytes and never count a FIN, although a FIN takes a sequence number of its own.

use std::fmt;

pub use crate::four_tuple::FourTuple;
pub use crate::kernel::tcp::Window;

/// The TCP states that can be carried; the values are the kernel's (`enum` in `net/tcp_states.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs)] // RFC 9293 names them
pub enum State {
    Established = 1,
    SynSent = 2,
    FinWait1 = 4,
    FinWait2 = 5,
    Close = 7,
    CloseWait = 8,
    LastAck = 9,
    Closing = 11,
}

/// A TCP state that no socket can be checkpointed in: LISTEN, SYN_RECV, TIME_WAIT or an unknown one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("TCP state {} cannot be carried", state_name(*.0))]
pub struct UnsupportedState(pub u8);

fn state_name(state: u8) -> String {
    match state {
        3 => "SYN_RECV".into(),
        6 => "TIME_WAIT".into(),
        10 => "LISTEN".into(),
        12 => "NEW_SYN_RECV".into(),
        other => other.to_string(),
    }
}

impl TryFrom<u8> for State {
    type Error = UnsupportedState;

    fn try_from(value: u8) -> Result<Self, UnsupportedState> {
        Ok(match value {
            1 => Self::Established,
            2 => Self::SynSent,
            4 => Self::FinWait1,
            5 => Self::FinWait2,
            7 => Self::Close,
            8 => Self::CloseWait,
            9 => Self::LastAck,
            11 => Self::Closing,
            other => return Err(UnsupportedState(other)),
        })
    }
}

impl State {
    /// Whether this end has sent (or queued) its FIN.
    #[must_use]
    pub fn fin_sent(self) -> bool {
        matches!(self, Self::FinWait1 | Self::FinWait2 | Self::Closing | Self::LastAck | Self::Close)
    }

    /// Whether the peer has acknowledged this end's FIN.
    #[must_use]
    pub fn fin_acked(self) -> bool {
        matches!(self, Self::FinWait2 | Self::Close)
    }

    /// Whether the peer's FIN has been received.
    #[must_use]
    pub fn fin_received(self) -> bool {
        matches!(self, Self::CloseWait | Self::LastAck | Self::Closing | Self::Close)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Established => "ESTABLISHED",
            Self::SynSent => "SYN_SENT",
            Self::FinWait1 => "FIN_WAIT1",
            Self::FinWait2 => "FIN_WAIT2",
            Self::Close => "CLOSE",
            Self::CloseWait => "CLOSE_WAIT",
            Self::LastAck => "LAST_ACK",
            Self::Closing => "CLOSING",
        })
    }
}

/// `TCPI_OPT_TIMESTAMPS`: RFC 7323 timestamps are in use.
pub const OPT_TIMESTAMPS: u32 = 1;
/// `TCPI_OPT_SACK`: RFC 2018 selective acknowledgement is in use.
pub const OPT_SACK: u32 = 2;
/// `TCPI_OPT_WSCALE`: RFC 7323 window scaling is in use.
pub const OPT_WSCALE: u32 = 4;
/// `TCPI_OPT_ECN`: RFC 3168 explicit congestion notification is in use.
pub const OPT_ECN: u32 = 8;

/// Window scaling shifts (RFC 7323), 0 to 14 each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct WindowScale {
    /// Shift of the windows that the peer announces.
    pub snd: u8,
    /// Shift of the windows that this end announces.
    pub rcv: u8,
}

/// What the two ends agreed on in their SYN segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Negotiated {
    /// All `TCPI_OPT_*` bits as `TCP_INFO` shows them, also those that a restore does not set.
    pub mask: u32,
    /// The largest segment, in bytes, that the peer accepts (`mss_clamp`).
    pub mss_clamp: u32,
    /// Present exactly when `mask` has [`OPT_WSCALE`].
    pub wscale: Option<WindowScale>,
    /// The next TSval, present exactly when `mask` has [`OPT_TIMESTAMPS`]. Since Linux 6.7 bit 0
    /// tells whether the clock ticks in microseconds (1) or milliseconds (0).
    pub timestamp: Option<u32>,
}

/// Everything of a connection except its addresses and queue bytes; a few words, cheap to copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlBlock {
    /// The state.
    pub state: State,
    /// Bytes received and not yet read by the program.
    pub recv_len: u32,
    /// Sequence of the next byte that the peer will send (RCV.NXT); counts a received FIN.
    pub rcv_nxt: u32,
    /// Bytes in the send queue: sent and not acknowledged, then never sent.
    pub send_len: u32,
    /// Sequence that the program's next byte will get; counts a queued FIN.
    pub write_seq: u32,
    /// How many of `send_len`, at the queue's end, were never sent.
    pub unsent_len: u32,
    /// Negotiated options.
    pub negotiated: Negotiated,
    /// Windows; `None` on kernels before 4.8 and in images from there.
    pub window: Option<Window>,
}

/// The bytes of both queues. Buffers are reused from one connection to the next: clear, then fill.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Queues {
    /// `recv_len` bytes: received, acknowledged, not yet read by the program.
    pub recv: Vec<u8>,
    /// `send_len` bytes: written by the program, not yet acknowledged by the peer.
    pub send: Vec<u8>,
}

/// Lengths only: what a program and its peer tell each other is not for logs.
impl fmt::Debug for Queues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queues")
            .field("recv_len", &self.recv.len())
            .field("send_len", &self.send.len())
            .finish_non_exhaustive()
    }
}
