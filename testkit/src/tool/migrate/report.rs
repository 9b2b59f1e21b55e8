//! What each trial did to the clients, as lines and as a picture.

use std::fmt::Write;
use std::time::Duration;

use soccr_testkit::{Side, Way};

use crate::migrate::Trial;

pub struct Report {
    clients: usize,
    pub rows: Vec<Row>,
}

/// All moves of a trial.
pub struct Row {
    trial: Trial,
    pub moves: Vec<Moved>,
    /// Answers that never came, or came twice.
    pub wrong: u64,
    /// Rules on either host at the end.
    pub left: usize,
    /// Why a move did not come to its end.
    pub failure: Option<String>,
}

impl Row {
    pub fn new(trial: Trial) -> Self {
        Self { trial, moves: Vec::new(), wrong: 0, left: 0, failure: None }
    }

    /// How many clients live after the last move; none, where the server did not come back.
    fn alive(&self) -> usize {
        let last = self.moves.last().filter(|_| self.failure.is_none());
        last.map_or(0, |last| last.silences.len())
    }

    fn resets(&self) -> usize {
        self.moves.iter().map(|moved| moved.resets).sum()
    }
}

/// What a move did to the clients.
pub struct Moved {
    took: Duration,
    /// Of each client that lives, sorted.
    silences: Vec<Duration>,
    resets: usize,
}

impl Moved {
    pub fn new(took: Duration, mut silences: Vec<Duration>, resets: usize) -> Self {
        silences.sort();
        Self { took, silences, resets }
    }

    /// The shortest, the median, the longest.
    fn silence(&self) -> Option<[Duration; 3]> {
        let all = &self.silences;
        Some([*all.first()?, all[all.len() / 2], *all.last()?])
    }

    pub fn text(&self, clients: usize) -> String {
        let alive = self.silences.len();
        let mut text = format!("{alive} of {clients} alive, {} resets", self.resets);
        if let Some([min, median, max]) = self.silence() {
            let (min, median, max) = (seconds(min), seconds(median), seconds(max));
            let _ = write!(text, ", silent for {min} / {median} / {max} s");
        }
        text + &format!(" (moved in {} s)", seconds(self.took))
    }
}

impl Report {
    pub fn new(clients: usize) -> Self {
        Self { clients, rows: Vec::new() }
    }

    /// Whether the connections that were held live, all their answers came once, and nothing is left.
    pub fn is_good(&self) -> bool {
        let good =
            |row: &Row| row.alive() == self.clients && row.resets() == 0 && row.wrong == 0 && row.left == 0;
        let held: Vec<_> = self.rows.iter().filter(|row| row.trial.way.hold).collect();
        !held.is_empty() && held.into_iter().all(good)
    }

    /// A table, in Markdown.
    pub fn text(&self) -> String {
        let mut text = String::from(
            "| | moves | clients alive | resets | silence of a client, s (min / median / max) | answers lost or \
             twice | rules left |\n|---|---|---|---|---|---|---|\n",
        );
        for row in &self.rows {
            let mut all: Vec<_> = row.moves.iter().flat_map(|moved| moved.silences.clone()).collect();
            all.sort();
            let silence = Moved::new(Duration::ZERO, all, 0).silence();
            let silence = silence.map_or("-".into(), |it| it.map(seconds).join(" / "));
            let (name, moves, alive) = (row.trial.name(), row.moves.len(), row.alive());
            let (clients, resets, wrong, left) = (self.clients, row.resets(), row.wrong, row.left);
            let _ = writeln!(
                text,
                "| {name} | {moves} | {alive} of {clients} | {resets} | {silence} | {wrong} | {left} |"
            );
        }
        text
    }

