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

/// Reads a record from `file`, of which it takes no more than `LARGEST` bytes.
pub(super) fn read(file: impl Read, path: &Path) -> Result<(Record, Vec<ConnectionRecord>), RecordError> {
    let broken = |line, why: String| RecordError::Broken { path: path.to_owned(), line, why };
    let mut lines = BufReader::new(file.take(LARGEST)).lines();
    let mut next = |number| match lines.next() {
        None => Ok(None),
        Some(Ok(line)) => Ok(Some(line)),
        Some(Err(error)) => Err(broken(number, error.to_string())),
    };
    let head = next(1)?.ok_or_else(|| broken(1, "the file is empty".into()))?;
    let version = serde_json::from_str::<VersionOnly>(&head).map_err(|e| broken(1, e.to_string()))?.version;
    if version != VERSION {
        return Err(RecordError::Version { path: path.to_owned(), version });
    }
    let record =
        serde_json::from_str::<Versioned<Record>>(&head).map_err(|e| broken(1, e.to_string()))?.record;
    let mut connections = Vec::new();
    let mut number = 2;
    while let Some(line) = next(number)? {
        connections.push(serde_json::from_str(&line).map_err(|e| broken(number, e.to_string()))?);
        number += 1;
    }
    if connections.len() != record.connections {
        let why =
            format!("{} connections are here, {} were announced", connections.len(), record.connections);
        return Err(broken(number, why));
    }
    Ok((record, connections))
}
