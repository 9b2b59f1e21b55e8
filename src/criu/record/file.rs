//! A record's file: lines of JSON.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{ConnectionRecord, Record, RecordError};

/// What this soccr writes, and all that it reads.
const VERSION: u32 = 1;
/// Larger files are not read, and none is written: some 400,000 connections.
pub(super) const LARGEST: u64 = 64 << 20;

#[derive(Serialize, Deserialize)]
struct Versioned<R> {
    version: u32,
    #[serde(flatten)]
    record: R,
}

/// Only the version: the rest may look different in another one.
#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

/// The first line.
pub(super) fn head(record: &Record) -> Vec<u8> {
    let mut line = Vec::new();
    append_line(&mut line, &Versioned { version: VERSION, record });
    line
}

/// Appends a connection's line.
pub(super) fn append_connection(body: &mut Vec<u8>, connection: &ConnectionRecord) {
    append_line(body, connection);
}

fn append_line<T: Serialize>(bytes: &mut Vec<u8>, value: &T) {
    serde_json::to_writer(&mut *bytes, value).expect("numbers, text and lists of them become JSON in memory");
    bytes.push(b'\n');
}

/// Reads the first line.
pub(super) fn read_head(file: impl Read, path: &Path) -> Result<Record, RecordError> {
    let mut line = String::new();
    let read = BufReader::new(file.take(LARGEST)).read_line(&mut line);
    match read.map_err(|error| error.to_string()) {
        Ok(0) => Err("the file is empty".to_owned()),
        Ok(_) => return parse_head(line.trim_end(), path),
        Err(why) => Err(why),
    }
    .map_err(|why| RecordError::Broken { path: path.to_owned(), line: 1, why })
}

fn parse_head(head: &str, path: &Path) -> Result<Record, RecordError> {
    let broken = |error: serde_json::Error| RecordError::Broken {
        path: path.to_owned(),
        line: 1,
        why: error.to_string(),
    };
    let version = serde_json::from_str::<VersionOnly>(head).map_err(broken)?.version;
    if version != VERSION {
        return Err(RecordError::Version { path: path.to_owned(), version });
    }
    Ok(serde_json::from_str::<Versioned<Record>>(head).map_err(broken)?.record)
}

/// Reads a record from `file`, of which it takes no more than `LARGEST` bytes.
pub(super) fn read(file: impl Read, path: &Path) -> Result<(Record, Vec<ConnectionRecord>), RecordError> {
    read_whole(file, path).map(|(record, connections, _)| (record, connections))
}

/// A record, its connections, and their lines as they are.
pub(super) type Whole = (Record, Vec<ConnectionRecord>, Vec<u8>);

/// As [`read`]; gives also the lines.
pub(super) fn read_whole(file: impl Read, path: &Path) -> Result<Whole, RecordError> {
    let broken = |line, why: String| RecordError::Broken { path: path.to_owned(), line, why };
    let mut lines = BufReader::new(file.take(LARGEST)).lines();
    let mut next = |number| match lines.next() {
        None => Ok(None),
        Some(Ok(line)) => Ok(Some(line)),
        Some(Err(error)) => Err(broken(number, error.to_string())),
    };
    let head = next(1)?.ok_or_else(|| broken(1, "the file is empty".into()))?;
    let record = parse_head(&head, path)?;
    let (mut connections, mut body) = (Vec::new(), Vec::new());
    let mut number = 2;
    while let Some(line) = next(number)? {
        connections.push(serde_json::from_str(&line).map_err(|e| broken(number, e.to_string()))?);
        body.extend_from_slice(line.as_bytes());
        body.push(b'\n');
        number += 1;
    }
    if connections.len() != record.connections {
        let why =
            format!("{} connections are here, {} were announced", connections.len(), record.connections);
        return Err(broken(number, why));
    }
    Ok((record, connections, body))
}
