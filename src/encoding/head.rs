//! A connection without its queues, as the message of `proto/soccr.proto`.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};

use protobuf::MessageField;

use super::Fault;
use super::proto::soccr::{Soccr_connection_entry, Soccr_endpoint, Soccr_socket_option};
use super::stream;
use crate::connection::{ControlBlock, FourTuple, State};
use crate::kernel::options::SocketOption;

const VERSION: u32 = 1;

/// A connection with all that a socket needs to be made anew, except the queues' bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
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

impl Head {
    pub(crate) fn to_entry(&self) -> Soccr_connection_entry {
        Soccr_connection_entry {
            version: Some(VERSION),
            local: MessageField::some(to_endpoint(self.tuple.local)),
            remote: MessageField::some(to_endpoint(self.tuple.remote)),
            state: Some(u32::from(self.tcp.state as u8)),
            stream: MessageField::some(stream::to_entry(&self.tcp)),
            options: self.options.iter().map(SocketOption::to_entry).collect(),
            shut_rd: Some(self.shut_rd),
            usec_ts_known: Some(self.usec_ts_known),
            lock_id: self.lock_id.clone(),
            ..Default::default()
        }
    }

    pub(crate) fn from_entry(entry: Soccr_connection_entry) -> Result<Self, Fault> {
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
        Ok(Self {
            tuple,
            tcp: stream::from_entry(&entry.stream, state)?,
            shut_rd: entry.shut_rd(),
            usec_ts_known: entry.usec_ts_known(),
            lock_id: entry.lock_id,
            options: entry.options.into_iter().map(SocketOption::from_entry).collect(),
        })
    }
}

impl SocketOption {
    pub(crate) fn to_entry(&self) -> Soccr_socket_option {
        let Self { level, name, value } = self.clone();
        Soccr_socket_option { level: Some(level), name: Some(name), value: Some(value), ..Default::default() }
    }

    pub(crate) fn from_entry(entry: Soccr_socket_option) -> Self {
        Self { level: entry.level(), name: entry.name(), value: entry.value.unwrap_or_default() }
    }
}

/// The state with the kernel's number `number`.
pub(crate) fn state_of(number: u32) -> Result<State, Fault> {
    let number = u8::try_from(number).map_err(|_| Fault::value("state", format!("{number} is none")))?;
    State::try_from(number).map_err(|e| Fault::value("state", e.to_string()))
}

pub(crate) fn to_endpoint(addr: SocketAddr) -> Soccr_endpoint {
    let (address, scope_id) = match addr {
        SocketAddr::V4(v4) => (v4.ip().octets().to_vec(), None),
        SocketAddr::V6(v6) => (v6.ip().octets().to_vec(), Some(v6.scope_id()).filter(|id| *id != 0)),
    };
    Soccr_endpoint { address: Some(address), port: Some(addr.port().into()), scope_id, ..Default::default() }
}

pub(crate) fn from_endpoint(endpoint: &Soccr_endpoint, field: &'static str) -> Result<SocketAddr, Fault> {
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
pub(crate) fn port_of(port: u32, field: &'static str) -> Result<u16, Fault> {
    u16::try_from(port).map_err(|_| Fault::value(field, format!("{port} is no port")))
}
