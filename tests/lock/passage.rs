//! The way through other people's firewall.

use std::io::Write;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

use soccr::kernel::{netns::NetNs, sockopt};
use soccr::lock::{MARK, NetworkLock, Passage, passage};

use crate::net::{Pair, expect, is_silent, sh};
use crate::support::in_own_network;
use crate::{NFTABLES, here, name};

fn marked(to: &str) -> Pair {
    let pair = Pair::over(to);
    for end in [&pair.client, &pair.server] {
        sockopt::set_mark(end.as_fd(), MARK).unwrap();
    }
    pair
}

/// All rules of nf_tables and of the old ip_tables, without counters.
fn all_rules() -> String {
    sh(
        "nft --stateless list ruleset; iptables-legacy-save | grep ^-A; ip6tables-legacy-save | grep ^-A; true",
    )
}

/// A firewall that drops everything, made of `commands`: marked packets pass while a passage is
/// open, others never; afterwards it is as it was.
fn check(commands: &str) {
    let mut ours = [marked("127.0.0.1:0"), marked("[::1]:0")];
    let mut others = [Pair::over("127.0.0.1:0"), Pair::over("[::1]:0")];
    sh(commands);
    let before = all_rules();
    let passage = Passage::open(&here()).unwrap();
    assert_ne!(all_rules(), before);
    for pair in &mut others {
        pair.client.write_all(b"x").unwrap();
    }
    ours.iter_mut().for_each(Pair::flows);
    for pair in &others {
        assert!(is_silent(&pair.server), "a passage is for marked packets only\n{}", all_rules());
    }
    sh("iptables-save && iptables -L -n && ip6tables-save && ip6tables -L -n");
    passage.close().unwrap();
    assert_eq!(all_rules(), before);
    assert_eq!(passage::sweep(&here()).unwrap(), 0);
}

#[test]
fn through_nf_tables_of_each_family_and_hook() {
    in_own_network(|| {
        for (hook, priority) in [
            ("input", "filter"),
            ("output", "raw - 5"),
            ("prerouting", "mangle"),
            ("postrouting", "srcnat + 1"),
        ] {
            check(&format!(
                "nft 'add table inet fw; add chain inet fw every \
                 {{ type filter hook {hook} priority {priority}; policy drop; }}; \
                 add rule inet fw every counter comment \"theirs\"'"
            ));
            sh("nft delete table inet fw");
        }
        check(
            "nft 'add table ip a; add chain ip a o { type route hook output priority mangle; }; \
             add rule ip a o drop; add table ip6 b; add chain ip6 b i { type filter hook input priority 0; }; \
             add rule ip6 b i drop'",
        );
    });
}

#[test]
fn through_iptables_over_nf_tables() {
    in_own_network(|| {
        check(
            "iptables-nft -A INPUT -j DROP; ip6tables-nft -P OUTPUT DROP; iptables-nft -t mangle -A OUTPUT -j DROP",
        );
        // iptables can still work on its own rules
        sh(
            "iptables-nft -I INPUT -p tcp --dport 7 -j DROP && iptables-nft -D INPUT -p tcp --dport 7 -j DROP",
        );
    });
}

#[test]
fn through_the_old_ip_tables() {
    in_own_network(|| {
        check(
            "iptables-legacy -A INPUT -j DROP && ip6tables-legacy -P OUTPUT DROP && \
             iptables-legacy -t mangle -A POSTROUTING -j DROP && ip6tables-legacy -t raw -A PREROUTING -j DROP",
        );
    });
}

#[test]
fn a_namespace_without_rules_gets_none() {
    in_own_network(|| {
        let passage = Passage::open(&here()).unwrap();
        assert_eq!(all_rules(), "");
        passage.close().unwrap();
    });
}

#[test]
fn dropping_closes_it_and_a_sweep_after_a_crash() {
    in_own_network(|| {
        sh("nft 'add table ip fw; add chain ip fw i { type filter hook input priority 0; }'; \
            iptables-legacy -A OUTPUT -j ACCEPT");
        let before = all_rules();
        drop(Passage::open(&here()).unwrap());
        assert_eq!(all_rules(), before);
        std::mem::forget(Passage::open(&here()).unwrap());
        assert_ne!(all_rules(), before);
        assert_eq!(passage::sweep(&here()).unwrap(), 3); // nft, iptables-legacy INPUT and OUTPUT
        assert_eq!(all_rules(), before);
    });
}

#[test]
fn each_closes_only_its_own() {
    in_own_network(|| {
        sh("nft 'add table ip fw; add chain ip fw i { type filter hook input priority 0; }'");
        let (one, two) = (Passage::open(&here()).unwrap(), Passage::open(&here()).unwrap());
        assert_eq!(all_rules().matches("accept comment").count(), 2);
        one.close().unwrap();
        assert_eq!(all_rules().matches("accept comment").count(), 1);
        sh("nft flush ruleset"); // as firewalls do when they are reloaded
        two.close().unwrap();
    });
}

#[test]
fn locks_are_left_alone() {
    in_own_network(|| {
        let mut pair = Pair::over("127.0.0.1:0");
        let lock = NetworkLock::lock(&here(), &name("l"), &[pair.tuple()], &NFTABLES).unwrap();
        let before = all_rules();
        let passage = Passage::open(&here()).unwrap();
        assert_eq!(all_rules(), before);
        passage.close().unwrap();
        pair.client.write_all(b"x").unwrap();
        assert!(lock.unlock().unwrap());
        expect(&mut pair.server, b"x");
    });
}

/// firewalld's table, for one, belongs to firewalld: nobody else may put a rule into it.
#[test]
fn tables_with_an_owner_are_passed_over() {
    in_own_network(|| {
        let mut owner =
            Command::new("nft").arg("-i").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        owner
            .stdin
            .as_mut()
            .unwrap()
            .write_all(
                b"add table inet theirs { flags owner; }\n\
                  add chain inet theirs i { type filter hook input priority 0; }\n",
            )
            .unwrap();
        while !sh("nft list ruleset").contains("chain i") {
            std::thread::yield_now();
        }
        sh("nft 'add table ip fw; add chain ip fw i { type filter hook input priority 0; }'");
        let before = all_rules();
        let passage = Passage::open(&here()).unwrap();
        assert_eq!(all_rules().matches("soccr-passage").count(), 1);
        passage.close().unwrap();
        assert_eq!(all_rules(), before);
        owner.kill().unwrap();
        owner.wait().unwrap();
    });
}

#[test]
fn in_another_namespace() {
    in_own_network(|| {
        let other = crate::net::OtherNs::joined();
        let rules = |ns: &NetNs| ns.run(all_rules).unwrap();
        other
            .ns
            .run(|| {
                sh("nft 'add table ip fw; add chain ip fw i { type filter hook input priority 0; }'; \
            iptables-legacy -A OUTPUT -j ACCEPT")
            })
            .unwrap();
        let before = rules(&other.ns);
        let passage = Passage::open(&other.ns).unwrap();
        assert_eq!(rules(&other.ns).matches("soccr-passage").count(), 3);
        assert_eq!(all_rules(), "");
        passage.close().unwrap();
        assert_eq!(rules(&other.ns), before);
    });
}
