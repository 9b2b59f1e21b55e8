//! Socket options, for people.

use soccr::kernel::options::SocketOption;

macro_rules! names {
    ($($level:ident: $($name:ident)*;)*) => { &[$($((libc::$level, libc::$name, stringify!($name))),*),*] };
}

const NAMES: &[(i32, i32, &str)] = names! {
    SOL_SOCKET: SO_REUSEADDR SO_REUSEPORT SO_KEEPALIVE SO_LINGER SO_OOBINLINE SO_PRIORITY SO_MARK SO_RCVLOWAT SO_RCVTIMEO
        SO_SNDTIMEO SO_DONTROUTE SO_BINDTODEVICE SO_TIMESTAMP SO_BUSY_POLL SO_INCOMING_CPU SO_MAX_PACING_RATE SO_SNDBUF
        SO_RCVBUF;
    SOL_TCP: TCP_NODELAY TCP_CORK TCP_KEEPIDLE TCP_KEEPINTVL TCP_KEEPCNT TCP_SYNCNT TCP_LINGER2 TCP_USER_TIMEOUT
        TCP_NOTSENT_LOWAT TCP_CONGESTION;
    SOL_IP: IP_TOS IP_TTL IP_MTU_DISCOVER IP_FREEBIND IP_TRANSPARENT;
    SOL_IPV6: IPV6_V6ONLY IPV6_TCLASS IPV6_UNICAST_HOPS IPV6_MTU_DISCOVER;
};

/// As the headers of C call it; the numbers of one that is not known here.
pub fn name(option: &SocketOption) -> String {
    let known = NAMES.iter().find(|(level, name, _)| (*level, *name) == (option.level, option.name));
    known.map_or_else(|| format!("{}:{}", option.level, option.name), |(_, _, name)| (*name).to_owned())
}

/// Integers as such, text as text, anything else in hexadecimal.
pub fn value(option: &SocketOption) -> String {
    let bytes = &option.value;
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let is_text = matches!(
        (option.level, option.name),
        (libc::SOL_TCP, libc::TCP_CONGESTION) | (libc::SOL_SOCKET, libc::SO_BINDTODEVICE)
    );
    match <[u8; 4]>::try_from(bytes.as_slice()) {
        _ if is_text => String::from_utf8_lossy(text).into_owned(),
        Ok(number) => i32::from_ne_bytes(number).to_string(),
        Err(_) => bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
    }
}
