//! Other values than the defaults, for every option that a socket can be given; also used by the end-to-end tests.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use soccr::kernel::options::{Care, Known, Level, TABLE};
use soccr::kernel::sockopt;
use soccr_testkit::skip::is_before;

/// Those that come back.
pub fn returning() -> impl Iterator<Item = &'static Known> {
    let returns = |known: &&Known| matches!(known.care, Care::Carried(..) | Care::ByCriu(_) | Care::Buffer);
    TABLE.iter().filter(returns)
}

/// What a socket shows of all that come back.
pub fn all(socket: BorrowedFd<'_>) -> BTreeMap<&'static str, Vec<u8>> {
    returning().filter_map(|known| Some((known.text, get(socket, known)?))).collect()
}

/// The value of one; `None` where the kernel or the socket has it not.
pub fn get(socket: BorrowedFd<'_>, known: &Known) -> Option<Vec<u8>> {
    let mut value = vec![0; 8 << 12];
    let length = match known.text {
        "SO_ATTACH_FILTER" => sockopt::filter(socket, &mut value),
        _ => sockopt::get_into(socket, known.level.number(), known.name, &mut value),
    };
    value.truncate(length.ok()?);
    Some(value)
}

/// Gives every option that comes back and that this kernel has, but these, another value than it has. Returns those that could
/// not be changed.
pub fn change(socket: BorrowedFd<'_>, device: &str, but: &[&str]) -> Vec<&'static str> {
    let changed = |known: &Known| {
        let Some(before) = get(socket, known) else { return false };
        let tried = others(known, device).into_iter().filter(|value| set(socket, known, value));
        tried.into_iter().any(|_| get(socket, known).is_some_and(|now| now != before))
    };
    // Kernels without a fix of 6.8 do not show this one.
    let shows = |known: &Known| known.text != "SO_TIMESTAMPING_NEW" || get(socket, known).is_some();
    let has = |known: &&Known| !is_before(known.since) && shows(known);
    let wanted = returning().filter(|known| !but.contains(&known.text)).filter(has);
    wanted.filter(|known| !changed(known)).map(|known| known.text).collect()
}

fn set(socket: BorrowedFd<'_>, known: &Known, value: &[u8]) -> bool {
    let done = match known.text {
        "SO_ATTACH_FILTER" => sockopt::attach_filter(socket, value),
        _ => sockopt::set_bytes(socket, known.level.number(), known.name, value),
    };
    done.is_ok()
}

/// Values to try, none of which would stop a connection.
fn others(known: &Known, device: &str) -> Vec<Vec<u8>> {
    let words = |words: &[i32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
    let one = match known.text {
        "IP_TOS" | "IPV6_TCLASS" => words(&[0x10]),
        "IP_TTL" | "IPV6_UNICAST_HOPS" => words(&[33]),
        "IP_LOCAL_PORT_RANGE" => words(&[40_000 << 16 | 30_000]),
        "IP_OPTIONS" => vec![1, 1, 1, 0],
        "IPV6_HOPOPTS" | "IPV6_DSTOPTS" | "IPV6_RTHDRDSTOPTS" => vec![0, 0, 1, 4, 0, 0, 0, 0],
        "SO_BINDTODEVICE" => device.as_bytes().to_vec(),
        "SO_ATTACH_FILTER" => words(&[6, -1]), // all of each packet
        "SO_LINGER" => words(&[1, 7]),
        "SO_RCVTIMEO_OLD" | "SO_SNDTIMEO_OLD" => [7_i64, 0].iter().flat_map(|n| n.to_ne_bytes()).collect(),
        "SO_SNDBUF" | "SO_RCVBUF" => words(&[54_321]),
        "SO_TIMESTAMPING_OLD" => words(&[0x10]), // SOF_TIMESTAMPING_SOFTWARE
        "SO_TIMESTAMPING_NEW" => words(&[0x18]), // and SOF_TIMESTAMPING_RX_SOFTWARE
        "SO_TXTIME" => words(&[libc::CLOCK_MONOTONIC, 2]), // SOF_TXTIME_REPORT_ERRORS
        "SO_MAX_PACING_RATE" => 1_000_000_000_u64.to_ne_bytes().to_vec(),
        "SO_PRIORITY" => words(&[5]),
        "TCP_KEEPIDLE" => words(&[1000]),
        "TCP_KEEPINTVL" | "TCP_KEEPCNT" => words(&[100]),
        "TCP_USER_TIMEOUT" | "TCP_WINDOW_CLAMP" => words(&[100_000]),
        "TCP_RTO_MAX_MS" | "TCP_MAXSEG" => words(&[1100]),
        "TCP_RTO_MIN_US" | "TCP_DELACK_MAX_US" => words(&[16_000]),
        "TCP_NOTSENT_LOWAT" | "SO_RESERVE_MEM" => words(&[65_536]),
        "TCP_CONGESTION" => b"reno".to_vec(),
        "TCP_FASTOPEN_KEY" => vec![7; 16],
        _ if known.level == Level::Socket && known.text == "SO_INCOMING_CPU" => words(&[0]),
        _ => return [1, 2, 0].map(|value| words(&[value])).into(),
    };
    vec![one]
}
