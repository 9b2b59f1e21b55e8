//! A control block as the message of CRIU's `tcp-stream` images.

use super::Fault;
use super::proto::tcp_stream::Tcp_stream_entry;
use crate::connection::{ControlBlock, Negotiated, OPT_TIMESTAMPS, OPT_WSCALE, State, Window, WindowScale};

/// What keeps this connection from being written, if anything.
pub(crate) fn check_writable(tcp: &ControlBlock, recv: &[u8], send: &[u8]) -> Result<(), String> {
    let negotiated = &tcp.negotiated;
    let contradiction = if recv.len() as u64 != u64::from(tcp.recv_len) {
        format!("receive queue of {} bytes, its length is {}", recv.len(), tcp.recv_len)
    } else if send.len() as u64 != u64::from(tcp.send_len) {
        format!("send queue of {} bytes, its length is {}", send.len(), tcp.send_len)
    } else if tcp.unsent_len > tcp.send_len {
        format!("{} bytes unsent of {}", tcp.unsent_len, tcp.send_len)
    } else if negotiated.wscale.is_some() != (negotiated.mask & OPT_WSCALE != 0) {
        "window scaling contradicts the option mask".into()
    } else if negotiated.timestamp.is_some() != (negotiated.mask & OPT_TIMESTAMPS != 0) {
        "the timestamp contradicts the option mask".into()
    } else {
        return Ok(());
    };
    Err(contradiction)
}

/// The message as stock CRIU fills it.
pub(crate) fn to_entry(tcp: &ControlBlock) -> Tcp_stream_entry {
    let ControlBlock { recv_len, rcv_nxt, send_len, write_seq, unsent_len, negotiated, window, state: _ } =
        *tcp;
    Tcp_stream_entry {
        inq_len: Some(recv_len),
        inq_seq: Some(rcv_nxt),
        outq_len: Some(send_len),
        outq_seq: Some(write_seq),
        unsq_len: Some(unsent_len),
        opt_mask: Some(negotiated.mask),
        mss_clamp: Some(negotiated.mss_clamp),
        snd_wscale: Some(negotiated.wscale.map_or(0, |scale| scale.snd.into())),
        rcv_wscale: negotiated.wscale.map(|scale| scale.rcv.into()),
        timestamp: negotiated.timestamp,
        snd_wl1: window.map(|w| w.snd_wl1),
        snd_wnd: window.map(|w| w.snd_wnd),
        max_window: window.map(|w| w.max_window),
        rcv_wnd: window.map(|w| w.rcv_wnd),
        rcv_wup: window.map(|w| w.rcv_wup),
        ..Tcp_stream_entry::default()
    }
}

/// The connection that the message describes.
pub(crate) fn from_entry(entry: &Tcp_stream_entry, state: State) -> Result<ControlBlock, Fault> {
    let send_len = required(entry.outq_len, "outq_len")?;
    let unsent_len = required(entry.unsq_len, "unsq_len")?;
    if unsent_len > send_len {
        return Err(Fault::value("unsq_len", format!("{unsent_len} bytes unsent of {send_len}")));
    }
    Ok(ControlBlock {
        state,
        recv_len: required(entry.inq_len, "inq_len")?,
        rcv_nxt: required(entry.inq_seq, "inq_seq")?,
        send_len,
        write_seq: required(entry.outq_seq, "outq_seq")?,
        unsent_len,
        negotiated: negotiated_from(entry)?,
        window: window_from(entry)?,
    })
}

fn negotiated_from(entry: &Tcp_stream_entry) -> Result<Negotiated, Fault> {
    let mask = required(entry.opt_mask, "opt_mask")?;
    // It comes from tcpi_options, which has eight bits.
    if mask > u8::MAX.into() {
        return Err(Fault::value("opt_mask", format!("{mask:#x} has more than eight bits")));
    }
    let mss_clamp = required(entry.mss_clamp, "mss_clamp")?;
    if mss_clamp > u16::MAX.into() {
        return Err(Fault::value("mss_clamp", format!("{mss_clamp} is no segment size")));
    }
    let wscale = if mask & OPT_WSCALE == 0 {
        None
    } else {
        Some(WindowScale {
            snd: shift(entry.snd_wscale, "snd_wscale")?,
            rcv: shift(entry.rcv_wscale, "rcv_wscale")?,
        })
    };
    let timestamp =
        if mask & OPT_TIMESTAMPS == 0 { None } else { Some(required(entry.timestamp, "timestamp")?) };
    Ok(Negotiated { mask, mss_clamp, wscale, timestamp })
}

/// The five fields are there together or not at all: they are one kernel structure.
fn window_from(entry: &Tcp_stream_entry) -> Result<Option<Window>, Fault> {
    match (entry.snd_wl1, entry.snd_wnd, entry.max_window, entry.rcv_wnd, entry.rcv_wup) {
        (None, None, None, None, None) => Ok(None),
        (Some(snd_wl1), Some(snd_wnd), Some(max_window), Some(rcv_wnd), Some(rcv_wup)) => {
            let window = Window { snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup };
            if window.is_too_large() {
                return Err(Fault::value("snd_wnd, max_window, rcv_wnd", "are more than 1 GiB"));
            }
            Ok(Some(window))
        }
        _ => Err(Fault::value("snd_wl1 to rcv_wup", "some are there and some are missing")),
    }
}

fn shift(value: Option<u32>, field: &'static str) -> Result<u8, Fault> {
    let value = required(value, field)?;
    u8::try_from(value)
        .ok()
        .filter(|shift| *shift <= 14) // RFC 7323, 2.3
        .ok_or_else(|| Fault::value(field, format!("{value} is no shift of RFC 7323")))
}

fn required<T>(value: Option<T>, field: &'static str) -> Result<T, Fault> {
    value.ok_or_else(|| Fault::missing(field))
}
