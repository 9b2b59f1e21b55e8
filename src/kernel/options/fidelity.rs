//! The table as documentation.

use std::fmt::Write;

use super::{Care, Known, Level, On, TABLE, When};

/// `docs/FIDELITY.md`.
#[must_use]
pub fn fidelity() -> String {
    let mut text = String::from(HEAD) + CONNECTIONS + LISTENERS;
    for (level, title) in [
        (Level::Socket, "SOL_SOCKET"),
        (Level::Tcp, "SOL_TCP"),
        (Level::Ip, "SOL_IP (of IPv6 sockets, too)"),
        (Level::Ipv6, "SOL_IPV6"),
    ] {
        let of_level = || TABLE.iter().filter(move |known| known.level == level);
        write!(text, "\n## {title}\n\n{COLUMNS}").expect("memory");
        of_level().filter_map(line).for_each(|line| text.push_str(&line));
        text.push_str("\nNot among them: ");
        let others: Vec<String> = of_level().filter_map(aside).collect();
        text.push_str(&others.join("; "));
        text.push_str(".\n");
    }
    text
}

const HEAD: &str = "\
# What comes back

Printed from the table in `src/kernel/options/table.rs` by `SOCCR_PRINT=1 cargo test --test options fidelity`; do not edit.

All socket options of Linux 6.18 at the levels that a TCP socket has, on connections and on listeners. What a program has never
set is the default of the kernel that it runs on, before and after: options with the value of a fresh socket in the same
network namespace are not carried. What CRIU's images have no field for is in `soccr.img`, by the socket's inode, with the socket's
owner (`options::owners_share_their_port_again`). With `--tcp-established` alone CRIU carries the connections, and the plugin adds the same
(`options::come_back_beside_tcp_established`); `options::stock_loses_some` shows what is missing without it.

An option that decides by which addresses and routes a connection goes must be set again, or the restore fails. Any other that the
target does not take is named in the log, and the connection goes on with the default: a congestion control algorithm that is not there, say.

An option that the kernel has and cannot be asked for (a security module forbids it) fails the dump, by the names of connection and
option, if it is so for all: one connection and one socket without a peer are read while the tasks are frozen, all others while
criu goes on, when no hook can fail a dump any more. Of those an error in criu's log names the connection and the option.
";
/// Beside what TCP_REPAIR sets.
const CONNECTIONS: &str = "
## Connections

State, sequences, windows, segment size, window scaling, SACK, timestamps, queues and FINs: all that TCP_REPAIR sets. And:

| what | Linux | stock CRIU 4.2 | with the plugin | test |
|---|---|---|---|---|
| ECN | 5.7, or net.ipv4.tcp_ecn=1 | lost | carried | `ecn::over_ipv4` and others, `marked_segments_are_echoed` |
| the smoothed round trip time | any | lost | carried with ECN, up to 0.9 s; otherwise measured anew with the first bytes that are acknowledged; what was sent before, and is lost, is sent again after a second (as a probe), then after 3 | `ecn::the_round_trip_time_comes_back` |
| the congestion window | 5.14 | ten segments, as in a new connection | carried on the same host, but for what it loses in a silence as long; elsewhere by `SOCCR_WARM`: docs/RELIABILITY.md, \"The first burst after a restore\" | `warm::a_window_is_as_it_was` and others, `a_burst_begins_with_the_window_that_was_given` |
| the slow start threshold | any | as in a new connection | the same: no call sets it but for one that limits the window for good | |
| the unit of the timestamps' clock | 6.7 | carried; by chance from images of older kernels | carried | `a_clock_keeps_its_unit` |
| the clock itself, on a host with another uptime | 3.9 | carried | carried: the peer's PAWS takes what is sent | `the_timestamp_clock_goes_on` |
| the peer's clock (ts_recent), for PAWS | any | 0 until the peer sends | the same: from its first segment on old duplicates are refused | `old_duplicates_are_refused_after_a_restore` |
| the size of a buffer that the kernel tunes, and that it goes on doing so | any | carried | carried; the largest window, too | `options::buffers_come_back`, `a_receive_buffer_is_as_it_was_and_grows_as_before` |
| how fast the program has read, from which the kernel tunes a receive buffer (rcvq_space) | any | lost | measured anew, as in a new connection: TCP_REPAIR does not tell or take it | |
| a window that is closed, on either side or both, and what waits behind it | any | carried | carried | `crossing`, `content::close_wait_with_a_closed_window`, `bytes_beyond_the_peers_window_are_sent_later` |
| queues of 64 MiB each | any | not tried | carried | `content::queues_of_64_mib_each` |
| segments that came before their turn | any | lost: the peer sends them again | lost: the peer sends them again | `segments_out_of_order_are_sent_again` |
| where a program peeks next (SO_PEEK_OFF) in a queue | 6.9 | lost | carried | `options::a_peek_offset_comes_back_with_its_queue` |
| the time of the keepalive timer that has run | any | begins anew | begins anew | `options::keepalive_goes_on`, `a_user_timeout_begins_anew` |
| the time of TCP_USER_TIMEOUT that has run | any | the option is lost | begins anew with the first retransmission after the restore | `a_user_timeout_begins_anew` |
| a congestion control algorithm that the target does not have | any | lost | named in the log, and the connection goes on with the target's default | `what_the_target_lacks_is_named` |
| the interface of a link-local address, by its name | any | the restore fails | carried | `content::a_link_local_address_finds_its_interface` |
| CLOSE, where its address is not there any more | any | the restore fails | carried | `content::a_closed_connection_needs_no_address` |
| an address that the host does not have: IP_TRANSPARENT, or IPv6 and IP_FREEBIND | any | not tried | carried; segments that are forged to it do not leave the host | `away::sockets_at_an_address_that_the_host_does_not_have`, `away::a_fin_at_an_address_that_the_host_does_not_have` |
| the same with IPv4 and IP_FREEBIND alone, from which the kernel sends nothing | any | not tried | the restore fails, names it, and can be tried again when the address is there | `away::what_needs_its_address_says_so` |
";
const LISTENERS: &str = "
## Listeners

