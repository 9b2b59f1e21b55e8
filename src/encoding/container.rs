//! The beginning of a container: its magic, and its first message.

use protobuf::Message;

/// The word before the magic of a kind.
pub const COMMON: u32 = 0x5456_4319;

/// The magic of a kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs)] // they are named after the files
pub enum Magic {
    Inventory = 0x5831_3116,
    Pstree = 0x5027_3030,
    Core = 0x5505_3847,
    Ids = 0x5443_2030,
    Fdinfo = 0x5621_3732,
    Files = 0x5630_3138,
    /// Inet sockets before CRIU 3.0 put all kinds of files into one.
    InetSk = 0x5644_3851,
    SkQueues = 0x5626_4026,
    NetNs = 0x5593_3752,
    TcpStream = 0x5146_5506,
    /// `soccr-ext-*.img`; Strasbourg lies there.
    SoccrExternal = 0x4835_0745,
    /// `soccr.img`; Basel lies there.
    SoccrDump = 0x4733_0735,
}

/// The beginning of a container: magic and one message; raw bytes or further [messages](push_message) may follow.
pub(crate) fn head(magic: Magic, message: &impl Message) -> Result<Vec<u8>, String> {
    let mut out = Vec::with_capacity(128);
    if magic != Magic::Inventory {
        out.extend_from_slice(&COMMON.to_le_bytes());
    }
    out.extend_from_slice(&(magic as u32).to_le_bytes());
    push_message(&mut out, message)?;
    Ok(out)
}

/// Appends a message, behind its length. Says what is wrong with one that lacks a required field or is 4 GiB long.
pub(crate) fn push_message(out: &mut Vec<u8>, message: &impl Message) -> Result<(), String> {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    message.write_to_vec(out).map_err(|error| error.to_string())?;
    let length = u32::try_from(out.len() - start - 4)
        .map_err(|_| "the message's length does not fit 32 bits".to_owned())?;
    out[start..start + 4].copy_from_slice(&length.to_le_bytes());
    Ok(())
}
