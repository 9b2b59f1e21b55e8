//! Connections that the kernel makes of an ACK (`bpf_sk_assign_tcp_reqsk`, Linux 6.9, made for SYN cookies of one's own).
//!
//! A BPF program looks at what arrives at an interface (tcx, Linux 6.6). It looks only at packets with a mark, and takes
//! exactly those that a map tells it of: the kernel makes a request socket for them, as if a SYN had come before.

use std::mem::size_of;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::SysResult;
use super::bpf::{Callee, Insn, Map, MapKind, Program, Register, Width};
use crate::connection::{Negotiated, OPT_ECN, OPT_SACK};
use crate::four_tuple::FourTuple;

/// The kernel's function that it takes.
pub const FUNCTION: &str = "bpf_sk_assign_tcp_reqsk";

/// The program, loaded, and what it is told by.
#[derive(Debug)]
pub struct Requests {
    program: Program,
    /// The segment that is to become a connection, and what of.
    requests: Map,
    /// Its listener.
    listeners: Map,
}

/// The segment that is to become a connection.
#[derive(Debug)]
pub struct Ack<'a> {
    /// As on the wire.
    pub tuple: FourTuple,
    /// The peer's sequence.
    pub seq: u32,
    /// What the peer acknowledges.
    pub ack: u32,
    /// What the SYN segments would have agreed on.
    pub negotiated: &'a Negotiated,
}

/// What has become of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The program was not shown it.
    NotSeen,
    /// The kernel has made a request of it.
    Taken,
    /// The kernel has not.
    Refused(Errno),
}

impl Requests {
    /// Loads the program, for packets with this mark. `function` is the number of [`FUNCTION`] in the kernel's BTF.
    ///
    /// # Errors
    /// Those of [`Map::new`] and [`Program::of_packets`].
    pub fn load(function: u32, mark: u32) -> SysResult<Self> {
        let requests = Map::new(MapKind::Hash, KEY, REQUEST, 1)?;
        let listeners = Map::new(MapKind::Sockets, FIRST.len(), size_of::<i32>(), 1)?;
        let program = Program::of_packets(&program(function, mark, &requests, &listeners))?;
        Ok(Self { program, requests, listeners })
    }

    /// Shows it what arrives at an interface of the current network namespace, as long as the answer is open.
    ///
    /// # Errors
    /// Those of [`Program::attach_to_ingress`].
    pub fn attach(&self, interface: u32) -> SysResult<OwnedFd> {
        self.program.attach_to_ingress(interface)
    }

    /// Chooses whose connections are made.
    ///
    /// # Errors
    /// What the kernel says of the socket.
    pub fn choose(&self, listener: BorrowedFd<'_>) -> SysResult<()> {
        self.listeners.insert(&FIRST, &listener.as_raw_fd().to_ne_bytes())
    }

    /// Ends [`choose`](Self::choose): the listener is a plain one again, without operations of a map's.
    ///
    /// # Errors
    /// ENOENT: none is chosen.
    pub fn leave(&self) -> SysResult<()> {
        self.listeners.remove(&FIRST)
    }

    /// The segment to take, one at a time.
    ///
    /// # Errors
    /// E2BIG: another one is expected.
    pub fn expect(&self, ack: &Ack<'_>) -> SysResult<()> {
        self.requests.insert(&key(ack), &request(ack.negotiated))
    }

    /// What has become of the segment, which is expected no more.
    ///
    /// # Errors
    /// ENOENT: it was not expected.
    pub fn answer(&self, ack: &Ack<'_>) -> SysResult<Answer> {
        let (key, mut said) = (key(ack), [0; REQUEST]);
        let read = self.requests.read(&key, &mut said);
        read.and(self.requests.remove(&key))?;
        let [a, b, c, d, ..] = said;
        Ok(match i32::from_ne_bytes([a, b, c, d]) {
            NOT_SEEN => Answer::NotSeen,
            0 => Answer::Taken,
            refused => Answer::Refused(Errno::from_raw(refused.wrapping_neg())),
        })
    }
}

/// What the program knows a packet by: addresses, ports, sequence and acknowledgement, as they lie in it.
const KEY: usize = KEY_V6 as usize;
const KEY_V4: u8 = 20;
const KEY_V6: u8 = 44;

fn key(ack: &Ack<'_>) -> [u8; KEY] {
    let (from, to) = (ack.tuple.remote, ack.tuple.local);
    let address = |end: SocketAddr| match end.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let ports = [from.port(), to.port()].map(u16::to_be_bytes);
    let numbers = [ack.seq, ack.ack].map(u32::to_be_bytes);
    let mut key = [0; KEY];
    let bytes = [address(from), address(to), ports.concat(), numbers.concat()].concat();
    key[..bytes.len()].copy_from_slice(&bytes);
    key
}