| what | Linux | stock CRIU 4.2 | with the plugin | test |
|---|---|---|---|---|
| a connection that nobody has accepted | 6.9, with BTF, and net.ipv4.tcp_syncookies not 0 | the dump fails | carried: in its queue, in its order, with what it has sent | `accept_queue::over_ipv4`, `accept_queue::over_ipv6` |
| the same elsewhere | any | the dump fails | the dump fails, or `SOCCR_ACCEPT_QUEUE=reset` resets it | `accept_queue::where_it_cannot_be_carried` |
| the same at an IPv6 link-local address, with segments below 536 bytes (IPv6: 1220), or with urgent data | as above | the dump fails | the dump fails by name, and the queue is as it was; or `SOCCR_ACCEPT_QUEUE=reset` resets it | `accept_queue::a_small_segment_size_is_refused_and_nothing_lost`, `accept_queue::urgent_data_is_refused_and_nothing_lost` |
| one that TCP Fast Open has put there before its handshake is over | as above | the dump fails | likewise | `accept_queue::a_fast_opened_handshake_is_refused_and_nothing_lost` |
| a handshake that is not over (SYN_RECV) | as above | the client is reset | carried if the client's ACK comes before the dump's end; else the client is reset | `accept_queue::a_handshake_that_ends_during_the_dump` |
| the same with `SOCCR_LOCK=iptables`, `SOCCR_LOCK=skip` or `SOCCR_HOLD=off` | any | the client is reset | as with stock: nobody holds what its client sends. An ACK that comes before CRIU has looked at the listener fails the dump; after a later one the client is reset | |
| a client of a listener with TCP_DEFER_ACCEPT that has sent nothing | as above | the client is reset | a handshake that is not over: carried if its first bytes come before the dump's end; else the client is reset when it sends some | `at_a_listener_that_waits_for_bytes` |
| who connects between the emptying of a queue and CRIU's look at it | any | the dump fails | waits (`SOCCR_HOLD_NEW`); with `SOCCR_LOCK=iptables`, `SOCCR_LOCK=skip` or `SOCCR_HOLD_NEW=off`, which stop nobody, the dump fails, and can be tried again | |
| a listener at an address that the host does not have | any | IPv6 only: of IPv4 ones bind() comes before IP_FREEBIND | by CRIU; where that fails the log names the address (net.ipv4.ip_nonlocal_bind helps) | `away::what_needs_its_address_says_so` |
";
const COLUMNS: &str = "\
| option | Linux | stock CRIU 4.2 | with the plugin | set | test |
|---|---|---|---|---|---|
";
/// Where this machine's kernel cannot show it.
const UNTRIED: [&str; 2] = ["SO_RESERVE_MEM", "IPV6_RTHDR"];

/// The row of an option that a socket keeps.
fn line(known: &Known) -> Option<String> {
    let Known { text, since, stock, .. } = known;
    let tried = match known.level {
        _ if UNTRIED.contains(text) => "",
        _ if *text == "TCP_FASTOPEN_CONNECT" => "`every_option_goes_over`",
        Level::Ipv6 => "`options::come_back_ipv6`",
        _ => "`options::come_back_ipv4`",
    };
    let (ours, test) = match known.care {
        Care::Carried(_, On::Unconnected) => {
            ("carried on listeners; of no effect on a connection".into(), tried)
        }
        Care::Carried(..) => ("carried".into(), tried),
        Care::ByCriu(_) => ("carried by CRIU".into(), tried),
        Care::Buffer => ("carried by CRIU".into(), "`options::buffers_come_back`"),
        Care::OfConnection(what) => (what.into(), "`engine`"),
        Care::Refused(why) => (format!("refused by name: {why}"), proof(text)),
        Care::Lost(why) => (format!("lost: {why}"), proof(text)),
        Care::NoState(_) | Care::NotTcp(_) => return None,
    };
    let when = match known.when() {
        Some(When::Early) => "before bind() and connect()",
        Some(When::Late) => "at the end",
        None => "",
    };
    Some(format!("| `{text}` | {since} | {stock} | {ours} | {when} | {test} |\n"))
}

/// The test of what cannot be carried.
fn proof(option: &str) -> &'static str {
    match option {
        "SO_ATTACH_REUSEPORT_CBPF" | "SO_ATTACH_REUSEPORT_EBPF" => "`a_reuseport_program_cannot_be_seen`",
        "SO_ATTACH_BPF" => "`options::refused_by_name`",
        "TCP_MD5SIG" | "TCP_MD5SIG_EXT" => "`promises::connections_and_listeners_with_md5_keys_are_refused`",
        _ => "",
    }
}

/// One that it does not keep.
fn aside(known: &Known) -> Option<String> {
    match known.care {
        Care::NoState(why) | Care::NotTcp(why) => Some(format!("`{}` ({why})", known.text)),
        _ => None,
    }
}
