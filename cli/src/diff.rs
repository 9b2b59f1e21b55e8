//! `soccr diff`.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Serialize;
use soccr::connection::{OPT_SACK, OPT_TIMESTAMPS};

use crate::images::{Connection, Images};
use crate::print_json;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// What was: a folder of images, an archive, or a connection's file.
    old: PathBuf,
    /// What is now: one of these.
    new: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Connections by both their ends.
#[derive(Debug, Default, Serialize)]
struct Difference {
    gone: BTreeMap<String, Fields>,
    added: BTreeMap<String, Fields>,
    changed: BTreeMap<String, BTreeMap<String, Change>>,
    unchanged: usize,
}

type Fields = BTreeMap<String, String>;

/// Before and after, as far as the images tell.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Change {
    old: Option<String>,
    new: Option<String>,
}

/// Whether they are the same, as diff(1) tells it.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let [old, new] = [&arguments.old, &arguments.new].map(|path| Images::read(path));
    let difference = compare(fields_of(old?), fields_of(new?));
    if arguments.json {
        print_json(&difference)?;
    } else {
        print(&difference).context("cannot print")?;
    }
    Ok(difference.gone.is_empty() && difference.added.is_empty() && difference.changed.is_empty())
}

/// Two network namespaces may have the same connection, seen from one end.
fn fields_of(images: Images) -> BTreeMap<String, Fields> {
    let mut all = BTreeMap::new();
    for connection in images.connections {
        let mut name = connection.tuple.to_string();
        while all.contains_key(&name) {
            name.push_str(" (another namespace's)");
        }
        all.insert(name, fields(&connection));
    }
    all
}

/// What is compared: not the clock of the timestamps, and never a byte of the queues.
fn fields(connection: &Connection) -> Fields {
    let tcp = &connection.tcp;
    let agreed = &tcp.negotiated;
    let mut fields = Fields::new();
    let mut add = |name: &str, value: String| drop(fields.insert(name.to_owned(), value));
    add("state", tcp.state.to_string());
    for (name, value) in [
        ("receive queue", tcp.recv_len),
        ("send queue", tcp.send_len),
        ("unsent", tcp.unsent_len),
        ("rcv_nxt", tcp.rcv_nxt),
        ("write_seq", tcp.write_seq),
        ("mss", agreed.mss_clamp),
    ] {
        add(name, value.to_string());
    }
    for (name, bit) in [("sack", OPT_SACK), ("timestamps", OPT_TIMESTAMPS)] {
        add(name, (agreed.mask & bit != 0).to_string());
    }
    if let Some(scale) = agreed.wscale {
        add("wscale", format!("{},{}", scale.snd, scale.rcv));
    }
    if let Some(window) = tcp.window {
        add("snd_wnd", window.snd_wnd.to_string());
        add("rcv_wnd", window.rcv_wnd.to_string());
    }
    // Where the kernel has last seen a segment, unless somebody has set it.
    let told = connection.options.iter().filter(|(name, _)| *name != "SO_INCOMING_CPU");
    fields.extend(told.map(|(name, value)| (name.clone(), value.clone())));
    fields
}

fn compare(mut old: BTreeMap<String, Fields>, new: BTreeMap<String, Fields>) -> Difference {
    let mut difference = Difference::default();
    for (name, after) in new {
        match old.remove(&name) {
            None => drop(difference.added.insert(name, after)),
            Some(before) if before == after => difference.unchanged += 1,
            Some(before) => drop(difference.changed.insert(name, changes(before, after))),
        }
    }
    difference.gone = old;
    difference
}

fn changes(mut old: Fields, new: Fields) -> BTreeMap<String, Change> {
    let after = new.into_iter().map(|(name, new)| {
        let change = Change { old: old.remove(&name), new: Some(new) };
        (name, change)
    });
    let mut changes: BTreeMap<String, Change> = after.collect();
    changes.extend(old.into_iter().map(|(name, old)| (name, Change { old: Some(old), new: None })));
    changes.retain(|_, change| change.old != change.new);
    changes
}

fn print(difference: &Difference) -> std::io::Result<()> {
    let mut out = crate::out();
    for (sign, connections) in [('-', &difference.gone), ('+', &difference.added)] {
        for (name, fields) in connections {
            let [state, receive, send] = ["state", "receive queue", "send queue"].map(|field| &fields[field]);
            writeln!(out, "{sign} {name}: {state}, {receive} to read, {send} to send")?;
        }
    }
    for (name, changes) in &difference.changed {
        writeln!(out, "~ {name}:")?;
        for (field, Change { old, new }) in changes {
            let [old, new] = [old, new].map(|value| value.as_deref().unwrap_or("not told"));
            writeln!(out, "    {field}: {old} → {new}")?;
        }
    }
    let Difference { gone, added, changed, unchanged } = difference;
    let (gone, added, changed) = (gone.len(), added.len(), changed.len());
    writeln!(out, "{gone} gone, {added} added, {changed} changed, {unchanged} the same")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(fields: &[(&str, &str)]) -> Fields {
        fields.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn what_only_one_side_tells_is_a_change() {
        let text = |value: &str| Some(value.to_owned());
        let changes = changes(
            fields(&[("same", "1"), ("other", "1"), ("old", "x")]),
            fields(&[("same", "1"), ("other", "2"), ("new", "y")]),
        );
        let want = [
            ("new".to_owned(), Change { old: None, new: text("y") }),
            ("old".to_owned(), Change { old: text("x"), new: None }),
            ("other".to_owned(), Change { old: text("1"), new: text("2") }),
        ];
        assert_eq!(changes, BTreeMap::from(want));
    }
}
