//! The connections of servers, as one dump of the socket monitor shows them: to ask each socket itself takes ten calls.
//!
//! What is not here, for whatever reason, is asked itself: small trees, clients, sockets of other namespaces, those that a
//! dump has missed.

use std::collections::{HashMap, HashSet};

use super::Task;
use crate::kernel::SysResult;
use crate::kernel::diag::{self, Family, Filter, Kind, Seen};
use crate::kernel::netns::NetNs;
use crate::kernel::process::RemoteFd;

/// The sockets in a task's descriptor table, with their inodes.
pub(super) type Table = Vec<(RemoteFd, u64)>;

/// A dump is worth it for so many sockets.
const MANY: usize = 64;
/// For more ports one dump of all is less than one for each.
const FEW_PORTS: usize = 8;

/// Connections by cookie, each with its network namespace.
#[derive(Debug, Default)]
pub(super) struct Monitored(HashMap<u64, (Seen, NetNs)>);

impl Monitored {
    /// The connections at the ports where these tasks listen, in the namespaces of those that have many sockets.
    pub fn of(tasks: &[Task], tables: &[Table]) -> Self {
        let (mut all, mut known) = (Self::default(), Vec::new());
        let inodes: HashSet<u64> = tables.iter().flatten().map(|(_, inode)| *inode).collect();
        for (task, _) in tasks.iter().zip(tables).filter(|(_, table)| table.len() >= MANY) {
            let Ok(ns) = NetNs::of_task(task.pid.cast_unsigned()) else { continue };
            if known.contains(&ns) {
                continue;
            }
            if let Ok(Err(error)) = ns.run(|| all.add(&ns, &inodes)) {
                log::debug!("{ns}: each socket is asked itself: {error}");
            }
            known.push(ns);
        }
        all
    }

    fn add(&mut self, ns: &NetNs, inodes: &HashSet<u64>) -> SysResult<()> {
        let listeners = diag::listeners()?;
        let ours = listeners.iter().filter(|listener| inodes.contains(&listener.inode.into()));
        let ports: HashSet<(bool, u16)> =
            ours.map(|listener| (listener.local.is_ipv4(), listener.local.port())).collect();
        for (family, is_ipv4) in [(Family::Ipv4, true), (Family::Ipv6, false)] {
            let ports = ports.iter().filter(|(of, _)| *of == is_ipv4).map(|(_, port)| Some(*port));
            let mut ports: Vec<Option<u16>> = ports.collect();
            if ports.len() > FEW_PORTS {
                ports = vec![None];
            }
            for local_port in ports {
                diag::for_each(Filter { family, kind: Kind::Connected, local_port }, |seen| {
                    if inodes.contains(&seen.inode.into()) {
                        self.0.insert(seen.cookie, (seen, ns.clone()));
                    }
                })?;
            }
        }
        Ok(())
    }

    /// What the monitor has told of the connection with this cookie, once.
    pub fn take(&mut self, cookie: u64) -> Option<(Seen, NetNs)> {
        self.0.remove(&cookie)
    }
}
