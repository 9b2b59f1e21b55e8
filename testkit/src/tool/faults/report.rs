//! What is counted, and what is printed at the end.

use anyhow::Result;

use crate::faults::outcome::{Kind, Verdict};

#[derive(Default)]
pub struct Report {
    faults: usize,
    checked: usize,
    lost: usize,
    lived: usize,
    restored: usize,
    ended_with_task: usize,
    breakpoints: usize,
    cleaned: usize,
    passed: usize,
    failed: usize,
}

impl Report {
    /// Counts the outcome of a fault and says it in a word or two.
    pub fn fault(&mut self, short: &str, name: &str, verdict: &Result<Verdict>) -> String {
        self.faults += 1;
        let verdict = match verdict {
            Ok(verdict) => verdict,
            Err(error) => {
                self.failed += 1;
                println!("FAILED {name}: {error:#}\n");
                return format!("{short} FAILED");
            }
        };
        if !verdict.is_good() {
            self.failed += 1;
            self.lost += verdict.lost.len();
            let left = verdict.left.as_ref().map(|left| format!("{left:#}")).unwrap_or_default();
            let (lost, of) = (verdict.lost.len(), verdict.connections);
            println!("FAILED {name}: {lost} of {of} lost {}\n{left}\n", verdict.lost.join("\n  "));
        } else if verdict.kind != Kind::Breakpoint {
            self.passed += 1;
        }
        let checked = verdict.connections;
        let word = match verdict.kind {
            Kind::Lives => {
                self.lived += 1;
                self.checked += checked;
                "lives"
            }
            Kind::Restored => {
                self.restored += 1;
                self.checked += checked;
                "restored"
            }
            Kind::EndedWithTask => {
                self.ended_with_task += 1;
                "ended"
            }
            Kind::Breakpoint => {
                self.breakpoints += 1;
                "CRIU's breakpoint"
            }
        };
        self.cleaned += usize::from(verdict.cleaned);
        let failed = if verdict.is_good() { "" } else { "FAILED, " };
        format!("{short} {failed}{word}{}", if verdict.cleaned { " (cleaned)" } else { "" })
    }

    /// A case that counts for itself: how many connections it checked.
    pub fn case(&mut self, name: &str, result: &Result<(usize, String)>) {
        self.faults += 1;
        match result {
            Ok((checked, said)) => {
                self.passed += 1;
                self.checked += checked;
                println!("{name:34} ok, {checked} connections; {said}");
            }
            Err(error) => {
                self.failed += 1;
                println!("FAILED {name}: {error:#}\n");
            }
        }
    }

    pub fn print(&self) {
        println!();
        println!("faults injected        {}", self.faults);
        println!("  the server lived on  {}", self.lived);
        println!("  it was restored      {}", self.restored);
        println!("  it was the victim    {} (its connections ended with it)", self.ended_with_task);
        println!(
            "  CRIU's own breakpoint {} (the server died of SIGTRAP; {} are too many)",
            self.breakpoints,
            self.most_breakpoints() + 1
        );
        println!("soccr clean was needed {}", self.cleaned);
        println!("connections checked    {}", self.checked);
        println!("connections lost       {}", self.lost);
        println!("{} passed, {} failed", self.passed, self.failed);
        if self.faults == 0 {
            println!("no case has such a name");
        }
    }

    /// Whether anything was tried, all went well, and CRIU's breakpoint did not hide what would not have: it hits the
    /// server in one or two of a hundred cases.
    pub fn is_good(&self) -> bool {
        self.faults > 0 && self.failed == 0 && self.breakpoints <= self.most_breakpoints()
    }

    fn most_breakpoints(&self) -> usize {
        1 + self.faults / 40
    }
}
