//! A client and two hosts on one bridge, and an address that a server takes along from one host to the other.

use std::fs;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::if_nametoindex;

use crate::capture::packet_socket;
use crate::criu::{Criu, Side};
use crate::netns::{End, NetNs, veth};
use crate::stage::{Stage, V4, V6};
use crate::task::Task;

/// The device of each host.
const DEVICE: &str = "eth0";

/// Who carries the connections to the other host, and whether they are held there before their addresses come.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    /// Who dumps and restores.
    pub side: Side,
    /// `soccr hold` first.
    pub hold: bool,
}

/// Two hosts with records, locks and images of their own; one of them has [`V4`] and [`V6`].
#[derive(Debug)]
pub struct Lan {
    /// Where the clients run.
    pub client: NetNs,
    hosts: [Stage; 2],
    here: usize,
    /// Lives as long as the bridge is needed.
    _switch: NetNs,
}

impl Lan {
    /// The first host has the server's addresses; everything on disk is in `dir`, which stays.
    pub fn new(criu: &Criu, dir: &Path) -> Result<Self> {
        let (client, switch) = (NetNs::new()?, NetNs::new()?);
        switch.ip("link add br0 type bridge mcast_snooping 0")?;
        switch.ip("link set br0 up")?;
        let host = |name: &str| {
            let dir = dir.join(name);
            fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
            let mut stage = Stage::unwired(criu, &dir)?;
            stage.peer = client.try_clone()?;
            anyhow::Ok(stage)
        };
        let hosts = [host("a")?, host("b")?];
        plug(&switch, "wire-c", &client, &["10.9.0.2/24", "fd09::2/64", "fe80::2/64"])?;
        plug(&switch, "wire-a", hosts[0].host(), &["10.9.0.11/24", "fd09::11/64", "fe80::11/64"])?;
        plug(&switch, "wire-b", hosts[1].host(), &["10.9.0.12/24", "fd09::12/64", "fe80::12/64"])?;
        let lan = Self { client, hosts, here: 0, _switch: switch };
        take_addresses(lan.here().host())?;
        Ok(lan)
    }

    /// The host that has the addresses.
    pub fn here(&self) -> &Stage {
        &self.hosts[self.here]
    }

    /// The other one.
    pub fn there(&self) -> &Stage {
        &self.hosts[1 - self.here]
    }

    /// Moves a server and its addresses to the other host. `arrived` is called when they are there and no process is.
    pub fn migrate(&mut self, server: Task, way: Way, arrived: impl FnOnce() -> Result<()>) -> Result<Task> {
        let copies = self.freeze(server, way.side)?;
        self.carry(&copies, way.hold)?;
        arrived()?;
        let server = self.thaw(&copies, way.side)?;
        if matches!(way.side, Side::Plugin(_)) {
            self.release(&copies)?;
        }
        Ok(server)
    }

    /// The first step: dumps the server.
    pub fn freeze(&self, server: Task, side: Side) -> Result<Copies> {
        let copies = Copies { from: self.here().images()?, to: self.there().images()? };
        self.here().dump(side, server.pid(), &copies.from).dump_and_wait(server)?;
        Ok(copies)
    }

    /// The second: images and addresses go to the other host, where a lock is before them with `hold`.
    pub fn carry(&self, copies: &Copies, hold: bool) -> Result<()> {
        copy(&copies.from, &copies.to)?;
        if hold {
            self.there().soccr(&["hold", &copies.to.to_string_lossy()])?;
        }
        give_up_addresses(self.here().host())?;
        take_addresses(self.there().host())
    }

    /// The third: restores the server there, which is here from then on.
    pub fn thaw(&mut self, copies: &Copies, side: Side) -> Result<Task> {
        let (server, _) = self.there().restore(side, &copies.to)?.restore()?;
        self.here = 1 - self.here;
        Ok(server)
    }

    /// The last: what the plugin has kept on the host that the server came from goes.
    pub fn release(&self, copies: &Copies) -> Result<()> {
        self.there().soccr(&["release", &copies.from.to_string_lossy()]).map(drop)
    }
}

/// The images of one move, on either host.
#[derive(Debug)]
pub struct Copies {
    from: PathBuf,
    to: PathBuf,
}

/// Puts a namespace on the bridge by a wire whose outer end is called `name`.
fn plug(switch: &NetNs, name: &str, ns: &NetNs, addresses: &[&str]) -> Result<()> {
    veth(End { ns, name: DEVICE, addresses }, End { ns: switch, name, addresses: &[] })?;
    switch.ip(&format!("link set {name} master br0"))
}

