//! What each trial did to the clients, as lines and as a picture.

use std::fmt::Write;
use std::time::Duration;

#[derive(Default)]
pub struct Report {
    pub rows: Vec<Row>,
}

/// All moves of a trial.
#[derive(Default)]
pub struct Row {
    pub name: String,
    /// How many clients began.
    pub clients: usize,
    /// Whether all of them are to live.
    pub held: bool,
    pub moves: Vec<Moved>,
    /// Answers that never came, or came twice.
    pub wrong: u64,
    /// Rules on either host at the end.
    pub left: usize,
    /// Why a move did not come to its end.
    pub failure: Option<String>,
}

impl Row {
    /// Whether the connections live, all their answers came once, and nothing is left.
    fn is_good(&self) -> bool {
        self.alive() == self.clients && self.resets() == 0 && self.wrong == 0 && self.left == 0
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
    /// Whether all is well with those that were held.
    pub fn is_good(&self) -> bool {
        let held: Vec<_> = self.rows.iter().filter(|row| row.held).collect();
        !held.is_empty() && held.into_iter().all(Row::is_good)
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
            let (name, moves, alive) = (&row.name, row.moves.len(), row.alive());
            let (clients, resets, wrong, left) = (row.clients, row.resets(), row.wrong, row.left);
            let _ = writeln!(
                text,
                "| {name} | {moves} | {alive} of {clients} | {resets} | {silence} | {wrong} | {left} |"
            );
        }
        text
    }

    /// A line for each move: a bar from the shortest to the longest silence with a tick at the median, and who lives.
    pub fn svg(&self) -> String {
        let longest = self.rows.iter().flat_map(|row| &row.moves).filter_map(Moved::silence).map(|it| it[2]);
        let axis = Axis::up_to(longest.max().unwrap_or_default());
        let lines: usize = self.rows.iter().map(|row| row.lines().len()).sum();
        let bottom = TOP + lines * LINE + self.rows.len() * (HEAD + GAP);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"900\" height=\"{}\" font-family=\"sans-serif\" \
             font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
             <text x=\"20\" y=\"24\" font-weight=\"bold\">Seconds of silence that a client met in a move: shortest, median, \
             longest of those that live</text>\n",
            bottom + 8
        );
        axis.draw(&mut svg, bottom);
        let mut y = TOP + LINE;
        for row in &self.rows {
            let _ =
                writeln!(svg, "<text x=\"20\" y=\"{y}\" font-weight=\"bold\">{}</text>", escaped(&row.name));
            y += HEAD;
            for (nth, (silence, text, good)) in row.lines().into_iter().enumerate() {
                let colour = if good { "#1f4e79" } else { "#b03a2e" };
                let _ = writeln!(svg, "<text x=\"40\" y=\"{y}\">{}</text>", arrow(nth));
                let mut end = axis.at(Duration::ZERO);
                if let Some([min, median, max]) = silence {
                    let (from, tick, to) = (axis.at(min), axis.at(median), axis.at(max));
                    let (width, top) = ((to - from).max(1.0), y - 12);
                    let _ = writeln!(
                        svg,
                        "<path d=\"M{end:.1} {}H{from:.1}\" stroke=\"{colour}\"/>\
                         <rect x=\"{from:.1}\" y=\"{top}\" width=\"{width:.1}\" height=\"15\" fill=\"{colour}\" \
                         fill-opacity=\"0.5\"/><rect x=\"{:.1}\" y=\"{top}\" width=\"3\" height=\"15\" \
                         fill=\"{colour}\"/>",
                        y - 5,
                        tick - 1.5
                    );
                    end = to;
                }
                let x = end + 12.0;
                let _ =
                    writeln!(svg, "<text x=\"{x:.1}\" y=\"{y}\" fill=\"{colour}\">{}</text>", escaped(&text));
                y += LINE;
            }
            y += GAP;
        }
        svg + "</svg>\n"
    }
}

impl Row {
    /// For each move its silences, what is written beside them, and whether all live.
    fn lines(&self) -> Vec<(Option<[Duration; 3]>, String, bool)> {
        let line = |moved: &Moved| {
            let (alive, clients, resets) = (moved.silences.len(), self.clients, moved.resets);
            let mut text = format!("{alive} of {clients} alive, {resets} resets");
            if let Some(silence) = moved.silence() {
                text = format!("{}: {text}", silence.map(seconds).join(" / "));
            }
            (moved.silence(), text, alive == clients)
        };
        let failure = self.failure.as_deref().map(|why| {
            let words: String = why.chars().take(70).collect();
            (None, format!("failed: {words}"), false)
        });
        self.moves.iter().map(line).chain(failure).collect()
    }
}

