//! How much of its congestion window a connection keeps: what is left of it after the silence, and what the host's owner says.

use std::time::{Duration, SystemTime};

use crate::connection::ControlBlock;
use crate::encoding::proto::soccr::Soccr_socket;
use crate::kernel::tcp::Info;

/// The window of a new connection (RFC 6928).
pub const INITIAL: u32 = 10;

/// What is worth carrying: a smaller window saves a burst no round trip. One that has only ever sent a segment at a time often shows 11.
const WARM: u32 = 2 * INITIAL;

/// A congestion window as it was at the dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CongestionWindow {
    /// In segments, more than [`INITIAL`].
    pub segments: u32,
    /// Where it decays.
    pub silence: Option<Silence>,
}

/// Since when nothing was in flight. The kernel halves a window for each retransmission timeout that passes so (RFC 2861).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Silence {
    /// When data was sent last, since 1970.
    pub since: Duration,
    /// The retransmission timeout.
    pub rto: Duration,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Warmth {
    /// The connection goes on with it.
    Keep,
    /// With half of it.
    Half,
    /// As a new connection.
    Fresh,
}

impl CongestionWindow {
    /// That of a connection, if it is at least twice as large as a new one's. `decays`: net.ipv4.tcp_slow_start_after_idle.
    #[must_use]
    pub fn of_connection(info: &Info, decays: bool) -> Option<Self> {
        let silent = decays && info.unacked == 0;
        let silence = silent
            .then(|| Silence { since: since_1970().saturating_sub(info.last_data_sent), rto: info.rto });
        Some(Self { segments: info.snd_cwnd, silence }).filter(|window| window.segments >= WARM)
    }

    /// That of a message.
    pub(super) fn of(message: &Soccr_socket) -> Option<Self> {
        let silence = message.sent_us.map(|since| Silence {
            since: Duration::from_micros(since),
            rto: Duration::from_micros(message.rto_us().into()),
        });
        let segments = message.cwnd.filter(|segments| *segments > INITIAL)?;
        Some(Self { segments, silence })
    }

    pub(super) fn write_to(&self, message: &mut Soccr_socket) {
        message.cwnd = Some(self.segments);
        message.sent_us = self.silence.and_then(|silence| u64::try_from(silence.since.as_micros()).ok());
        message.rto_us = self.silence.and_then(|silence| u32::try_from(silence.rto.as_micros()).ok());
    }

    /// The window to go on with now, if it is larger than a new one's: no more than the peer's largest window had room for.
    #[must_use]
    pub fn now(&self, warmth: Warmth, tcp: &ControlBlock) -> Option<u32> {
        self.at(since_1970(), warmth, tcp)
    }

    fn at(&self, now: Duration, warmth: Warmth, tcp: &ControlBlock) -> Option<u32> {
        let kept = match warmth {
            Warmth::Keep => self.segments,
            Warmth::Half => self.segments / 2,
            Warmth::Fresh => return None,
        };
        let room = tcp.window?.max_window / tcp.negotiated.mss_clamp.max(1);
        let halvings = self.silence.map_or(0, |silence| silence.timeouts_until(now));
        let left = kept.min(room).checked_shr(halvings).unwrap_or(0);
        Some(left).filter(|segments| *segments > INITIAL)
    }
}

impl Silence {
    /// How many whole timeouts have passed. A clock that was set back says none.
    fn timeouts_until(&self, now: Duration) -> u32 {
        let silent = now.saturating_sub(self.since).as_micros();
        u32::try_from(silent / self.rto.as_micros().max(1)).unwrap_or(u32::MAX)
    }
}

fn since_1970() -> Duration {
    SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::{Negotiated, State, Window};

    fn tcp(max_window: u32) -> ControlBlock {
        ControlBlock {
            state: State::Established,
            recv_len: 0,
            rcv_nxt: 0,
            send_len: 0,
            write_seq: 0,
            unsent_len: 0,
            negotiated: Negotiated { mss_clamp: 1000, ..Negotiated::default() },
            window: Some(Window { max_window, ..Window::default() }),
        }
    }

    #[test]
    fn a_window_decays_in_silence() {
        let at = Duration::from_millis;
        let silence = Silence { since: at(10_000), rto: at(200) };
        let window = CongestionWindow { segments: 400, silence: Some(silence) };
        let left = |now| window.at(at(now), Warmth::Keep, &tcp(1_000_000));
        assert_eq!(left(10_199), Some(400));
        assert_eq!(left(10_200), Some(200));
        assert_eq!(left(11_000), Some(12));
        assert_eq!(left(11_200), None);
        assert_eq!(left(u64::MAX), None);
        assert_eq!(left(0), Some(400));
        let hostile =
            CongestionWindow { segments: u32::MAX, silence: Some(Silence { rto: at(0), ..silence }) };
        assert_eq!(hostile.at(at(u64::MAX), Warmth::Keep, &tcp(1_000_000)), None);
    }

    #[test]
    fn a_window_is_no_larger_than_what_was_in_use() {
        let window = CongestionWindow { segments: u32::MAX, silence: None };
        let of = |warmth, max_window| window.at(Duration::ZERO, warmth, &tcp(max_window));
        assert_eq!(of(Warmth::Keep, 64_000), Some(64));
        assert_eq!(of(Warmth::Keep, 10_000), None);
        assert_eq!(of(Warmth::Fresh, 64_000), None);
        let window = CongestionWindow { segments: 60, silence: None };
        assert_eq!(window.at(Duration::ZERO, Warmth::Half, &tcp(64_000)), Some(30));
    }
}
