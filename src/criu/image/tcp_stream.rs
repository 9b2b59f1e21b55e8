//! `tcp-stream-<inode hex>.img`: one connection's state, then the bytes of its receive queue, then
//! those of its send queue. What is written here is what stock CRIU writes, byte for byte.

use super::container::{Reader, head};
use super::{ImageDir, ImageError};
use crate::connection::{ControlBlock, Queues, State};
use crate::encoding::proto::tcp_stream::Tcp_stream_entry;
use crate::encoding::stream::{from_entry, to_entry};
use crate::encoding::{Magic, check_writable};

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::{Negotiated, OPT_SACK, OPT_TIMESTAMPS, OPT_WSCALE, Window, WindowScale};
    use crate::criu::image::Fault;

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
