//! The kernel's answers as bytes that a fuzzer made up.

use super::answer;
use super::rules::{commented_rule, filtering_chain, owned_table};
use super::whole::{accepts_marked, chain, criu_table};
use super::wire::Attributes;
use super::{elements_in, lock_name};
use crate::kernel::SysResult;

/// Reads `datagrams` as the answer to each request that this crate sends to nf_tables.
pub(crate) fn read_answers(datagrams: &[&[u8]]) {
    drop(answer::verdict(source(datagrams), &["begin", "change", "commit"]));
    drop(answer::list(source(datagrams), "tables", &mut lock_name));
    drop(answer::list(source(datagrams), "owned tables", &mut owned_table));
    drop(answer::list(source(datagrams), "chains", &mut filtering_chain));
    drop(answer::list(source(datagrams), "elements", &mut elements_in));
    drop(answer::list(source(datagrams), "rules", &mut |family, rule: Attributes<'_>| {
        commented_rule(family, &rule, |_| true)
    }));
    drop(answer::list(source(datagrams), "CRIU's tables", &mut criu_table));
    drop(answer::list(source(datagrams), "chains of a table", &mut chain));
    drop(answer::list(source(datagrams), "CRIU's rules", &mut |_, rule: Attributes<'_>| {
        accepts_marked(&rule).map(Some)
    }));
}

/// Gives the datagrams one after the other, cut to the buffer that they are received in.
fn source(datagrams: &[&[u8]]) -> impl FnMut(&mut [u8]) -> SysResult<Option<usize>> {
    let mut rest = datagrams.iter();
    move |buffer| {
        Ok(rest.next().map(|datagram| {
            let len = datagram.len().min(buffer.len());
            buffer[..len].copy_from_slice(&datagram[..len]);
            len
        }))
    }
}
