//! What stock CRIU leaves behind.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use soccr::connection::FourTuple;
use soccr::criu::stock::{self, NamespaceLock};
use soccr::lock::{LockOptions, Method, NetworkLock};

use crate::net::{OtherNs, Pair, expect, is_silent, sh, tuple_of};
use crate::support::in_own_network;
use crate::{here, many, name};

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

/// What criu gives to iptables-restore, for each family, in a namespace that is not its own.
const CHAIN: &str = "*filter\n:CRIU - [0:0]\n-I INPUT -j CRIU\n-I OUTPUT -j CRIU\n\
    -A CRIU -m mark --mark 0xC114 -j ACCEPT\n-A CRIU -j DROP\nCOMMIT\n";

/// And to nft, one after the other.
const TABLE: [&str; 5] = [
    "create table inet CRIU-8230cafd",
    "add chain inet CRIU-8230cafd output { type filter hook output priority 0; policy drop; }",
    "add rule inet CRIU-8230cafd output meta mark 0xC114 accept",
    "add chain inet CRIU-8230cafd input { type filter hook input priority 0; policy drop; }",
    "add rule inet CRIU-8230cafd input meta mark 0xC114 accept",
];

fn lock_all(programs: &[&str]) {
    programs.iter().for_each(|program| drop(sh(&format!("printf '{CHAIN}' | {program} -w -n"))));
}

fn nft(steps: &[&str]) {
    steps.iter().for_each(|step| drop(sh(&format!("nft '{step}'"))));
}

/// All rules of both interfaces, without their counters.
fn ruleset() -> String {
    sh("(iptables-save; ip6tables-save; nft list ruleset) | \
        sed -e '/^#/d' -e 's/packets [0-9]* bytes [0-9]*//' -e 's/\\[[0-9:]*\\]//'")
}

fn whole_table() -> NamespaceLock {
    NamespaceLock::Table(name("8230cafd"))
}

/// Locks the other end's namespace as criu does, and checks that all passes again once that is removed, and that
/// nothing else went.
fn check_namespace_lock(lock: impl Fn(), found: &NamespaceLock) {
    let other = OtherNs::joined();
    let mut pairs = [other.connect("10.9.0.2"), other.connect("fd09::2")];
    let foreign = "for ip in iptables ip6tables; do
            $ip -A INPUT -p tcp --dport 7 -j DROP; $ip -N CRIUX; $ip -A OUTPUT -j CRIUX
        done
        nft 'add table inet CRIU; add chain inet CRIU input { type filter hook input priority 0; }'";
    let before = other.ns.run(|| sh(foreign) + &ruleset()).unwrap();
    assert_eq!(stock::find_namespace_locks(&other.ns).unwrap(), []);
    assert_eq!(stock::remove_namespace_locks(&other.ns).unwrap(), []);
    other.ns.run(lock).unwrap();
    assert_eq!(stock::find_namespace_locks(&here()).unwrap(), []);
    assert_eq!(stock::find_namespace_locks(&other.ns).unwrap(), std::slice::from_ref(found));
    for pair in &mut pairs {
        pair.client.write_all(b"x").unwrap();
    }
    assert_eq!(stock::remove_namespace_locks(&other.ns).unwrap(), std::slice::from_ref(found));
    for pair in &mut pairs {
        expect(&mut pair.server, b"x");
        pair.flows();
    }
    assert_eq!(other.ns.run(ruleset).unwrap(), before);
}

#[test]
fn its_chain_for_a_whole_namespace() {
    in_own_network(|| {
        check_namespace_lock(|| lock_all(&["iptables-restore", "ip6tables-restore"]), &NamespaceLock::Chain)
    });
}

#[test]
fn the_chain_of_a_criu_that_was_killed_between_the_families() {
    in_own_network(|| check_namespace_lock(|| lock_all(&["iptables-restore"]), &NamespaceLock::Chain));
}

#[test]
fn the_chain_after_two_dumps_that_were_killed() {
    let twice = ["ip6tables-restore", "iptables-restore", "iptables-restore"];
    in_own_network(|| check_namespace_lock(|| lock_all(&twice), &NamespaceLock::Chain));
}

