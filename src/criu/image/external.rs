//! `soccr-ext-<id hex>.img`: a connection that CRIU handed over as an external file.
//!
//! CRIU's plugin hook `DUMP_EXT_FILE` takes a whole file over, so that no other image knows the
//! socket: this one has its addresses, state and options too (`proto/soccr.proto`). The queues'
//! bytes follow the message as in a tcp-stream image.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};

use protobuf::MessageField;

use super::container::{Magic, Reader, head};
use super::proto::soccr::{Soccr_connection_entry, Soccr_endpoint, Soccr_socket_option};
use super::tcp_stream::{check_writable, clear, from_entry, read_queues, to_entry};
use super::{Fault, ImageDir, ImageError};
use crate::connection::{ControlBlock, FourTuple, Queues, State};
use crate::kernel::options::SocketOption;

const VERSION: u32 = 1;

/// A connection with all that a socket needs to be made anew, except the queues' bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalImage {
    /// Both ends.
    pub tuple: FourTuple,
    /// State, sequences, options negotiated, windows.
    pub tcp: ControlBlock,
    /// Socket options, in the order to set them.
    pub options: Vec<SocketOption>,
    /// Whether the program has called `shutdown(SHUT_RD)`.
    pub shut_rd: bool,
    /// Whether the timestamp's bit 0 tells its unit, as it does on Linux 6.7 and later.
    pub usec_ts_known: bool,
    /// The id of the lock table that the dump left.
    pub lock_id: Option<String>,
}

impl ExternalImage {
    /// Calls `visit` with all images of this kind in the folder, one after the other: options that are as short as can
    /// be take many times their length, so whoever needs them all keeps what is needed.
    ///
    /// # Errors
    /// What is wrong with which file.
    pub fn for_each(dir: &ImageDir, mut visit: impl FnMut(Self)) -> Result<(), ImageError> {
        let mut ids = Vec::new();
        dir.for_each_name(|name| {
            let id = name.strip_prefix("soccr-ext-").and_then(|name| name.strip_suffix(".img"));
            ids.extend(id.and_then(|id| u32::from_str_radix(id, 16).ok()));
        })?;
        let mut queues = Queues::default();
        for id in ids {
            visit(Self::read(dir, id, &mut queues)?);
        }
        Ok(())
    }

    /// The name of the image with CRIU's file id `id`.
    #[must_use]
    pub fn name(id: u32) -> String {
        format!("soccr-ext-{id:x}.img")
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

    fn to_entry(&self) -> Soccr_connection_entry {
        let option = |o: &SocketOption| Soccr_socket_option {
            level: Some(o.level),
            name: Some(o.name),
            value: Some(o.value.clone()),
            ..Default::default()
        };
        Soccr_connection_entry {
            version: Some(VERSION),
            local: MessageField::some(to_endpoint(self.tuple.local)),
            remote: MessageField::some(to_endpoint(self.tuple.remote)),
            state: Some(u32::from(self.tcp.state as u8)),
            stream: MessageField::some(to_entry(&self.tcp)),
            options: self.options.iter().map(option).collect(),
            shut_rd: Some(self.shut_rd),
            usec_ts_known: Some(self.usec_ts_known),
            lock_id: self.lock_id.clone(),
            ..Default::default()
        }
    }

    fn from_entry(entry: Soccr_connection_entry) -> Result<Self, Fault> {
        if entry.version() != VERSION {
            return Err(Fault::value("version", format!("{} is not known", entry.version())));
        }
        let tuple = FourTuple {
            local: from_endpoint(&entry.local, "local")?,
            remote: from_endpoint(&entry.remote, "remote")?,
        };
        if let Some(why) = tuple.impossible() {
            return Err(Fault::value("local, remote", why));
        }
        let state = state_of(entry.state())?;
        let option = |o: Soccr_socket_option| SocketOption {
            level: o.level(),
            name: o.name(),
            value: o.value.unwrap_or_default(),
        };
        Ok(Self {
            tuple,
            tcp: from_entry(&entry.stream, state)?,
            shut_rd: entry.shut_rd(),
            usec_ts_known: entry.usec_ts_known(),
            lock_id: entry.lock_id,
            options: entry.options.into_iter().map(option).collect(),
        })
    }
}

/// The state with the kernel's number `number`.
pub(super) fn state_of(number: u32) -> Result<State, Fault> {
    let number = u8::try_from(number).map_err(|_| Fault::value("state", format!("{number} is none")))?;
    State::try_from(number).map_err(|e| Fault::value("state", e.to_string()))
}

pub(super) fn to_endpoint(addr: SocketAddr) -> Soccr_endpoint {
    let (address, scope_id) = match addr {
        SocketAddr::V4(v4) => (v4.ip().octets().to_vec(), None),
        SocketAddr::V6(v6) => (v6.ip().octets().to_vec(), Some(v6.scope_id()).filter(|id| *id != 0)),
    };
    Soccr_endpoint { address: Some(address), port: Some(addr.port().into()), scope_id, ..Default::default() }
}

pub(super) fn from_endpoint(endpoint: &Soccr_endpoint, field: &'static str) -> Result<SocketAddr, Fault> {
    let port = port_of(endpoint.port(), field)?;
    let address = endpoint.address();
    if let Ok(v4) = <[u8; 4]>::try_from(address) {
        return Ok(SocketAddr::new(IpAddr::from(v4), port));
    }
    match <[u8; 16]>::try_from(address) {
        Ok(v6) => Ok(SocketAddrV6::new(v6.into(), port, 0, endpoint.scope_id()).into()),
        Err(_) => Err(Fault::value(field, format!("address of {} bytes", address.len()))),
    }
}

/// A port as images store it: in host order, in 32 bits.
pub(super) fn port_of(port: u32, field: &'static str) -> Result<u16, Fault> {
    u16::try_from(port).map_err(|_| Fault::value(field, format!("{port} is no port")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::{Negotiated, OPT_TIMESTAMPS};

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
