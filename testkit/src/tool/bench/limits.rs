//! What the numbers may be.

use soccr_testkit::{Lock, Place};

use super::absence::{Absence, Route};
use super::case::{Case, GIB, PARTS, Party, SKIP, Storage};
use super::pair::Pair;
use super::row::Row;

/// One number and what it may be at most.
pub struct Limit {
    pub what: String,
    pub value: f64,
    pub most: f64,
}

impl Limit {
    pub fn holds(&self) -> bool {
        self.value <= self.most
    }
}

/// Those of which all was measured.
pub fn of(smoke: bool, rows: &[Row<Case>], absences: &[Row<Absence>], pairs: &[Pair]) -> Vec<Limit> {
    let mut limits = Limits { rows, absences, pairs, limits: Vec::new() };
    if smoke {
        limits.on_busy_machine();
    } else {
        limits.against_stock();
        limits.over_floor();
        limits.in_all();
        limits.of_queues();
        limits.of_peers([0.1, 0.3], 0.3);
    }
    limits.of_calls();
    limits.limits
}

struct Limits<'a> {
    rows: &'a [Row<Case>],
    absences: &'a [Row<Absence>],
    pairs: &'a [Pair],
    limits: Vec<Limit>,
}

impl<'a> Limits<'a> {
    fn add(&mut self, what: impl Into<String>, value: Option<f64>, most: f64) {
        if let Some(value) = value {
            self.limits.push(Limit { what: what.into(), value, most });
        }
    }

    fn row(&self, party: Party, case: impl Fn(&Case) -> bool) -> Option<&'a Row<Case>> {
        self.rows.iter().find(|row| row.party == party && case(&row.case))
    }

    fn ratio(&mut self, against: Party, case: impl Fn(&Case) -> bool, frozen: f64, restore: f64) {
        let Some((ours, other)) = self.row(Party::Ours, &case).zip(self.row(against, &case)) else { return };
        let name = format!("ours / {against}, {}", ours.case);
        for (what, of, most) in [
            ("frozen", Row::frozen as fn(&Row<Case>) -> Option<f64>, frozen),
            ("restore", Row::restore, restore),
        ] {
            let ratio = of(ours).zip(of(other)).map(|(ours, other)| ours / other);
            self.add(format!("{what}, {name}"), ratio, most);
        }
    }

    fn against_stock(&mut self) {
        let [iptables, nftables] = [Lock::Iptables, Lock::Nftables].map(Party::Stock);
        self.ratio(iptables, plain(1000), 1.0 / 60.0, 1.0 / 400.0);
        self.ratio(nftables, plain(450), 1.0 / 8.0, f64::INFINITY);
        self.ratio(SKIP, plain(1000), 1.1, 1.0);
        self.ratio(SKIP, plain(10_000), 1.05, 0.85);
        for connections in [1000, 10_000] {
            let on_disk = move |case: &Case| {
                *case == Case { storage: Storage::Disk, ..*case }
                    && plain(connections)(&Case { storage: Storage::Tmpfs, ..*case })
            };
            self.ratio(SKIP, on_disk, 0.8, f64::INFINITY);
        }
    }

    /// Microseconds that each connection costs beyond what CRIU's own work takes.
    fn cost(&self, case: impl Fn(&Case) -> bool, of: fn(&Row<Case>) -> Option<f64>) -> Option<f64> {
        let (ours, floor) = (self.row(Party::Ours, &case)?, self.row(Party::Floor, &case)?);
        Some((of(ours)? - of(floor)?) * 1e6 / ours.connections())
    }

    fn over_floor(&mut self) {
        let measures =
            [("dump", Row::frozen as fn(&Row<Case>) -> Option<f64>, 12.0), ("restore", Row::restore, 10.0)];
        for (what, of, most) in measures {
            let (large, small) = (self.cost(plain(10_000), of), self.cost(plain(1000), of));
            self.add(format!("µs a connection over the floor, {what}, 10000"), large, most);
            let ratio = large.zip(small).filter(|(_, small)| *small > 0.0);
            self.add(
                format!("the same, 10000 / 1000, {what}"),
                ratio.map(|(large, small)| large / small),
                1.2,
            );
            let verbose = |case: &Case| case.verbose && plain(10_000)(&Case { verbose: false, ..*case });
            let more = self.cost(verbose, of).zip(large).map(|(verbose, quiet)| verbose - quiet);
            self.add(format!("µs a connection that -v4 costs more, {what}, 10000"), more, 1.0);
            let many = self.cost(|case| case.processes == PARTS, of).zip(large);
            let ratio = many.filter(|(_, large)| *large > 0.0).map(|(many, large)| many / large);
            self.add(
                format!("µs a connection over the floor, {PARTS} processes / 10000, {what}"),
                ratio,
                1.2,
            );
        }
    }

    fn in_all(&mut self) {
        let moved = self.row(Party::Ours, plain(10_000)).and_then(|row| row.moved());
        self.add("s until 10000 connections have moved bytes", moved, 0.5);
    }

    /// Of a GiB: the agents' memory, and their speed beside a plain copy's.
    fn of_queues(&mut self) {
        let case = |case: &Case| case.connections * case.queued == GIB;
        let Some((ours, floor)) = self.row(Party::Ours, case).zip(self.row(Party::Floor, case)) else {
            return;
        };
        self.add("MiB of memory of an agent, 1 GiB queued", ours.agent_peak(), 64.0);
        let times = |of: fn(&Row<Case>) -> Option<f64>| Some((of(ours)? - of(floor)?) / ours.raw_copy()?);
        self.add("times a plain copy, dump of 1 GiB", times(Row::frozen), 2.0);
        self.add("times a plain copy, restore of 1 GiB", times(Row::restore), 2.0);
    }

    /// Of all absences: seconds until all is echoed, for who stays and who moves; seconds that a call lasts beyond the absence.
    fn of_peers(&mut self, [stays, moves]: [f64; 2], overtime: f64) {
        for row in self.absences.iter().filter(|row| row.party == Party::Ours) {
            let name = row.case;
            let most = if row.case.route == Route::Stay { stays } else { moves };
            self.add(format!("s until all is echoed, {name}"), row.caught_up(), most);
            self.add(format!("calls that failed, {name}"), row.refused(), 0.0);
            self.add(format!("s that a call lasted beyond the absence, {name}"), row.overtime(), overtime);
        }
    }

    fn of_calls(&mut self) {
        for pair in self.pairs {
            self.add(format!("{} / {}", pair.what, pair.other), Some(pair.rounded()), pair.most);
        }
    }

    /// That nothing has gone wrong by an order of magnitude.
    fn on_busy_machine(&mut self) {
        self.ratio(SKIP, plain(1000), 3.0, 4.0);
        self.of_peers([2.0, 2.0], 2.0);
        self.ratio(Party::Stock(Lock::Nftables), plain(100), 1.5, 10.0);
        let moved = self.row(Party::Ours, plain(1000)).and_then(|row| row.moved());
        self.add("s until 1000 connections have moved bytes", moved, 2.0);
        let memory = self.rows.iter().filter_map(Row::<Case>::agent_peak).reduce(f64::max);
        self.add("MiB of memory of an agent", memory, 64.0);
    }
}

/// So many connections with empty queues in criu's namespace, images in memory, criu at -v2.
fn plain(connections: usize) -> impl Fn(&Case) -> bool {
    move |case| {
        *case
            == Case {
                connections,
                queued: 0,
                processes: 1,
                place: Place::Host,
                storage: Storage::Tmpfs,
                verbose: false,
            }
    }
}
