//! Every socket option that Linux knows at the levels that a TCP socket has, and what becomes of it.
//!
//! The numbers are those of `asm-generic/socket.h`, `linux/tcp.h`, `linux/in.h` and `linux/in6.h` of Linux 6.18; a test
//! compares them with the headers. The order is the one in which options are set. `docs/FIDELITY.md` is printed from this.

use Care::{Buffer, ByCriu, Carried, Lost, NoState, NotTcp, OfConnection, Refused};
use Level::{Ip, Ipv6, Socket, Tcp};
use When::{Early, Late};

/// Which protocol an option belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// `SOL_SOCKET`.
    Socket,
    /// `SOL_TCP`.
    Tcp,
    /// `SOL_IP`, of IPv6 sockets too.
    Ip,
    /// `SOL_IPV6`.
    Ipv6,
}

/// When a restored connection gets an option. A listener that CRIU has made gets all at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum When {
    /// Before bind() and connect(): it decides on addresses, routes, or the SYN.
    Early,
    /// When the connection is built, before its program runs.
    Late,
}

/// Which sockets show what a program has set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// All.
    Any,
    /// Listeners and sockets never connected: on a connection it has no effect (any more), or is not the program's. A
    /// connection is not asked for it, since each question costs time in which its task stands still.
    Unconnected,
    /// As [`On::Any`]; but the images of CRIU have it for IPv4 sockets.
    AnyButIpv4,
}

