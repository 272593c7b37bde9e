//! What a person sees: a live table on a terminal, lines elsewhere.

use std::time::Instant;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::child::Line;
use crate::probe::Status;

/// A view of a topology while it runs.
pub(crate) struct Table {
    shown: Vec<Shown>,
    screen: Option<MultiProgress>,
}

/// What a process looks like now.
pub(crate) struct Row<'a> {
    pub(crate) name: String,
    pub(crate) state: String,
    /// Absent where it does not answer.
    pub(crate) status: Option<&'a Status>,
}

struct Shown {
    name: String,
    bar: Option<ProgressBar>,
    state: String,
    rate: Rate,
}

/// Turns a growing count into a rate.
struct Rate {
    at: Instant,
    count: u64,
}

impl Table {
    /// Opens an empty table; `live` redraws it in place.
    pub(crate) fn open(live: bool) -> Table {
        Table {
            shown: Vec::new(),
            screen: live.then(MultiProgress::new),
        }
    }

    /// Prints a line above the table.
    pub(crate) fn print(&self, line: &str) {
        match &self.screen {
            // Fails only when the terminal is gone, and then nobody reads it.
            Some(screen) => drop(screen.println(line)),
            None => println!("{line}"),
        }
    }

    /// Prints what a child printed.
    pub(crate) fn child(&self, line: &Line) {
        self.print(&format!("{} | {}", line.child, line.text));
    }

    /// Shows these processes and no others, in this order.
    pub(crate) fn show(&mut self, rows: &[Row<'_>]) {
        let named = |name: &String| rows.iter().any(|row| row.name == *name);
        let (stay, gone) = std::mem::take(&mut self.shown)
            .into_iter()
            .partition(|shown| named(&shown.name));
        self.shown = stay;
        self.remove(gone);
        let width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
        for (at, row) in rows.iter().enumerate() {
            if self
                .shown
                .get(at)
                .is_none_or(|shown| shown.name != row.name)
            {
                self.insert(at, &row.name);
            }
            let shown = &mut self.shown[at];
            let figures = row.status.map(|status| shown.rate.figures(status));
            let figures = figures.unwrap_or_default();
            let Row { name, state, .. } = row;
            match &shown.bar {
                Some(bar) => bar.set_message(format!("{name:<width$}  {state:<28} {figures}")),
                // Without a terminal only changes of state are worth a line.
                None if shown.state != *state => println!("{name:<width$}  {state}"),
                None => {}
            }
            shown.state.clone_from(state);
        }
    }

    fn insert(&mut self, at: usize, name: &str) {
        let bar = self.screen.as_ref().map(|s| s.insert(at, bar()));
        let shown = Shown {
            name: name.to_owned(),
            bar,
            state: String::new(),
            rate: Rate {
                at: Instant::now(),
                count: 0,
            },
        };
        self.shown.insert(at, shown);
    }

    fn remove(&self, gone: Vec<Shown>) {
        for bar in gone.into_iter().filter_map(|shown| shown.bar) {
            if let Some(screen) = &self.screen {
                screen.remove(&bar);
            }
        }
    }

    /// Removes the table from the terminal.
    pub(crate) fn close(&self) {
        if let Some(screen) = &self.screen {
            // Fails only when the terminal is gone.
            let _ = screen.clear();
        }
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template("{msg}").expect("the template is constant"));
    bar
}

/// Says in a few words what a process is doing.
pub(crate) fn state_of(status: &Status) -> String {
    match &status.phase {
        Some(phase) => format!("{}: {phase}", status.state),
        None => status.state.clone(),
    }
}

impl Rate {
    fn figures(&mut self, status: &Status) -> String {
        let elapsed = self.at.elapsed().as_secs_f64();
        let new = status.generated_tokens.saturating_sub(self.count);
        *self = Rate {
            at: Instant::now(),
            count: status.generated_tokens,
        };
        if !status.is_ready() || elapsed <= 0.0 {
            return String::new();
        }
        if status.role == "processor" {
            return format!("serves {}", status.models.join(", "));
        }
        format!(
            "{:>7.0} tok/s  {:>3} running  {:>3} waiting  KV {:>3.0} %",
            new as f64 / elapsed,
            status.running,
            status.waiting,
            status.kv_usage * 100.0
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_starting_worker_shows_phase_and_progress() {
        let status = Status {
            state: "starting".into(),
            phase: Some("loading weights, 42 %".into()),
            ..Status::default()
        };
        assert_eq!(state_of(&status), "starting: loading weights, 42 %");
    }

    #[test]
    fn rows_come_and_go_in_the_order_given() {
        let mut table = Table::open(false);
        for names in [vec!["a", "c"], vec!["a", "b", "c"], vec!["b"]] {
            let rows: Vec<Row<'_>> = names
                .iter()
                .map(|name| Row {
                    name: (*name).to_owned(),
                    state: "ready".into(),
                    status: None,
                })
                .collect();
            table.show(&rows);
            let shown: Vec<&str> = table
                .shown
                .iter()
                .map(|shown| shown.name.as_str())
                .collect();
            assert_eq!(shown, names);
        }
    }
}
