//! What stock CRIU leaves behind.

use std::io::Write;
use std::time::Instant;

use soccr::connection::FourTuple;
use soccr::criu::stock;

use crate::net::{OtherNs, Pair, expect, is_silent, sh, tuple_of};
use crate::support::in_own_network;
use crate::{here, many};

/// What a stock dump with its default lock gives to iptables for a connection, without "-I" and chain.
fn directions(tuple: &FourTuple) -> [(&'static str, String); 2] {
    let wire = tuple.on_wire();
    [("INPUT", wire.remote, wire.local), ("OUTPUT", wire.local, wire.remote)].map(|(chain, from, to)| {
        let rule = format!(
            "--protocol tcp -m mark ! --mark 0xC114 --source {} --sport {} --destination {} --dport {} -j DROP",
            from.ip(),
            from.port(),
            to.ip(),
            to.port()
        );
        (chain, rule)
    })
}

/// Locks a connection as stock does.
fn stock_lock(tuple: &FourTuple) {
    let program = if tuple.on_wire().local.is_ipv4() { "iptables" } else { "ip6tables" };
    for (chain, rule) in directions(tuple) {
        sh(&format!("{program} -w -t filter -I {chain} {rule}"));
    }
}

/// The same as lines for iptables-restore.
fn stock_rules(tuple: &FourTuple) -> String {
    directions(tuple).map(|(chain, rule)| format!("-I {chain} {rule}\n")).concat()
}

fn rules() -> String {
    sh("iptables-save | grep ^-A; ip6tables-save | grep ^-A; true")
}

#[test]
fn its_rules_for_the_connections_and_no_others() {
    in_own_network(|| {
        sh("iptables -A INPUT -p tcp --dport 7 -j DROP; ip6tables -A OUTPUT -p tcp --sport 7 -j ACCEPT
            iptables -A OUTPUT -m mark ! --mark 0xC114 -j ACCEPT");
        let foreign = rules();
        let mut pairs = [Pair::over("127.0.0.1:0"), Pair::over("[::1]:0"), crate::mapped()];
        let tuples = pairs.each_ref().map(Pair::tuple);
        let other = Pair::over("127.0.0.1:0");
        let mut free = Pair::over("127.0.0.1:0");
        tuples.iter().for_each(stock_lock);
        stock_lock(&tuples[0]); // dumped twice
        stock_lock(&other.tuple());
        assert_eq!(stock::find_rules(&here()).unwrap().len(), 10);
        for pair in &mut pairs {
            pair.client.write_all(b"x").unwrap();
            free.flows();
            assert!(is_silent(&pair.server));
        }
        assert_eq!(stock::remove_rules(&here(), &tuples).unwrap(), 8);
        pairs.iter_mut().for_each(|pair| expect(&mut pair.server, b"x"));
        let left = stock::find_rules(&here()).unwrap();
        assert_eq!(left.iter().map(stock::StockRule::tuple).collect::<Vec<_>>(), [other.tuple(); 2]);
        assert_eq!(stock::remove_rules(&here(), &tuples).unwrap(), 0);
        assert_eq!(stock::remove_rules(&here(), &[other.tuple()]).unwrap(), 2);
        assert_eq!(rules(), foreign);
    });
}

#[test]
fn in_another_namespace() {
    in_own_network(|| {
        let other = OtherNs::joined();
        let pair = other.connect("10.9.0.2");
        let tuple = tuple_of(&pair.server);
        other.ns.run(|| stock_lock(&tuple)).unwrap();
        assert_eq!(stock::find_rules(&here()).unwrap(), []);
        assert_eq!(stock::remove_rules(&other.ns, &[tuple]).unwrap(), 2);
        assert_eq!(other.ns.run(rules).unwrap(), "");
    });
}

#[test]
fn a_thousand_connections_are_one_run() {
    in_own_network(|| {
        let tuples = many(1000);
        let (four, six): (Vec<_>, Vec<_>) = tuples.iter().partition(|t| t.local.is_ipv4());
        for (program, tuples) in [("iptables-restore", four), ("ip6tables-restore", six)] {
            // Without CAP_NET_ADMIN in the first user namespace it cannot send much at once.
            for chunk in tuples.chunks(100) {
                let rules: String = chunk.iter().copied().map(stock_rules).collect();
                sh(&format!("{program} -n <<'EOF'\n*filter\n{rules}COMMIT\nEOF"));
            }
        }
        let start = Instant::now();
        assert_eq!(stock::remove_rules(&here(), &tuples).unwrap(), 2000);
        let took = start.elapsed();
        println!("2000 stock rules removed in {took:?}");
        assert_eq!(rules(), "");
        assert!(took.as_secs() < 20, "one by one, this would take a minute");
    });
}

#[test]
fn its_table() {
    in_own_network(|| {
        sh(
            "nft 'add table inet CRIU-61f2; add chain inet CRIU-61f2 input { type filter hook input priority 0; }'",
        );
        assert!(stock::remove_table(&here(), "61f2").unwrap());
        assert!(!stock::remove_table(&here(), "61f2").unwrap());
        assert!(stock::remove_table(&here(), "x; flush ruleset").is_err());
        assert_eq!(sh("nft list ruleset"), "");
    });
}
