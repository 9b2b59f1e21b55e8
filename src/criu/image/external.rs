//! `soccr-ext-<id hex>.img`: a connection that CRIU handed over as an external file.
//!
//! CRIU's plugin hook `DUMP_EXT_FILE` takes a whole file over, so that no other image knows the
//! socket: this one has its addresses, state and options too (`proto/soccr.proto`). The queues'
//! bytes follow the message as in a tcp-stream image.

use super::container::{Reader, head};
use super::tcp_stream::{clear, read_queues};
use super::{ImageDir, ImageError};
use crate::connection::Queues;
use crate::encoding::proto::soccr::Soccr_connection_entry;
use crate::encoding::{Head, Magic, check_writable};

/// What such an image holds besides the queues' bytes.
pub type ExternalImage = Head;

impl ExternalImage {
    /// CRIU's file ids of all images of this kind in the folder.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn ids(dir: &ImageDir) -> Result<Vec<u32>, ImageError> {
        let mut ids = Vec::new();
        dir.for_each_name(|name| ids.extend(Self::id_of(name)))?;
        Ok(ids)
    }

    /// Calls `visit` with all images of this kind in the folder, one after the other: options that are as short as can
    /// be take many times their length, so whoever needs them all keeps what is needed.
    ///
    /// # Errors
    /// What is wrong with which file.
    pub fn for_each(dir: &ImageDir, visit: impl FnMut(Self)) -> Result<(), ImageError> {
        Self::read_all(dir, &Self::ids(dir)?, visit)
    }

    /// The same with those that have these ids.
    ///
    /// # Errors
    /// As [`for_each`](Self::for_each).
    pub fn read_all(dir: &ImageDir, ids: &[u32], mut visit: impl FnMut(Self)) -> Result<(), ImageError> {
        let mut queues = Queues::default();
        ids.iter().try_for_each(|id| Self::read(dir, *id, &mut queues).map(&mut visit))
    }

    /// The name of the image with CRIU's file id `id`.
    #[must_use]
    pub fn name(id: u32) -> String {
        format!("soccr-ext-{id:x}.img")
    }

    /// The id in a file's [name](Self::name); `None` for other files.
    #[must_use]
    pub fn id_of(name: &str) -> Option<u32> {
        let id = name.strip_prefix("soccr-ext-").and_then(|name| name.strip_suffix(".img"));
        id.and_then(|id| u32::from_str_radix(id, 16).ok())
    }

    /// Writes the image with CRIU's file id `id`; one that was there is replaced.
    ///
    /// # Errors
    /// As [`TcpStreamImage::write`](super::tcp_stream::TcpStreamImage::write).
    pub fn write(&self, dir: &ImageDir, id: u32, recv: &[u8], send: &[u8]) -> Result<(), ImageError> {
        let name = Self::name(id);
        check_writable(&self.tcp, recv, send).map_err(|reason| ImageError::unwritable(&name, reason))?;
        let head = head(&name, Magic::SoccrExternal, &self.to_entry())?;
        dir.create(&name, &[&head, recv, send])
    }

    /// Reads the image with CRIU's file id `id`. The buffers of `queues` are reused.
    ///
    /// # Errors
    /// As [`TcpStreamImage::read`](super::tcp_stream::TcpStreamImage::read).
    pub fn read(dir: &ImageDir, id: u32, queues: &mut Queues) -> Result<Self, ImageError> {
        clear(queues);
        let mut reader = Reader::open(dir, &Self::name(id), Magic::SoccrExternal)?;
        let entry: Soccr_connection_entry = reader.required()?;
        let image = Self::from_entry(entry).map_err(|fault| reader.bad_message(fault))?;
        read_queues(reader, &image.tcp, queues)?;
        Ok(image)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::{ControlBlock, FourTuple, Negotiated, OPT_TIMESTAMPS, State};
    use crate::kernel::options::SocketOption;

    fn image(local: &str, remote: &str) -> ExternalImage {
        let negotiated =
            Negotiated { mask: OPT_TIMESTAMPS, mss_clamp: 1440, wscale: None, timestamp: Some(3) };
        ExternalImage {
            tuple: FourTuple { local: local.parse().unwrap(), remote: remote.parse().unwrap() },
            tcp: ControlBlock {
                state: State::Closing,
                recv_len: 1,
                rcv_nxt: 7,
                send_len: 2,
                write_seq: 8,
                unsent_len: 0,
                negotiated,
                window: None,
            },
            options: vec![SocketOption { level: 6, name: 1, value: vec![1, 0, 0, 0] }],
            shut_rd: true,
            usec_ts_known: false,
            lock_id: Some("soccr-1".into()),
        }
    }

    #[test]
    fn reads_what_it_writes() {
        let folder = tempfile::tempdir().unwrap();
        let dir = ImageDir::open(folder.path()).unwrap();
        let mut queues = Queues::default();
        for (local, remote) in [
            ("10.0.0.1:1", "10.0.0.2:65535"),
            ("[fe80::1%3]:9", "[fe80::2]:8"),
            ("[::ffff:1.2.3.4]:1", "[::ffff:4.3.2.1]:2"),
        ] {
            let image = image(local, remote);
            image.write(&dir, 0x1f, b"r", b"ss").unwrap();
            assert_eq!(ExternalImage::read(&dir, 0x1f, &mut queues).unwrap(), image);
            assert_eq!(queues, Queues { recv: b"r".to_vec(), send: b"ss".to_vec() });
        }
        assert!(dir.contains("soccr-ext-1f.img"));
    }

    #[test]
    fn refuses_entries_that_make_no_sense() {
        let good = image("10.0.0.1:1", "10.0.0.2:2").to_entry();
        let spoil: [fn(&mut Soccr_connection_entry); 6] = [
            |e| e.version = Some(2),
            |e| e.state = Some(10),
            |e| e.state = Some(257),
            |e| e.local.mut_or_insert_default().address = Some(vec![0; 5]),
            |e| e.local.mut_or_insert_default().address = Some(vec![0; 16]),
            |e| e.remote.mut_or_insert_default().port = Some(65536),
        ];
        assert!(ExternalImage::from_entry(good.clone()).is_ok());
        for (number, spoil) in spoil.iter().enumerate() {
            let mut entry = good.clone();
            spoil(&mut entry);
            assert!(ExternalImage::from_entry(entry).is_err(), "number {number}");
        }
    }
}