#[test]
fn its_table_for_a_whole_namespace() {
    in_own_network(|| check_namespace_lock(|| nft(&TABLE), &whole_table()));
}

#[test]
fn its_table_half_made() {
    in_own_network(|| {
        for steps in 1..TABLE.len() {
            nft(&TABLE[..steps]);
            assert_eq!(stock::find_namespace_locks(&here()).unwrap(), [whole_table()], "{steps} steps");
            assert_eq!(stock::remove_namespace_locks(&here()).unwrap(), [whole_table()]);
            assert_eq!(sh("nft list ruleset"), "");
        }
    });
}

/// Names prove nothing: only what is in a table or a chain does.
#[test]
fn what_only_looks_like_its_lock_of_a_namespace_stays() {
    in_own_network(|| {
        let others = [
            "add rule inet CRIU-8230cafd input tcp dport 22 accept",
            "insert rule inet CRIU-8230cafd input tcp dport 22 accept",
            "add set inet CRIU-8230cafd mine { type ipv4_addr; }",
            "add chain inet CRIU-8230cafd mine",
            "add counter inet CRIU-8230cafd mine",
            "add chain inet CRIU-8230cafd input { policy accept; }",
            "replace rule inet CRIU-8230cafd output handle 2 meta mark 0xC115 accept",
            "replace rule inet CRIU-8230cafd output handle 2 meta mark 0xC114 drop",
            "replace rule inet CRIU-8230cafd output handle 2 meta mark != 0xC114 accept",
            "replace rule inet CRIU-8230cafd output handle 2 meta mark 0xC114 counter accept",
        ];
        for other in others {
            nft(&TABLE);
            assert_eq!(stock::find_namespace_locks(&here()).unwrap(), [whole_table()], "{other}");
            nft(&[other]);
            assert_eq!(stock::remove_namespace_locks(&here()).unwrap(), [], "{other}");
            nft(&["delete table inet CRIU-8230cafd"]);
        }
        let tuple = Pair::over("127.0.0.1:0").tuple();
        nft(&TABLE.map(|step| step.replace("CRIU-", "soccr-")).each_ref().map(String::as_str));
        let options = LockOptions { method: Method::Nftables, lease: None, log: None };
        NetworkLock::lock(&here(), &name("ours"), &[tuple], &options).unwrap().keep();
        sh("iptables -N CRIU; iptables -A CRIU -p tcp -j DROP; iptables -A INPUT -j CRIU");
        let before = ruleset();
        assert_eq!(stock::remove_namespace_locks(&here()).unwrap(), []);
        assert_eq!(ruleset(), before);
    });
}

/// iptables goes on when the criu that started it is killed, so its lock may come after that.
#[test]
fn a_lock_that_is_just_being_made_is_waited_for() {
    in_own_network(|| {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("iptables-restore");
        fs::copy("/bin/sh", &program).unwrap();
        let script = format!("read go; printf '{}' | iptables-restore -w -n", CHAIN.replace('\n', "\\n"));
        let mut helper = Command::new(program).args(["-c", &script]).stdin(Stdio::piped()).spawn().unwrap();
        let removing = thread::spawn(|| stock::remove_namespace_locks(&here()).unwrap());
        while !removing.is_finished() && !waits_for(helper.id()) {
            thread::yield_now();
        }
        helper.stdin.take().unwrap().write_all(b"\n").unwrap();
        // A zombie is done, too.
        assert_eq!(removing.join().unwrap(), [NamespaceLock::Chain]);
        assert!(helper.wait().unwrap().success());
        assert_eq!(stock::find_namespace_locks(&here()).unwrap(), []);
    });
}

/// Whether this process has a pidfd of that one.
fn waits_for(pid: u32) -> bool {
    let infos = fs::read_dir("/proc/self/fdinfo").unwrap().flatten();
    let texts = infos.filter_map(|info| fs::read_to_string(info.path()).ok());
    texts.into_iter().any(|text| text.lines().any(|line| line == format!("Pid:\t{pid}")))
}