// The lines of the picture.
const TOP: usize = 56;
const HEAD: usize = 22;
const LINE: usize = 24;
const GAP: usize = 12;

/// Time from left to right.
struct Axis {
    /// Between two grid lines.
    step: f64,
    steps: u32,
}

impl Axis {
    const LEFT: f64 = 120.0;
    const WIDTH: f64 = 330.0;

    /// At most six steps.
    fn up_to(longest: Duration) -> Self {
        let longest = longest.as_secs_f64();
        let step =
            [0.1, 0.2, 0.5, 1.0, 2.0, 5.0].into_iter().find(|step| longest <= step * 6.0).unwrap_or(10.0);
        let steps = (1..=6).find(|steps| longest <= step * f64::from(*steps)).unwrap_or(6);
        Self { step, steps }
    }

    fn at(&self, time: Duration) -> f64 {
        Self::LEFT + time.as_secs_f64() / (self.step * f64::from(self.steps)) * Self::WIDTH
    }

    fn draw(&self, svg: &mut String, bottom: usize) {
        for nth in 0..=self.steps {
            let time = self.step * f64::from(nth);
            let x = self.at(Duration::from_secs_f64(time));
            let _ = writeln!(
                svg,
                "<path d=\"M{x:.1} {TOP}V{bottom}\" stroke=\"#dddddd\"/>\
                 <text x=\"{x:.1}\" y=\"{}\" fill=\"#666666\" text-anchor=\"middle\">{time:.1}</text>",
                TOP - 6
            );
        }
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
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
    use super::*;

    fn row(name: &str, held: bool, alive: u64, resets: usize) -> Row {
        let silences = (1..=alive).rev().map(|nth| Duration::from_millis(100 * nth)).collect();
        let moves = vec![Moved::new(Duration::from_secs(1), silences, resets)];
        Row { name: name.into(), clients: 3, held, moves, ..Row::default() }
    }

    fn report(held: Row) -> Report {
        Report { rows: vec![held, row("stock", false, 0, 7)] }
    }

    #[test]
    fn only_what_was_held_must_live() {
        assert!(report(row("ours", true, 3, 0)).is_good());
        assert!(!report(row("ours", true, 2, 0)).is_good());
        assert!(!report(row("ours", true, 3, 1)).is_good());
        assert!(!report(row("ours", false, 3, 0)).is_good(), "nothing was held");
        let left = Row { left: 1, ..row("ours", true, 3, 0) };
        assert!(!report(left).is_good());
        let failed = Row { failure: Some("criu restore".into()), ..row("ours", true, 3, 0) };
        assert!(!report(failed).is_good());
    }

    #[test]
    fn silences_are_of_those_that_live() {
        let report = report(row("ours", true, 3, 0));
        let text = report.text();
        assert!(text.contains("| ours | 1 | 3 of 3 | 0 | 0.100 / 0.200 / 0.300 | 0 | 0 |"), "{text}");
        assert!(text.contains("| stock | 1 | 0 of 3 | 7 | - | 0 | 0 |"), "{text}");
        assert!(report.svg().contains("0.100 / 0.200 / 0.300: 3 of 3 alive, 0 resets"));
    }

    #[test]
    fn the_longest_silence_is_on_the_axis() {
        for (longest, steps, step) in
            [(0, 1, 0.1), (301, 4, 0.1), (1201, 3, 0.5), (2800, 6, 0.5), (20_000, 4, 5.0)]
        {
            let axis = Axis::up_to(Duration::from_millis(longest));
            assert_eq!((axis.steps, axis.step), (steps, step), "{longest} ms");
        }
    }

    #[test]
    fn a_failure_is_drawn() {
        let failure = Some("criu: <status> 1".into());
        let failed = Row { failure, ..row("stock", false, 0, 0) };
        let svg = Report { rows: vec![failed] }.svg();
        assert!(svg.contains(">failed: criu: &lt;status> 1</text>"), "{svg}");
    }
}