/// What becomes of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Care {
    /// It is in soccr.img where it is not the default.
    Carried(When, On),
    /// CRIU's own images have it, and CRIU sets it before the connection is built.
    ByCriu(When),
    /// As [`Care::ByCriu`], whatever the value: the kernel changes it all the time.
    Buffer,
    /// The connection's state, which is carried as a whole.
    OfConnection(&'static str),
    /// A dump is refused, by name.
    Refused(&'static str),
    /// The kernel does not show it, or does not take it back.
    Lost(&'static str),
    /// Nothing that a socket keeps: a question, an order, or another name.
    NoState(&'static str),
    /// A TCP socket does not take it.
    NotTcp(&'static str),
}

/// An option.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// Its protocol.
    pub level: Level,
    /// Its number.
    pub name: i32,
    /// Its name in the kernel's headers.
    pub text: &'static str,
    /// What an error says.
    pub(super) set: &'static str,
    /// The same of reading it.
    pub(super) get: &'static str,
    /// The first version of Linux that has it.
    pub since: &'static str,
    /// What becomes of it.
    pub care: Care,
    /// What stock CRIU 4.2 makes of it.
    pub stock: &'static str,
}

impl Level {
    /// The number that setsockopt() takes.
    #[must_use]
    pub const fn number(self) -> i32 {
        match self {
            Self::Socket => libc::SOL_SOCKET,
            Self::Tcp => libc::SOL_TCP,
            Self::Ip => libc::SOL_IP,
            Self::Ipv6 => libc::SOL_IPV6,
        }
    }
}

impl Known {
    /// Whether it is set on sockets, and when.
    #[must_use]
    pub const fn when(&self) -> Option<When> {
        match self.care {
            Carried(when, _) | ByCriu(when) => Some(when),
            Buffer => Some(Early),
            _ => None,
        }
    }

    /// Whether it is read and set as no other.
    pub(super) const fn is_filter(&self) -> bool {
        matches!((self.level, self.name), (Socket, libc::SO_ATTACH_FILTER))
    }
}

const ANY: On = On::Any;
const UNCONNECTED: On = On::Unconnected;
const NOT_IPV4: On = On::AnyButIpv4;
const READ_ONLY: Care = NoState("read only");
const RAW: Care = NotTcp("raw sockets only");
const MULTICAST: Care = NotTcp("multicast groups have datagram sockets only");
const REPAIR: Care = OfConnection("what repair mode is made of");
const KEYS: Care = Refused("keys cannot be read back");
const UNIX: Care = NotTcp("unix sockets only");

/// The option with these numbers.
#[must_use]
pub fn find(level: i32, name: i32) -> Option<&'static Known> {
    TABLE.iter().find(|known| known.level.number() == level && known.name == name)
}

macro_rules! options {
    ($($level:ident $name:literal $text:ident $since:literal: $care:expr, $stock:literal;)*) => {
        /// All of them.
        pub const TABLE: &[Known] = &[$(Known {
            level: $level,
            name: $name,
            text: stringify!($text),
            set: concat!("set ", stringify!($text)),
            get: concat!("get ", stringify!($text)),
            since: $since,
            care: $care,
            stock: $stock,
        }),*];
    };
}

options! {
    // What decides on addresses and routes. IP_TOS changes SO_PRIORITY, so it comes first.
    Ip 1 IP_TOS "1.0": Carried(Early, NOT_IPV4), "IPv4 sockets only";
    Ip 15 IP_FREEBIND "2.4": ByCriu(Early), "yes, set after bind() on IPv4 listeners";
    Ip 19 IP_TRANSPARENT "2.6.28": Carried(Early, ANY), "no";
    Ip 24 IP_BIND_ADDRESS_NO_PORT "4.2": Carried(Early, UNCONNECTED), "no";
    Ip 51 IP_LOCAL_PORT_RANGE "6.3": Carried(Early, UNCONNECTED), "no";
    Ip 10 IP_MTU_DISCOVER "2.2": Carried(Early, ANY), "no";
    Ipv6 26 IPV6_V6ONLY "2.4": ByCriu(Early), "yes";
    Ipv6 23 IPV6_MTU_DISCOVER "2.2": Carried(Early, ANY), "no";
    Ipv6 67 IPV6_TCLASS "2.6.14": Carried(Early, ANY), "no";
    Ipv6 33 IPV6_FLOWINFO_SEND "2.2": Carried(Early, ANY), "no";
    Ipv6 70 IPV6_AUTOFLOWLABEL "4.0": Carried(Early, ANY), "no";
    Ipv6 72 IPV6_ADDR_PREFERENCES "2.6.26": Carried(Early, ANY), "no";
    Socket 12 SO_PRIORITY "1.0": ByCriu(Early), "yes";
    Socket 36 SO_MARK "2.6.25": ByCriu(Early), "yes";
    Socket 25 SO_BINDTODEVICE "2.0": ByCriu(Early), "yes";
    Socket 5 SO_DONTROUTE "1.0": ByCriu(Early), "yes";
    Socket 2 SO_REUSEADDR "1.0": ByCriu(Early), "yes";
    Socket 15 SO_REUSEPORT "3.9": ByCriu(Early), "1 on each restored connection";
    Socket 74 SO_TXREHASH "5.18": Carried(Early, ANY), "no";
    Tcp 7 TCP_SYNCNT "2.4": Carried(Early, ANY), "no";
    // SOL_SOCKET
    Socket 1 SO_DEBUG "1.0": Carried(Late, UNCONNECTED), "no";
    Socket 6 SO_BROADCAST "1.0": ByCriu(Late), "yes";
    Socket 7 SO_SNDBUF "1.0": Buffer, "yes";
    Socket 8 SO_RCVBUF "1.0": Buffer, "yes";
    Socket 72 SO_BUF_LOCK "5.14": Buffer, "yes";
    Socket 9 SO_KEEPALIVE "1.0": ByCriu(Late), "yes";
    Socket 10 SO_OOBINLINE "1.0": ByCriu(Late), "yes";
    Socket 11 SO_NO_CHECK "1.0": ByCriu(Late), "yes";
    Socket 13 SO_LINGER "1.0": ByCriu(Late), "yes";
    Socket 16 SO_PASSCRED "2.2": NotTcp("unix sockets only (before Linux 6.16 any; CRIU's images have it)"), "yes";
    Socket 34 SO_PASSSEC "2.6.18": NotTcp("unix sockets only (before Linux 6.16 any; CRIU's images have it)"), "yes";
    Socket 18 SO_RCVLOWAT "1.0": ByCriu(Late), "yes";
    Socket 20 SO_RCVTIMEO_OLD "2.0": ByCriu(Late), "yes";
    Socket 21 SO_SNDTIMEO_OLD "2.0": ByCriu(Late), "yes";
    Socket 66 SO_RCVTIMEO_NEW "5.1": NoState("SO_RCVTIMEO_OLD with another layout"), "yes";
    Socket 67 SO_SNDTIMEO_NEW "5.1": NoState("SO_SNDTIMEO_OLD with another layout"), "yes";
    Socket 29 SO_TIMESTAMP_OLD "2.2": Carried(Late, ANY), "no";
    Socket 35 SO_TIMESTAMPNS_OLD "2.6.22": Carried(Late, ANY), "no";
    Socket 37 SO_TIMESTAMPING_OLD "2.6.30": Carried(Late, ANY), "no";
    Socket 63 SO_TIMESTAMP_NEW "5.1": Carried(Late, ANY), "no";
    Socket 64 SO_TIMESTAMPNS_NEW "5.1": Carried(Late, ANY), "no";
    Socket 65 SO_TIMESTAMPING_NEW "5.1": Carried(Late, ANY), "no";
    Socket 40 SO_RXQ_OVFL "2.6.33": Carried(Late, UNCONNECTED), "no";
    Socket 41 SO_WIFI_STATUS "3.3": Carried(Late, UNCONNECTED), "no";
    Socket 42 SO_PEEK_OFF "6.9": Carried(Late, ANY), "no";
    Socket 43 SO_NOFCS "3.4": Carried(Late, UNCONNECTED), "no";
    Socket 45 SO_SELECT_ERR_QUEUE "3.10": Carried(Late, ANY), "no";
    Socket 46 SO_BUSY_POLL "3.11": Carried(Late, ANY), "no";
    Socket 69 SO_PREFER_BUSY_POLL "5.11": Carried(Late, ANY), "no";
    Socket 70 SO_BUSY_POLL_BUDGET "5.11": Lost("the kernel does not show it"), "no";
    Socket 47 SO_MAX_PACING_RATE "3.13": Carried(Late, ANY), "no";
    Socket 49 SO_INCOMING_CPU "3.19": Carried(Late, UNCONNECTED), "no";
    Socket 60 SO_ZEROCOPY "4.14": Carried(Late, ANY), "no";
    Socket 61 SO_TXTIME "4.19": Carried(Late, ANY), "no";
    Socket 73 SO_RESERVE_MEM "5.16": Carried(Late, ANY), "no";
    Socket 75 SO_RCVMARK "5.19": Carried(Late, ANY), "no";
    Socket 82 SO_RCVPRIORITY "6.14": Carried(Late, ANY), "no";
    Socket 26 SO_ATTACH_FILTER "2.2": ByCriu(Late), "yes";
    Socket 44 SO_LOCK_FILTER "3.9": Carried(Late, ANY), "no";
    Socket 50 SO_ATTACH_BPF "3.19": Refused("an eBPF program cannot be read back"), "the dump fails";
    Socket 51 SO_ATTACH_REUSEPORT_CBPF "4.5": Lost("the kernel shows it to nobody; SO_DETACH_REUSEPORT_BPF would tell, and takes it away"), "no";
    Socket 52 SO_ATTACH_REUSEPORT_EBPF "4.5": Lost("the kernel shows it to nobody; SO_DETACH_REUSEPORT_BPF would tell, and takes it away"), "no";
    Socket 27 SO_DETACH_FILTER "2.2": NoState("an order"), "";
    Socket 68 SO_DETACH_REUSEPORT_BPF "5.3": NoState("an order"), "";
    Socket 53 SO_CNX_ADVICE "4.6": NoState("an order"), "";
    Socket 80 SO_DEVMEM_DONTNEED "6.12": NoState("an order"), "";
    Socket 32 SO_SNDBUFFORCE "2.6.14": NoState("SO_SNDBUF beyond the limit"), "";
    Socket 33 SO_RCVBUFFORCE "2.6.14": NoState("SO_RCVBUF beyond the limit"), "";
    Socket 62 SO_BINDTOIFINDEX "5.0": NoState("SO_BINDTODEVICE by number"), "yes";
    Socket 14 SO_BSDCOMPAT "2.2": NoState("without effect since Linux 2.6"), "";
    Socket 4 SO_ERROR "1.0": Lost("an error that waits to be read is shown once"), "no";
    Socket 3 SO_TYPE "1.0": READ_ONLY, "";
    Socket 17 SO_PEERCRED "2.2": READ_ONLY, "";
    Socket 19 SO_SNDLOWAT "1.0": READ_ONLY, "";
    Socket 28 SO_PEERNAME "2.4": READ_ONLY, "";
    Socket 30 SO_ACCEPTCONN "2.4": READ_ONLY, "";
    Socket 31 SO_PEERSEC "2.6.2": READ_ONLY, "";
    Socket 38 SO_PROTOCOL "2.6.32": READ_ONLY, "";
    Socket 39 SO_DOMAIN "2.6.32": READ_ONLY, "";
    Socket 48 SO_BPF_EXTENSIONS "3.14": READ_ONLY, "";
    Socket 55 SO_MEMINFO "4.12": READ_ONLY, "";
    Socket 56 SO_INCOMING_NAPI_ID "4.12": READ_ONLY, "";
    Socket 57 SO_COOKIE "4.12": READ_ONLY, "";
    Socket 59 SO_PEERGROUPS "4.13": READ_ONLY, "";
    Socket 71 SO_NETNS_COOKIE "5.14": READ_ONLY, "";
    Socket 22 SO_SECURITY_AUTHENTICATION "2.2": NotTcp("never implemented"), "";
    Socket 23 SO_SECURITY_ENCRYPTION_TRANSPORT "2.2": NotTcp("never implemented"), "";
    Socket 24 SO_SECURITY_ENCRYPTION_NETWORK "2.2": NotTcp("never implemented"), "";
    Socket 76 SO_PASSPIDFD "6.5": UNIX, "";
    Socket 77 SO_PEERPIDFD "6.5": UNIX, "";
    Socket 78 SO_DEVMEM_LINEAR "6.12": NotTcp("a kind of control message"), "";
    Socket 79 SO_DEVMEM_DMABUF "6.12": NotTcp("a kind of control message"), "";
    Socket 83 SO_PASSRIGHTS "6.16": UNIX, "";
    Socket 84 SO_INQ "6.18": UNIX, "";
    // SOL_TCP
    Tcp 1 TCP_NODELAY "1.0": Carried(Late, ANY), "yes";
    Tcp 3 TCP_CORK "2.2": Carried(Late, ANY), "yes";
    Tcp 4 TCP_KEEPIDLE "2.4": Carried(Late, ANY), "yes";
    Tcp 5 TCP_KEEPINTVL "2.4": Carried(Late, ANY), "yes";
    Tcp 6 TCP_KEEPCNT "2.4": Carried(Late, ANY), "yes";
    Tcp 2 TCP_MAXSEG "1.0": Carried(Late, UNCONNECTED), "no";
    Tcp 8 TCP_LINGER2 "2.4": Carried(Late, ANY), "no";
    Tcp 9 TCP_DEFER_ACCEPT "2.4": Carried(Late, UNCONNECTED), "no";
    Tcp 10 TCP_WINDOW_CLAMP "2.4": Carried(Late, ANY), "no";
    Tcp 12 TCP_QUICKACK "2.4.4": Carried(Late, ANY), "no";
    Tcp 13 TCP_CONGESTION "2.6.13": Carried(Late, ANY), "no";
    Tcp 16 TCP_THIN_LINEAR_TIMEOUTS "2.6.34": Carried(Late, ANY), "no";
    Tcp 17 TCP_THIN_DUPACK "2.6.34": NoState("without effect since Linux 4.11"), "";
    Tcp 18 TCP_USER_TIMEOUT "2.6.37": Carried(Late, ANY), "no";
    Tcp 23 TCP_FASTOPEN "3.7": Carried(Late, UNCONNECTED), "no";
    Tcp 33 TCP_FASTOPEN_KEY "4.15": Carried(Late, UNCONNECTED), "no";
    Tcp 34 TCP_FASTOPEN_NO_COOKIE "4.15": Carried(Late, UNCONNECTED), "no";
    Tcp 30 TCP_FASTOPEN_CONNECT "4.11": Carried(Late, UNCONNECTED), "no";
    Tcp 25 TCP_NOTSENT_LOWAT "3.12": Carried(Late, ANY), "no";
    Tcp 27 TCP_SAVE_SYN "4.2": Carried(Late, UNCONNECTED), "no";
    Tcp 28 TCP_SAVED_SYN "4.2": Lost("the kernel does not take it back"), "no";
    Tcp 36 TCP_INQ "4.18": Carried(Late, ANY), "no";
    Tcp 37 TCP_TX_DELAY "5.3": Carried(Late, ANY), "no";
    Tcp 44 TCP_RTO_MAX_MS "6.15": Carried(Late, ANY), "no";
    Tcp 45 TCP_RTO_MIN_US "6.15": Carried(Late, ANY), "no";
    Tcp 46 TCP_DELACK_MAX_US "6.15": Carried(Late, ANY), "no";
    Tcp 14 TCP_MD5SIG "2.6.20": KEYS, "no";
    Tcp 32 TCP_MD5SIG_EXT "4.14": KEYS, "no";
    Tcp 38 TCP_AO_ADD_KEY "6.7": KEYS, "no";
    Tcp 39 TCP_AO_DEL_KEY "6.7": KEYS, "no";
    Tcp 40 TCP_AO_INFO "6.7": KEYS, "no";
    Tcp 41 TCP_AO_GET_KEYS "6.7": KEYS, "no";
    Tcp 42 TCP_AO_REPAIR "6.7": KEYS, "no";
    Tcp 31 TCP_ULP "4.13": Refused("the state of TLS and the like cannot be read back"), "no";
    Tcp 19 TCP_REPAIR "3.5": REPAIR, "yes";
    Tcp 20 TCP_REPAIR_QUEUE "3.5": REPAIR, "yes";
    Tcp 21 TCP_QUEUE_SEQ "3.5": REPAIR, "yes";
    Tcp 22 TCP_REPAIR_OPTIONS "3.5": REPAIR, "yes, but the segment size";
    Tcp 24 TCP_TIMESTAMP "3.9": REPAIR, "yes";
    Tcp 29 TCP_REPAIR_WINDOW "4.8": REPAIR, "yes";
    Tcp 35 TCP_ZEROCOPY_RECEIVE "4.18": NoState("a way to read"), "";
    Tcp 11 TCP_INFO "2.4": READ_ONLY, "";
    Tcp 26 TCP_CC_INFO "4.1": READ_ONLY, "";
    Tcp 43 TCP_IS_MPTCP "6.7": READ_ONLY, "";
    // SOL_IP
    Ip 2 IP_TTL "1.0": Carried(Late, NOT_IPV4), "IPv4 sockets only";
    Ip 4 IP_OPTIONS "1.2": Carried(Late, ANY), "no";
    Ip 6 IP_RECVOPTS "2.2": Carried(Late, UNCONNECTED), "no";
    Ip 7 IP_RETOPTS "2.2": Carried(Late, UNCONNECTED), "no";
    Ip 8 IP_PKTINFO "2.2": Carried(Late, NOT_IPV4), "IPv4 sockets only";
    Ip 11 IP_RECVERR "2.2": Carried(Late, ANY), "no";
    Ip 12 IP_RECVTTL "2.2": Carried(Late, ANY), "no";
    Ip 13 IP_RECVTOS "2.2": Carried(Late, ANY), "no";
    Ip 18 IP_PASSSEC "2.6.17": Carried(Late, UNCONNECTED), "no";
    Ip 20 IP_ORIGDSTADDR "2.6.29": Carried(Late, UNCONNECTED), "no";
    Ip 21 IP_MINTTL "2.6.34": Carried(Late, ANY), "no";
    Ip 23 IP_CHECKSUM "4.0": Carried(Late, UNCONNECTED), "no";
    Ip 26 IP_RECVERR_RFC4884 "5.9": Carried(Late, UNCONNECTED), "no";
    Ip 34 IP_MULTICAST_LOOP "1.2": Carried(Late, UNCONNECTED), "no";
    Ip 49 IP_MULTICAST_ALL "2.6.31": Carried(Late, UNCONNECTED), "no";
    Ip 50 IP_UNICAST_IF "3.4": Lost("an interface's number; TCP does not look at it"), "no";
    Ip 9 IP_PKTOPTIONS "2.2": READ_ONLY, "";
    Ip 14 IP_MTU "2.2": READ_ONLY, "";
    Ip 52 IP_PROTOCOL "6.4": READ_ONLY, "";
    Ip 16 IP_IPSEC_POLICY "2.6": Lost("the kernel does not show it"), "no";
    Ip 17 IP_XFRM_POLICY "2.6": Lost("the kernel does not show it"), "no";
    Ip 3 IP_HDRINCL "2.0": RAW, "";
    Ip 5 IP_ROUTER_ALERT "2.2": RAW, "";
    Ip 22 IP_NODEFRAG "2.6.36": RAW, "";
    Ip 25 IP_RECVFRAGSIZE "4.10": NotTcp("datagrams only"), "";
    Ip 32 IP_MULTICAST_IF "1.2": MULTICAST, "";
    Ip 33 IP_MULTICAST_TTL "1.2": MULTICAST, "";
    Ip 35 IP_ADD_MEMBERSHIP "1.2": MULTICAST, "";
    Ip 36 IP_DROP_MEMBERSHIP "1.2": MULTICAST, "";
    Ip 37 IP_UNBLOCK_SOURCE "2.4.22": MULTICAST, "";
    Ip 38 IP_BLOCK_SOURCE "2.4.22": MULTICAST, "";
    Ip 39 IP_ADD_SOURCE_MEMBERSHIP "2.4.22": MULTICAST, "";
    Ip 40 IP_DROP_SOURCE_MEMBERSHIP "2.4.22": MULTICAST, "";
    Ip 41 IP_MSFILTER "2.4.22": MULTICAST, "";
    // SOL_IPV6
    Ipv6 2 IPV6_2292PKTINFO "2.6.14": Carried(Late, ANY), "no";
    Ipv6 3 IPV6_2292HOPOPTS "2.6.14": Carried(Late, ANY), "no";
    Ipv6 4 IPV6_2292DSTOPTS "2.6.14": Carried(Late, ANY), "no";
    Ipv6 5 IPV6_2292RTHDR "2.6.14": Carried(Late, ANY), "no";
    Ipv6 8 IPV6_2292HOPLIMIT "2.6.14": Carried(Late, ANY), "no";
    Ipv6 11 IPV6_FLOWINFO "2.2": Carried(Late, ANY), "no";
    Ipv6 16 IPV6_UNICAST_HOPS "2.2": Carried(Late, ANY), "no";
    Ipv6 19 IPV6_MULTICAST_LOOP "2.2": Carried(Late, UNCONNECTED), "no";
    Ipv6 25 IPV6_RECVERR "2.2": Carried(Late, ANY), "no";
    Ipv6 29 IPV6_MULTICAST_ALL "4.20": Carried(Late, UNCONNECTED), "no";
    Ipv6 30 IPV6_ROUTER_ALERT_ISOLATE "5.0": Carried(Late, UNCONNECTED), "no";
    Ipv6 31 IPV6_RECVERR_RFC4884 "5.9": Carried(Late, UNCONNECTED), "no";
    Ipv6 49 IPV6_RECVPKTINFO "2.6.14": ByCriu(Late), "yes";
    Ipv6 51 IPV6_RECVHOPLIMIT "2.6.14": Carried(Late, ANY), "no";
    Ipv6 53 IPV6_RECVHOPOPTS "2.6.14": Carried(Late, ANY), "no";
    Ipv6 54 IPV6_HOPOPTS "2.6.14": Carried(Late, ANY), "no";
    Ipv6 57 IPV6_RTHDR "2.6.14": Carried(Late, ANY), "no";
    Ipv6 55 IPV6_RTHDRDSTOPTS "2.6.14": Carried(Late, ANY), "no";
    Ipv6 56 IPV6_RECVRTHDR "2.6.14": Carried(Late, ANY), "no";
    Ipv6 58 IPV6_RECVDSTOPTS "2.6.14": Carried(Late, ANY), "no";
    Ipv6 59 IPV6_DSTOPTS "2.6.14": Carried(Late, ANY), "no";
    Ipv6 60 IPV6_RECVPATHMTU "2.6.35": Carried(Late, ANY), "no";
    Ipv6 62 IPV6_DONTFRAG "2.6.35": Carried(Late, ANY), "no";
    Ipv6 66 IPV6_RECVTCLASS "2.6.14": Carried(Late, ANY), "no";
    Ipv6 73 IPV6_MINHOPCOUNT "2.6.35": Carried(Late, ANY), "no";
    Ipv6 74 IPV6_ORIGDSTADDR "2.6.37": Carried(Late, UNCONNECTED), "no";
    Ipv6 77 IPV6_RECVFRAGSIZE "4.10": Carried(Late, UNCONNECTED), "no";
    Ipv6 75 IPV6_TRANSPARENT "2.6.37": NoState("IP_TRANSPARENT by another name"), "";
    Ipv6 78 IPV6_FREEBIND "4.15": NoState("IP_FREEBIND by another name"), "yes";
    Ipv6 76 IPV6_UNICAST_IF "3.4": Lost("an interface's number; TCP does not look at it"), "no";
    Ipv6 24 IPV6_MTU "2.2": Lost("the kernel shows the path's, not what was set"), "no";
    Ipv6 32 IPV6_FLOWLABEL_MGR "2.2": Lost("a leased label is the process's; the connection gets another"), "no";
    Ipv6 34 IPV6_IPSEC_POLICY "2.6": Lost("the kernel does not show it"), "no";
    Ipv6 35 IPV6_XFRM_POLICY "2.6": Lost("the kernel does not show it"), "no";
    Ipv6 1 IPV6_ADDRFORM "2.2": NoState("an order"), "";
    Ipv6 6 IPV6_2292PKTOPTIONS "2.6.14": READ_ONLY, "";
    Ipv6 61 IPV6_PATHMTU "2.6.35": READ_ONLY, "";
    Ipv6 7 IPV6_CHECKSUM "2.2": RAW, "";
    Ipv6 22 IPV6_ROUTER_ALERT "2.2": RAW, "";
    Ipv6 36 IPV6_HDRINCL "4.20": RAW, "";
    Ipv6 9 IPV6_NEXTHOP "2.2": NotTcp("never implemented"), "";
    Ipv6 10 IPV6_AUTHHDR "2.2": NotTcp("never implemented"), "";
    Ipv6 50 IPV6_PKTINFO "2.6.14": Lost("the address is bound all the same; TCP does not look at it"), "no";
    Ipv6 52 IPV6_HOPLIMIT "2.6.14": NotTcp("a kind of control message"), "";
    Ipv6 17 IPV6_MULTICAST_IF "2.2": MULTICAST, "";
    Ipv6 18 IPV6_MULTICAST_HOPS "2.2": MULTICAST, "";
    Ipv6 20 IPV6_ADD_MEMBERSHIP "2.2": MULTICAST, "";
    Ipv6 21 IPV6_DROP_MEMBERSHIP "2.2": MULTICAST, "";
    Ipv6 27 IPV6_JOIN_ANYCAST "2.4": MULTICAST, "";
    Ipv6 28 IPV6_LEAVE_ANYCAST "2.4": MULTICAST, "";
}