    /// A line for each move: a bar from the shortest to the longest silence with a tick at the median, and who lives.
    pub fn svg(&self) -> String {
        let moves = self.rows.iter().map(|row| row.moves.len());
        let longest = self.rows.iter().flat_map(|row| &row.moves).filter_map(Moved::silence).map(|it| it[2]);
        let scale = 330.0 / longest.max().unwrap_or_default().as_secs_f64().max(f64::MIN_POSITIVE);
        let height = 60 + moves.sum::<usize>() * 24 + self.rows.len() * 34;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"860\" height=\"{height}\" \
             font-family=\"sans-serif\" font-size=\"13\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
             <text x=\"20\" y=\"24\" font-weight=\"bold\">Seconds for which a client heard nothing \
             (shortest, median, longest)</text>\n"
        );
        let mut y = 50;
        for row in &self.rows {
            let _ =
                writeln!(svg, "<text x=\"20\" y=\"{y}\" font-weight=\"bold\">{}</text>", row.trial.name());
            y += 22;
            for (nth, moved) in row.moves.iter().enumerate() {
                let colour = if moved.silences.len() == self.clients { "#1f4e79" } else { "#b03a2e" };
                self.draw(&mut svg, y, nth, moved, scale, colour);
                y += 24;
            }
            y += 12;
        }
        svg + "</svg>\n"
    }

    fn draw(&self, svg: &mut String, y: usize, nth: usize, moved: &Moved, scale: f64, colour: &str) {
        let _ = writeln!(svg, "<text x=\"40\" y=\"{y}\">{}</text>", arrow(nth));
        let mut end = 120.0;
        if let Some([min, median, max]) = moved.silence() {
            let [from, tick, to] = [min, median, max].map(|time| 120.0 + time.as_secs_f64() * scale);
            let width = (to - from).max(1.0);
            let top = y - 12;
            let _ = writeln!(
                svg,
                "<rect x=\"{from:.1}\" y=\"{top}\" width=\"{width:.1}\" height=\"15\" fill=\"{colour}\" \
                 fill-opacity=\"0.5\"/><rect x=\"{tick:.1}\" y=\"{top}\" width=\"3\" height=\"15\" \
                 fill=\"{colour}\"/>"
            );
            end = to;
        }
        let times = moved.silence().map_or("-".into(), |it| it.map(seconds).join(" / "));
        let (x, alive) = (end + 12.0, moved.silences.len());
        let _ = writeln!(
            svg,
            "<text x=\"{x:.1}\" y=\"{y}\" fill=\"{colour}\">{times}: {alive} of {} alive, {} resets</text>",
            self.clients, moved.resets
        );
    }
}

impl Trial {
    pub fn name(self) -> String {
        let way = match self.way {
            Way { side: Side::Plugin(_), hold: true } => "soccr with hold",
            Way { side: Side::Plugin(_), hold: false } => "soccr without hold",
            Way { side: Side::Stock(_), .. } => "stock CRIU",
        };
        let when = if self.late { "after the clients have sent" } else { "at once" };
        format!("{way}, restored {when}")
    }
}

/// The direction of a move: the first is there, the next back.
pub fn arrow(nth: usize) -> &'static str {
    if nth.is_multiple_of(2) { "A → B" } else { "B → A" }
}

fn seconds(time: Duration) -> String {
    format!("{:.3}", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use soccr_testkit::Lock;

    use super::*;

    fn row(side: Side, hold: bool, alive: u64, resets: usize) -> Row {
        let silences = (1..=alive).rev().map(|nth| Duration::from_millis(100 * nth)).collect();
        let mut row = Row::new(Trial { way: Way { side, hold }, late: true });
        row.moves.push(Moved::new(Duration::from_secs(1), silences, resets));
        row
    }

    fn report(held: Row) -> Report {
        let stock = row(Side::Stock(Lock::Nftables), false, 0, 7);
        Report { clients: 3, rows: vec![held, stock] }
    }

    #[test]
    fn only_what_was_held_must_live() {
        let plugin = Side::Plugin(Lock::Nftables);
        assert!(report(row(plugin, true, 3, 0)).is_good());
        assert!(!report(row(plugin, true, 2, 0)).is_good());
        assert!(!report(row(plugin, true, 3, 1)).is_good());
        assert!(!report(row(plugin, false, 3, 0)).is_good(), "nothing was held");
        let left = Row { left: 1, ..row(plugin, true, 3, 0) };
        assert!(!report(left).is_good());
        let failed = Row { failure: Some("criu restore".into()), ..row(plugin, true, 3, 0) };
        assert!(!report(failed).is_good());
    }

    #[test]
    fn silences_are_of_those_that_live() {
        let report = report(row(Side::Plugin(Lock::Nftables), true, 3, 0));
        let text = report.text();
        assert!(text.contains("| soccr with hold, restored after the clients have sent | 1 | 3 of 3 | 0 | 0.100 / 0.200 / 0.300 | 0 | 0 |"), "{text}");
        assert!(
            text.contains(
                "| stock CRIU, restored after the clients have sent | 1 | 0 of 3 | 7 | - | 0 | 0 |"
            ),
            "{text}"
        );
        assert!(report.svg().contains("0.100 / 0.200 / 0.300: 3 of 3 alive, 0 resets"));
    }
}
