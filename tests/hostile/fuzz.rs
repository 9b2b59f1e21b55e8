//! The fuzz targets without a fuzzer: their corpora and random mutations of these, for two seconds each, or for
//! `SOCCR_FUZZ_SECONDS`. `SOCCR_SEED` repeats a run; an input that does harm is kept in a file.

use std::env;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::corpus::corpus;
use crate::memory::{ALLOWANCE, peak_of};
use crate::mutate::{Random, mutated, mutated_archive};
use crate::targets::{TARGETS, Target};

/// One input may take so long on a machine that has other things to do; it should take microseconds.
const SLOW: Duration = Duration::from_secs(5);
/// Without news for so long the target hangs.
const STUCK: Duration = Duration::from_secs(20);

fn time() -> Duration {
    let seconds = env::var("SOCCR_FUZZ_SECONDS").map_or(2.0, |text| text.parse().expect("a number"));
    Duration::from_secs_f64(seconds)
}

/// What a run found out.
struct Report {
    inputs: u64,
    /// The most memory, and the size of the input that took it.
    peak: (u64, usize),
    slowest: Duration,
}

fn fuzz(name: &'static str) {
    let target = TARGETS.iter().find(|(found, _)| *found == name).expect("it is a target").1;
    let current = Arc::new(Mutex::new(Vec::new()));
    let (news, listen) = mpsc::channel();
    let worker = thread::spawn({
        let current = Arc::clone(&current);
        move || run(name, target, &current, &news)
    });
    let stuck = loop {
        match listen.recv_timeout(STUCK) {
            Ok(()) => {}
            Err(RecvTimeoutError::Disconnected) => break false,
            Err(RecvTimeoutError::Timeout) => break true,
        }
    };
    let keep = || {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{name}"));
        std::fs::write(&path, &*current.lock().unwrap_or_else(PoisonError::into_inner)).unwrap();
        path
    };
    assert!(!stuck, "{name} does not come back from the input in {}", keep().display());
    let Ok(report) = worker.join() else { panic!("{name} does not stand the input in {}", keep().display()) };
    let Report { inputs, peak: (peak, size), slowest } = report;
    println!("{name}: {inputs} inputs, 0 crashes, at most {peak} bytes of memory (for {size}), {slowest:?}");
}

fn run(name: &str, target: Target, current: &Mutex<Vec<u8>>, news: &Sender<()>) -> Report {
    let corpus = corpus(name);
    let mut random = Random::seeded();
    let mut report = Report { inputs: 0, peak: (0, 0), slowest: Duration::ZERO };
    let mut one = |input: Vec<u8>| {
        let (size, start) = (input.len(), Instant::now());
        current.lock().unwrap().clone_from(&input);
        let peak = peak_of(|| target(&input));
        let took = start.elapsed();
        assert!(peak < size as u64 + ALLOWANCE, "{name}: {peak} bytes of memory for {size}");
        assert!(took < SLOW, "{name}: {took:?} for {size} bytes");
        report.inputs += 1;
        report.peak = report.peak.max((peak, size));
        report.slowest = report.slowest.max(took);
        news.send(()).expect("somebody listens");
    };
    corpus.iter().cloned().for_each(&mut one);
    let deadline = Instant::now() + time();
    while Instant::now() < deadline {
        let in_a_file = name == "index" && random.below(4) != 0;
        one(if in_a_file { mutated_archive(&corpus, &mut random) } else { mutated(&corpus, &mut random) });
    }
    report
}

#[test]
fn tcp_stream() {
    fuzz("tcp_stream");
}

#[test]
fn external() {
    fuzz("external");
}

#[test]
fn inventory() {
    fuzz("inventory");
}

#[test]
fn nftables() {
    fuzz("nftables");
}

#[test]
fn index() {
    fuzz("index");
}

#[test]
fn netlink() {
    fuzz("netlink");
}

#[test]
fn side() {
    fuzz("side");
}
