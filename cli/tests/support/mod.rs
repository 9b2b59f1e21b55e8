//! The command as people call it, and what its tests share with those of the engine.
#![allow(dead_code, unused_imports)] // each test program uses its part

#[path = "../../../tests/support/mod.rs"]
mod engine;

use std::process::{Command, Output};

use serde_json::Value;

pub use engine::{connected, expect_bytes, in_own_network, lacks, pattern, skip};

/// Who calls the command.
pub trait Soccr {
    /// The command with its surroundings.
    fn command(&self) -> Command;

    fn soccr(&self, arguments: &[&str]) -> Output {
        self.command().args(arguments).output().expect("soccr runs")
    }

    /// What it says when it succeeds.
    fn done(&self, arguments: &[&str]) -> String {
        let output = self.soccr(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// What it says when it refuses.
    fn refused(&self, arguments: &[&str]) -> String {
        let output = self.soccr(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
        String::from_utf8(output.stderr).expect("text")
    }

    /// What it says with `--json` when it succeeds.
    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.done(&[arguments, &["--json"]].concat())).expect("JSON")
    }
}

/// The program under test.
pub fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_soccr"))
}
