//! Who is measured in what, and all of that one's trials.

use std::fmt::Display;
use std::path::Path;

use anyhow::Result;
use soccr_testkit::Criu;

use super::case::Party;
use super::pair::median;

/// What can be measured.
pub trait Measured: Copy + PartialEq + Display {
    /// What one trial shows.
    type Trial;

    /// One trial; images that shall be on a disk go into a folder below `disk`.
    fn run(self, criu: &Criu, party: Party, disk: &Path) -> Result<Self::Trial>;

    /// What is told of a trial while others are to come.
    fn tell(trial: &Self::Trial) -> String;
}

/// All trials of one party in one case.
pub struct Row<C: Measured> {
    pub case: C,
    pub party: Party,
    pub trials: Vec<C::Trial>,
    pub failure: Option<String>,
}

impl<C: Measured> Row<C> {
    pub fn new(case: C, party: Party) -> Self {
        Self { case, party, trials: Vec::new(), failure: None }
    }

    pub fn name(&self) -> String {
        format!("{}, {}", self.case, self.party)
    }

    /// Takes a trial's outcome down, a failure too, and tells it.
    pub fn add(&mut self, outcome: Result<C::Trial>) -> String {
        match outcome {
            Ok(trial) => {
                let line = format!("{}: {}", self.name(), C::tell(&trial));
                self.trials.push(trial);
                line
            }
            Err(error) => {
                self.failure = Some(format!("{error:#}"));
                self.failed().unwrap_or_default()
            }
        }
    }

    /// Of the trials; nothing where one has failed, and where one does not tell.
    pub fn median(&self, of: impl Fn(&C::Trial) -> Option<f64>) -> Option<f64> {
        median(self.each(of)?)
    }

    /// The same of the largest.
    pub fn max(&self, of: impl Fn(&C::Trial) -> Option<f64>) -> Option<f64> {
        self.each(of)?.into_iter().reduce(f64::max)
    }

    /// What failed, and why.
    pub fn failed(&self) -> Option<String> {
        Some(format!("{}: FAILED: {}", self.name(), self.failure.as_ref()?))
    }

    fn each(&self, of: impl Fn(&C::Trial) -> Option<f64>) -> Option<Vec<f64>> {
        if self.failure.is_some() {
            return None;
        }
        self.trials.iter().map(of).collect()
    }
}

/// Adds to all rows; who was measured in the same case before is one of them.
pub fn merge<C: Measured>(all: &mut Vec<Row<C>>, rows: Vec<Row<C>>) {
    for row in rows {
        match all.iter_mut().find(|known| (known.case, known.party) == (row.case, row.party)) {
            Some(known) => {
                known.trials.extend(row.trials);
                known.failure = known.failure.take().or(row.failure);
            }
            None => all.push(row),
        }
    }
}
