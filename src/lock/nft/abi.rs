//! Numbers of the kernel's nf_tables interface that the libc crate lacks
//! (`linux/netfilter/nf_tables.h`, `linux/netlink.h`).

/// Attribute types, one module for each of the kernel's enums.
macro_rules! attributes {
    ($($(#[$doc:meta])* $module:ident { $($name:ident = $value:literal),* $(,)? })*) => {
        $($(#[$doc])* pub mod $module { $(pub const $name: u16 = $value;)* })*
    };
}

attributes! {
    table { NAME = 1, FLAGS = 2, USE = 3, OWNER = 7 }
    chain { TABLE = 1, NAME = 3, HOOK = 4, POLICY = 5, USE = 6, TYPE = 7 }
    hook { NUM = 1, PRIORITY = 2 }
    rule { TABLE = 1, CHAIN = 2, HANDLE = 3, EXPRESSIONS = 4, USERDATA = 7 }
    set { TABLE = 1, NAME = 2, FLAGS = 3, KEY_TYPE = 4, KEY_LEN = 5, DESCRIPTION = 9, ID = 10, TIMEOUT = 11 }
    set_description { SIZE = 1 }
    element { KEY = 1 }
    element_list { TABLE = 1, SET = 2, ELEMENTS = 3 }
    list { ELEM = 1 }
    data { VALUE = 1, VERDICT = 2 }
    verdict { CODE = 1 }
    expr { NAME = 1, DATA = 2 }
    immediate { DREG = 1, DATA = 2 }
    bitwise { SREG = 1, DREG = 2, LEN = 3, MASK = 4, XOR = 5 }
    cmp { SREG = 1, OP = 2, DATA = 3 }
    lookup { SET = 1, SREG = 2, SET_ID = 4 }
    payload { DREG = 1, BASE = 2, OFFSET = 3, LEN = 4 }
    meta { DREG = 1, KEY = 2 }
    log { GROUP = 1 }
    /// Of an error message, after the header that it answers.
    error { MSG = 1 }
}

/// Type of a comment in a rule's user data, as `nft` and `iptables` write and read it: type, length,
/// text with a NUL at its end.
pub const UDATA_RULE_COMMENT: u8 = 0;

/// Types of `nft`'s own numbering (`enum datatypes` of nftables), six bits each in a
/// concatenation: they tell `nft list` how to print a key.
pub mod datatype {
    pub const IPV4_ADDR: u32 = 7;
    pub const IPV6_ADDR: u32 = 8;
    pub const INET_SERVICE: u32 = 13;
    pub const BITS: u32 = 6;
}

/// The flag of a dump's message that says "the rules changed while I was reading them".
pub const NLM_F_DUMP_INTR: u16 = 0x10;
/// The flag of an error message that has attributes.
pub const NLM_F_ACK_TLVS: u16 = 0x200;
