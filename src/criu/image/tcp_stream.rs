//! `tcp-stream-<inode hex>.img`: one connection's state, then the bytes of its receive queue, then
//! those of its send queue. What is written here is what stock CRIU writes, byte for byte.

use super::container::{Magic, Reader, head};
use super::proto::tcp_stream::Tcp_stream_entry;
use super::{Fault, ImageDir, ImageError};
use crate::connection::{
    ControlBlock, Negotiated, OPT_TIMESTAMPS, OPT_WSCALE, Queues, State, Window, WindowScale,
};

/// What a tcp-stream image tells about a connection besides the queues' bytes.
///
/// The state itself (RFC 9293) is not in this file but in the socket's entry of `files.img`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpStreamImage {
    /// Sequences, options and windows.
    pub tcp: ControlBlock,
    /// `TCP_CORK`, in images of CRIU before 3.19; newer ones have it in the socket's entry.
    pub cork: Option<bool>,
    /// `TCP_NODELAY`, likewise.
    pub nodelay: Option<bool>,
}

impl TcpStreamImage {
    /// The name of the image of the socket with the inode number `ino`.
    #[must_use]
    pub fn name(ino: u32) -> String {
        format!("tcp-stream-{ino:x}.img")
    }

    /// Writes the image of the socket with the inode number `ino`; one that was there is replaced.
    ///
    /// # Errors
    /// [`ImageError::Unwritable`] if `tcp` contradicts itself or the queues, [`ImageError::Io`] if
    /// the file cannot be written; none is left then.
    pub fn write(
        dir: &ImageDir,
        ino: u32,
        tcp: &ControlBlock,
        recv: &[u8],
        send: &[u8],
    ) -> Result<(), ImageError> {
        let name = Self::name(ino);
        check_writable(tcp, recv, send).map_err(|reason| ImageError::unwritable(&name, reason))?;
        let head = head(&name, Magic::TcpStream, &to_entry(tcp))?;
        dir.create(&name, &[&head, recv, send])
    }

    /// Reads the image of the socket with the inode number `ino`, whose entry says that it is in
    /// `state`. The buffers of `queues` are reused.
    ///
    /// # Errors
    /// What is wrong with the file, [`Fault::Trailing`] included: no byte of it is left unread.
    pub fn read(dir: &ImageDir, ino: u32, state: State, queues: &mut Queues) -> Result<Self, ImageError> {
        clear(queues);
        let mut reader = Reader::open(dir, &Self::name(ino), Magic::TcpStream)?;
        let entry: Tcp_stream_entry = reader.required()?;
        let tcp = from_entry(&entry, state).map_err(|fault| reader.bad_message(fault))?;
        read_queues(reader, &tcp, queues)?;
        Ok(Self { tcp, cork: entry.cork, nodelay: entry.nodelay })
    }
}

/// Nothing of one connection may be left for the next, however the reading ends.
pub(super) fn clear(queues: &mut Queues) {
    queues.recv.clear();
    queues.send.clear();
}

/// Reads the two queues, with which the file must end.
pub(super) fn read_queues(
    mut reader: Reader,
    tcp: &ControlBlock,
    queues: &mut Queues,
) -> Result<(), ImageError> {
    reader.read_raw(tcp.recv_len.into(), &mut queues.recv)?;
    reader.read_raw(tcp.send_len.into(), &mut queues.send)?;
    reader.finish()
}

