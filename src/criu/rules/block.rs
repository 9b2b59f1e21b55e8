//! A block of addresses, with or without a port: `10.0.0.0/8`, `10.0.0.5:80`, `[fd00::1]:80`, `fd00::/64`, `:443`.

use std::net::{IpAddr, SocketAddr};

/// Addresses with a common prefix, of one family, and one port or any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Network and length of its prefix; `None` is any address.
    net: Option<(IpAddr, u8)>,
    port: Option<u16>,
}

impl Block {
    /// Reads one.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let (net, port) = split(text)?;
        let port = port.map(str::parse).transpose().map_err(|_| "a port is a number up to 65535")?;
        let net = if net.is_empty() { None } else { Some(parse_net(net)?) };
        if net.is_none() && port.is_none() {
            return Err("an address or a port is missing");
        }
        Ok(Self { net, port })
    }

    /// Whether the address is in it. IPv4-mapped ones count as IPv4.
    #[must_use]
    pub fn contains(&self, addr: SocketAddr) -> bool {
        let port = self.port.is_none_or(|port| port == addr.port());
        port && self.net.is_none_or(|(net, len)| prefix(addr.ip().to_canonical(), len) == bits(net))
    }

    /// Whether an address can be in both.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let ports = self.port.zip(other.port).is_none_or(|(one, two)| one == two);
        let nets = self.net.zip(other.net).is_none_or(|((one, one_len), (two, two_len))| {
            let len = one_len.min(two_len);
            prefix(one, len) == prefix(two, len)
        });
        ports && nets
    }

    /// Whether each address of this block has its counterpart in the other one.
    #[must_use]
    pub fn corresponds_to(&self, other: &Self) -> bool {
        let shape = |block: &Self| block.net.map(|(net, len)| (net.is_ipv4(), len));
        shape(self) == shape(other) && (self.port.is_some() || other.port.is_none())
    }

    /// The counterpart in `self` of an address in a block that [corresponds to](Self::corresponds_to) it; what stays open
    /// here stays as it is.
    #[must_use]
    pub fn counterpart(&self, addr: SocketAddr) -> SocketAddr {
        let mut new = addr;
        new.set_port(self.port.unwrap_or(addr.port()));
        if let Some((net, len)) = self.net {
            let host = host_mask(net, len);
            let (_, old) = bits(addr.ip().to_canonical());
            let ip = from_bits(net, bits(net).1 | old & host);
            new.set_ip(match (addr.ip(), ip) {
                (IpAddr::V6(_), IpAddr::V4(ip)) => ip.to_ipv6_mapped().into(),
                (_, ip) => ip,
            });
        }
        new
    }

    /// The same with the other's port where it has none.
    #[must_use]
    pub fn or_port_of(self, other: &Self) -> Self {
        Self { port: self.port.or(other.port), ..self }
    }
}

/// Address and port, which only brackets or a dotted address tell apart from what IPv6 has.
fn split(text: &str) -> Result<(&str, Option<&str>), &'static str> {
    if let Some(rest) = text.strip_prefix('[') {
        let (net, port) = rest.split_once(']').ok_or("a bracket is not closed")?;
        return match port.strip_prefix(':') {
            Some(port) => Ok((net, Some(port))),
            None if port.is_empty() => Ok((net, None)),
            None => Err("what follows a bracket is no port"),
        };
    }
    match text.split_once(':') {
        Some((net, port)) if !port.contains(':') && !net.contains(':') => Ok((net, Some(port))),
        _ => Ok((text, None)),
    }
}

fn parse_net(text: &str) -> Result<(IpAddr, u8), &'static str> {
    let (ip, len) = text.split_once('/').map_or((text, None), |(ip, len)| (ip, Some(len)));
    let ip: IpAddr = ip.parse().map_err(|_| "that is no IP address")?;
    let ip = ip.to_canonical();
    let most = if ip.is_ipv4() { 32 } else { 128 };
    let len = len.map_or(Ok(most), str::parse).map_err(|_| "a prefix's length is a number")?;
    if len > most {
        return Err("a prefix is longer than an address");
    }
    if bits(ip).1 & host_mask(ip, len) != 0 {
        return Err("an address has bits behind its prefix");
    }
    Ok((ip, len))
}

/// Whether it is an IPv4 address, and its bits, at the low end.
fn bits(ip: IpAddr) -> (bool, u128) {
    match ip {
        IpAddr::V4(ip) => (true, ip.to_bits().into()),
        IpAddr::V6(ip) => (false, ip.to_bits()),
    }
}

/// An address of the model's family.
fn from_bits(model: IpAddr, bits: u128) -> IpAddr {
    match model {
        #[allow(clippy::cast_possible_truncation)] // an IPv4 address has 32
        IpAddr::V4(_) => std::net::Ipv4Addr::from_bits(bits as u32).into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::from_bits(bits).into(),
    }
}

fn host_mask(ip: IpAddr, len: u8) -> u128 {
    let most = if ip.is_ipv4() { 32 } else { 128 };
    u128::MAX.checked_shr(u32::from(128 - (most - len.min(most)))).unwrap_or(0)
}

fn prefix(ip: IpAddr, len: u8) -> (bool, u128) {
    let (v4, all) = bits(ip);
    (v4, all & !host_mask(ip, len))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(text: &str) -> Block {
        Block::parse(text).unwrap_or_else(|why| panic!("{text}: {why}"))
    }

    #[test]
    fn contains_what_it_says() {
        for (text, inside, outside) in [
            ("10.0.0.5", "10.0.0.5:1", "10.0.0.6:1"),
            ("10.0.0.5:80", "10.0.0.5:80", "10.0.0.5:81"),
            ("10.0.0.0/8", "[::ffff:10.9.9.9]:1", "11.0.0.1:1"),
            ("0.0.0.0/0", "1.2.3.4:5", "[fd00::1]:5"),
            ("[fd00::1]:80", "[fd00::1]:80", "[fd00::2]:80"),
            ("fd00::/64", "[fd00::9:1]:7", "[fd00:0:0:1::1]:7"),
            ("::1", "[::1]:7", "127.0.0.1:7"),
            (":443", "[fd00::1]:443", "10.0.0.1:80"),
        ] {
            assert!(block(text).contains(inside.parse().unwrap()), "{text} and {inside}");
            assert!(!block(text).contains(outside.parse().unwrap()), "{text} and {outside}");
        }
    }

    #[test]
    fn refuses_what_is_none() {
        let texts =
            ["", "x", "10.0.0.5/33", "10.0.0.5/8", "10.0.0.5:x", "[fd00::1", "[fd00::1]80", "10.0.0.5:70000"];
        for text in texts {
            assert!(Block::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn counterparts_keep_what_is_open() {
        for (to, addr, new) in [
            ("10.2.0.0/16", "10.1.3.4:80", "10.2.3.4:80"),
            ("10.2.0.0/16:81", "10.1.3.4:80", "10.2.3.4:81"),
            ("10.2.0.1", "[::ffff:10.1.3.4]:80", "[::ffff:10.2.0.1]:80"),
            ("fd02::/64", "[fd01::7]:80", "[fd02::7]:80"),
            (":8080", "[fd01::7]:80", "[fd01::7]:8080"),
        ] {
            assert_eq!(block(to).counterpart(addr.parse().unwrap()), new.parse().unwrap(), "{to} of {addr}");
        }
    }
}