/// What the program has to say of a packet, then `struct bpf_tcp_req_attrs`.
const REQUEST: usize = 4 + ATTRIBUTES as usize;
const ATTRIBUTES: u8 = 20;
const NOT_SEEN: i32 = 1;
/// The only element of `listeners`.
const FIRST: [u8; 4] = [0; 4];

fn request(negotiated: &Negotiated) -> [u8; REQUEST] {
    let scale = negotiated.wscale.unwrap_or_default();
    let clock = negotiated.timestamp.unwrap_or(0);
    let flag = |on: bool| u8::from(on);
    let mut request = [0; REQUEST];
    request[..4].copy_from_slice(&NOT_SEEN.to_ne_bytes());
    // rcv_tsval, the peer's clock, is not known: 0 stands for any.
    request[8..12].copy_from_slice(&clock.to_ne_bytes());
    let mss = u16::try_from(negotiated.mss_clamp).unwrap_or(u16::MAX);
    request[12..14].copy_from_slice(&mss.to_ne_bytes());
    request[14..21].copy_from_slice(&[
        scale.rcv,
        scale.snd,
        flag(negotiated.mask & OPT_ECN != 0),
        flag(negotiated.wscale.is_some()),
        flag(negotiated.mask & OPT_SACK != 0),
        flag(negotiated.timestamp.is_some()),
        flag(clock & 1 != 0), // a kernel that has the function shows the clock's unit here
    ]);
    request
}

fn program(function: u32, mark: u32, requests: &Map, listeners: &Map) -> Vec<Insn> {
    use Register::{R0, R1, R2, R3, R4, R6, R7, R8, R10};
    use Width::{Double, Word};
    const MAP_LOOKUP: Callee = Callee::Helper(1);
    const LOAD_BYTES: Callee = Callee::Helper(26);
    const SK_RELEASE: Callee = Callee::Helper(86);
    // Of `struct __sk_buff`.
    const SKB_MARK: i16 = 8;
    const SKB_PROTOCOL: i16 = 16;
    // Where the addresses begin, behind the Ethernet header.
    const ADDRESSES_V4: i32 = 14 + 12;
    const ADDRESSES_V6: i32 = 14 + 8;
    // In the frame: the key, with a word to fill its last double, and a key of `listeners`.
    const FRAME_KEY: i16 = -48;
    const FRAME_FIRST: i16 = -52;
    let ipv6 = u32::from(u16::from_ne_bytes([0x86, 0xdd]));
    let [leave, exit] = [Insn::set(R0, -1), Insn::exit()]; // TCX_NEXT: as if nobody had looked
    let mut code = vec![Insn::copy(R6, R1)];
    code.extend([Insn::load(Word, R0, R6, SKB_MARK), Insn::skip_if(R0, mark, 2), leave, exit]);

    code.extend((0..6).map(|double| Insn::store_number(Double, R10, FRAME_KEY + 8 * double, 0)));
    code.extend([Insn::set(R2, ADDRESSES_V4), Insn::set(R4, KEY_V4.into())]);
    code.extend([Insn::load(Word, R0, R6, SKB_PROTOCOL), Insn::skip_unless(R0, ipv6, 2)]);
    code.extend([Insn::set(R2, ADDRESSES_V6), Insn::set(R4, KEY_V6.into())]);
    code.extend([Insn::copy(R1, R6), Insn::copy(R3, R10), Insn::add(R3, FRAME_KEY.into())]);
    code.extend([Insn::call(LOAD_BYTES), Insn::skip_if(R0, 0, 2), leave, exit]);

    code.extend(Insn::map(R1, requests));
    code.extend([Insn::copy(R2, R10), Insn::add(R2, FRAME_KEY.into()), Insn::call(MAP_LOOKUP)]);
    code.extend([Insn::skip_unless_null(R0, 2), leave, exit, Insn::copy(R7, R0)]);

    code.extend(Insn::map(R1, listeners));
    code.push(Insn::store_number(Word, R10, FRAME_FIRST, 0));
    code.extend([Insn::copy(R2, R10), Insn::add(R2, FRAME_FIRST.into()), Insn::call(MAP_LOOKUP)]);
    code.extend([Insn::skip_unless_null(R0, 2), leave, exit, Insn::copy(R8, R0)]);

    code.extend([Insn::copy(R1, R6), Insn::copy(R2, R8), Insn::copy(R3, R7), Insn::add(R3, 4)]);
    code.extend([Insn::set(R4, ATTRIBUTES.into()), Insn::call(Callee::Kernel(function))]);
    code.extend([Insn::store(Word, R7, 0, R0), Insn::copy(R1, R8), Insn::call(SK_RELEASE), leave, exit]);
    code
}