/// What keeps this connection from being written, if anything.
pub(super) fn check_writable(tcp: &ControlBlock, recv: &[u8], send: &[u8]) -> Result<(), String> {
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
pub(super) fn to_entry(tcp: &ControlBlock) -> Tcp_stream_entry {
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
pub(super) fn from_entry(entry: &Tcp_stream_entry, state: State) -> Result<ControlBlock, Fault> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::OPT_SACK;

    const RICH: ControlBlock = ControlBlock {
        state: State::Established,
        recv_len: 3,
        rcv_nxt: u32::MAX,
        send_len: 5,
        write_seq: 0x8000_0000,
        unsent_len: 2,
        negotiated: Negotiated {
            mask: OPT_TIMESTAMPS | OPT_SACK | OPT_WSCALE,
            mss_clamp: 1460,
            wscale: Some(WindowScale { snd: 14, rcv: 0 }),
            timestamp: Some(0),
        },
        window: Some(Window { snd_wl1: 1, snd_wnd: 0, max_window: 3, rcv_wnd: 4, rcv_wup: 5 }),
    };

    fn plain() -> ControlBlock {
        let negotiated = Negotiated { mask: 0, mss_clamp: 536, wscale: None, timestamp: None };
        ControlBlock { recv_len: 0, send_len: 0, unsent_len: 0, negotiated, window: None, ..RICH }
    }

    fn dir() -> (tempfile::TempDir, ImageDir) {
        let folder = tempfile::tempdir().unwrap();
        let dir = ImageDir::open(folder.path()).unwrap();
        (folder, dir)
    }

    #[test]
    fn reads_what_it_writes() {
        let (_folder, dir) = dir();
        let mut queues = Queues { recv: vec![9; 99], send: vec![9; 99] };
        for (ino, tcp, recv, send) in
            [(0xbeef, RICH, &b"abc"[..], &b"defgh"[..]), (u32::MAX, plain(), b"", b"")]
        {
            TcpStreamImage::write(&dir, ino, &tcp, recv, send).unwrap();
            let read = TcpStreamImage::read(&dir, ino, State::Established, &mut queues).unwrap();
            assert_eq!(read, TcpStreamImage { tcp, cork: None, nodelay: None });
            assert_eq!((&queues.recv[..], &queues.send[..]), (recv, send));
        }
        assert!(dir.contains("tcp-stream-beef.img") && dir.contains("tcp-stream-ffffffff.img"));
    }

    #[test]
    fn leaves_no_bytes_of_another_connection() {
        let (folder, dir) = dir();
        TcpStreamImage::write(&dir, 1, &RICH, b"abc", b"defgh").unwrap();
        let path = folder.path().join("tcp-stream-1.img");
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 6]).unwrap();
        let mut queues = Queues { recv: b"other".to_vec(), send: b"other".to_vec() };
        let error = TcpStreamImage::read(&dir, 1, State::Established, &mut queues).unwrap_err();
        let fault = Fault::Truncated { needed: 3, left: 2 };
        let wanted = ImageError::malformed("tcp-stream-1.img", whole.len() as u64 - 8, fault);
        assert_eq!(crate::chain(&error), crate::chain(&wanted));
        assert_eq!(queues, Queues::default());
    }

    #[test]
    fn refuses_to_write_contradictions() {
        let (_folder, dir) = dir();
        for tcp in [
            ControlBlock { recv_len: 2, ..RICH },
            ControlBlock { send_len: 6, ..RICH },
            ControlBlock { unsent_len: 6, ..RICH },
            ControlBlock { negotiated: Negotiated { wscale: None, ..RICH.negotiated }, ..RICH },
            ControlBlock { negotiated: Negotiated { timestamp: None, ..RICH.negotiated }, ..RICH },
            ControlBlock { negotiated: Negotiated { mask: 0, ..RICH.negotiated }, ..RICH },
        ] {
            let error = TcpStreamImage::write(&dir, 1, &tcp, b"abc", b"defgh").unwrap_err();
            assert!(matches!(error, ImageError::Unwritable { .. }), "{error}");
            assert!(!dir.contains("tcp-stream-1.img"));
        }
    }

    #[test]
    fn refuses_entries_that_make_no_sense() {
        let good = to_entry(&RICH);
        assert!(from_entry(&good, State::Established).is_ok());
        let mut spoil: Vec<fn(&mut Tcp_stream_entry)> = vec![
            |e| e.unsq_len = Some(6),
            |e| e.unsq_len = None,
            |e| e.snd_wscale = Some(15),
            |e| e.rcv_wscale = Some(256),
            |e| e.rcv_wscale = None,
            |e| e.timestamp = None,
            |e| e.mss_clamp = Some(65536),
            |e| e.opt_mask = Some(0x107),
            |e| e.rcv_wnd = Some(u32::MAX),
        ];
        spoil.extend::<[fn(&mut Tcp_stream_entry); 5]>([
            |e| e.snd_wl1 = None,
            |e| e.snd_wnd = None,
            |e| e.max_window = None,
            |e| e.rcv_wnd = None,
            |e| e.rcv_wup = None,
        ]);
        for (number, spoil) in spoil.iter().enumerate() {
            let mut entry = good.clone();
            spoil(&mut entry);
            assert!(from_entry(&entry, State::Established).is_err(), "number {number}");
        }
    }

    #[test]
    fn ignores_shifts_and_clocks_that_are_not_in_use() {
        let mut entry = to_entry(&plain());
        (entry.snd_wscale, entry.rcv_wscale, entry.timestamp) = (Some(99), Some(99), Some(1));
        assert_eq!(from_entry(&entry, State::Established).unwrap(), plain());
    }
}