/// All files of a folder: the other host has a disk of its own.
fn copy(from: &Path, to: &Path) -> Result<()> {
    for file in fs::read_dir(from)? {
        let file = file?;
        let (from, to) = (file.path(), to.join(file.file_name()));
        fs::copy(&from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    Ok(())
}

fn give_up_addresses(host: &NetNs) -> Result<()> {
    host.ip(&format!("addr del {V4}/32 dev {DEVICE}"))?;
    host.ip(&format!("addr del {V6}/128 dev {DEVICE}"))
}

/// The host has the server's addresses from now on, and its neighbours know.
fn take_addresses(host: &NetNs) -> Result<()> {
    host.ip(&format!("addr add {V4}/32 dev {DEVICE}"))?;
    host.ip(&format!("addr add {V6}/128 dev {DEVICE} nodad"))?;
    host.run(|| [V4, V6].into_iter().try_for_each(|address| announce(DEVICE, address.parse()?)))
}

/// Tells all neighbours on a device of the calling thread's namespace that an address is here: by a gratuitous ARP, or
/// an unsolicited neighbour advertisement.
pub fn announce(device: &str, address: IpAddr) -> Result<()> {
    let link = getifaddrs()?.filter(|it| it.interface_name == device);
    let mac = link.filter_map(|it| it.address?.as_link_addr()?.addr()).next();
    let mac = mac.with_context(|| format!("{device} has no hardware address"))?;
    match address {
        IpAddr::V4(address) => {
            let ip = address.octets();
            // Ethernet, IPv4, the lengths of both, a request; sender and target are the same.
            let head = [0, 1, 8, 0, 6, 4, 0, 1];
            send(device, libc::ETH_P_ARP, [0xff; 6], &[&head[..], &mac, &ip, &[0; 6], &ip].concat())
        }
        IpAddr::V6(address) => {
            send(device, libc::ETH_P_IPV6, [0x33, 0x33, 0, 0, 0, 1], &advertisement(address, mac))
        }
    }
}

/// To all nodes, from the address itself, with the flag that overrides what they know (RFC 4861, 4.4).
fn advertisement(address: Ipv6Addr, mac: [u8; 6]) -> Vec<u8> {
    const ICMPV6: u8 = 58;
    let ip = address.octets();
    let addresses = [ip, Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1).octets()].concat();
    let head = [136, 0, 0, 0, 0x20, 0, 0, 0];
    let mut message = [&head[..], &ip, &[2, 1], &mac].concat();
    let len = u8::try_from(message.len()).expect("32 bytes");
    let pseudo_header = [&addresses[..], &[0, 0, 0, len, 0, 0, 0, ICMPV6]].concat();
    let sum = checksum(&[&pseudo_header[..], &message].concat());
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    [&[0x60, 0, 0, 0, 0, len, ICMPV6, 255][..], &addresses, &message].concat()
}

/// The Internet's checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum = words.sum::<u32>();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).expect("folded twice")
}

/// Sends a packet, from the network header on, out of a device of the calling thread's namespace.
fn send(device: &str, protocol: libc::c_int, to: [u8; 6], packet: &[u8]) -> Result<()> {
    let socket = packet_socket(0)?; // receives nothing
    // SAFETY: all zeroes are a value of this C struct of integers and an array.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET)?;
    address.sll_protocol = u16::try_from(protocol)?.to_be();
    address.sll_ifindex = i32::try_from(if_nametoindex(device)?)?;
    address.sll_halen = 6;
    address.sll_addr[..6].copy_from_slice(&to);
    let len = libc::socklen_t::try_from(size_of_val(&address))?;
    // SAFETY: sendto() reads the packet and the address, each of which is as long as it is told.
    let sent = unsafe {
        let address = (&raw const address).cast();
        libc::sendto(socket.as_raw_fd(), packet.as_ptr().cast(), packet.len(), 0, address, len)
    };
    Errno::result(sent).with_context(|| format!("sendto({device})"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_advertisement_is_whole() {
        let packet = advertisement("fd09::1".parse().unwrap(), [2, 0, 0, 0, 0, 1]);
        assert_eq!(packet.len(), 72);
        let pseudo_header = [&packet[8..40], &[0, 0, 0, 32, 0, 0, 0, 58]].concat();
        // A receiver sums up all, the checksum included.
        assert_eq!(checksum(&[&pseudo_header[..], &packet[40..]].concat()), 0);
    }
}
