//! The expressions that rules are made of: small instructions over the kernel's registers.

use super::abi;
use super::wire::Writer;

/// The mark of the segments that soccr forges (`SO_MARK`): they pass the network lock, stock CRIU's and ours.
pub const MARK: u32 = 0xC114;

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// On to the next chain of the hook.
    Accept,
    /// Gone.
    Drop,
}

/// Writes a rule's expressions in order.
pub struct Expressions<'a>(&'a mut Writer);

/// Which header of the packet.
#[derive(Clone, Copy)]
pub enum Base {
    Network,
    Transport,
}

impl Expressions<'_> {
    /// Adds the rule attribute with the expressions that `write` makes.
    pub fn put(writer: &mut Writer, write: impl FnOnce(&mut Expressions<'_>)) {
        writer.nest(abi::rule::EXPRESSIONS, |w| write(&mut Expressions(w)));
    }

    fn expression(&mut self, name: &str, data: impl FnOnce(&mut Writer)) {
        self.0.nest(abi::list::ELEM, |w| {
            w.put_str(abi::expr::NAME, name);
            w.nest(abi::expr::DATA, data);
        });
    }

    /// Goes on only for packets whose metadata `key` (`NFT_META_*`) has this value, in host order.
    pub fn meta_is(&mut self, key: libc::c_int, value: &[u8]) {
        let register = number(libc::NFT_REG_1);
        self.expression("meta", |w| {
            w.put_u32(abi::meta::KEY, number(key));
            w.put_u32(abi::meta::DREG, register);
        });
        self.is(value);
    }

    /// Goes on only for packets that soccr sent.
    pub fn marked(&mut self) {
        self.meta_is(libc::NFT_META_MARK, &MARK.to_ne_bytes());
    }

    /// Goes on only for the first packet of whoever connects: of the flags FIN, SYN, RST and ACK only SYN is set.
    pub fn opens_a_connection(&mut self) {
        const FLAGS: u32 = 13;
        let register = number(libc::NFT_REG_1);
        self.load(register, Base::Transport, FLAGS, 1);
        self.expression("bitwise", |w| {
            w.put_u32(abi::bitwise::SREG, register);
            w.put_u32(abi::bitwise::DREG, register);
            w.put_u32(abi::bitwise::LEN, 1);
            w.nest(abi::bitwise::MASK, |w| w.put(abi::data::VALUE, &[0x17]));
            w.nest(abi::bitwise::XOR, |w| w.put(abi::data::VALUE, &[0]));
        });
        self.is(&[0x02]);
    }

    /// Goes on only where the first register has this value.
    fn is(&mut self, value: &[u8]) {
        self.expression("cmp", |w| {
            w.put_u32(abi::cmp::SREG, number(libc::NFT_REG_1));
            w.put_u32(abi::cmp::OP, number(libc::NFT_CMP_EQ));
            w.nest(abi::cmp::DATA, |w| w.put(abi::data::VALUE, value));
        });
    }

    /// Loads `len` bytes at `offset` of a header into a register.
    pub fn load(&mut self, register: u32, base: Base, offset: u32, len: u32) {
        let base = match base {
            Base::Network => libc::NFT_PAYLOAD_NETWORK_HEADER,
            Base::Transport => libc::NFT_PAYLOAD_TRANSPORT_HEADER,
        };
        self.expression("payload", |w| {
            w.put_u32(abi::payload::DREG, register);
            w.put_u32(abi::payload::BASE, number(base));
            w.put_u32(abi::payload::OFFSET, offset);
            w.put_u32(abi::payload::LEN, len);
        });
    }

    /// Goes on only when the key that begins in `register` is in the set.
    pub fn in_set(&mut self, register: u32, set: &str, set_id: u32) {
        self.expression("lookup", |w| {
            w.put_str(abi::lookup::SET, set);
            w.put_u32(abi::lookup::SREG, register);
            w.put_u32(abi::lookup::SET_ID, set_id);
        });
    }

    /// Gives a copy of the packet to whoever reads this group of the netfilter log, if anybody does.
    pub fn log(&mut self, group: u16) {
        self.expression("log", |w| w.put(abi::log::GROUP, &group.to_be_bytes()));
    }

    /// Ends the rule.
    pub fn verdict(&mut self, verdict: Verdict) {
        let code = match verdict {
            Verdict::Accept => libc::NF_ACCEPT,
            Verdict::Drop => libc::NF_DROP,
        };
        self.expression("immediate", |w| {
            w.put_u32(abi::immediate::DREG, number(libc::NFT_REG_VERDICT));
            w.nest(abi::immediate::DATA, |w| {
                w.nest(abi::data::VERDICT, |w| w.put_u32(abi::verdict::CODE, number(code)));
            });
        });
    }
}

/// The kernel's enums are signed in C and unsigned on the wire.
pub fn number(value: libc::c_int) -> u32 {
    u32::try_from(value).expect("a constant of nf_tables is not negative")
}
