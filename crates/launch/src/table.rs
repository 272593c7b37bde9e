//! What a person sees: a live table on a terminal, lines elsewhere.

use std::time::Instant;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::probe::Status;

/// A view of a topology while it runs.
pub(crate) struct Table {
    rows: Vec<Row>,
    screen: Option<MultiProgress>,
}

struct Row {
    name: String,
    bar: Option<ProgressBar>,
    last: String,
    rate: Rate,
}

/// Turns a growing count into a rate.
struct Rate {
    at: Instant,
    count: u64,
}

impl Table {
    /// Opens a table with one row per name; `live` redraws it in place.
    pub(crate) fn open(names: &[String], live: bool) -> Table {
        let screen = live.then(MultiProgress::new);
        let width = names.iter().map(String::len).max().unwrap_or(0);
        let rows = names
            .iter()
            .map(|name| Row {
                name: format!("{name:<width$}"),
                bar: screen.as_ref().map(|s| s.add(bar())),
                last: String::new(),
                rate: Rate {
                    at: Instant::now(),
                    count: 0,
                },
            })
            .collect();
        Table { rows, screen }
    }

    /// Prints a line above the table.
    pub(crate) fn print(&self, line: &str) {
        match &self.screen {
            // Fails only when the terminal is gone, and then nobody reads it.
            Some(screen) => drop(screen.println(line)),
            None => println!("{line}"),
        }
    }

    /// Shows what process `index` says of itself; `None`: it does not answer yet.
    pub(crate) fn update(&mut self, index: usize, status: Option<&Status>) {
        let row = &mut self.rows[index];
        let (state, figures) = match status {
            Some(status) => (state_of(status), row.rate.figures(status)),
            None => ("starting".into(), String::new()),
        };
        match &row.bar {
            Some(bar) => bar.set_message(format!("{}  {state:<28} {figures}", row.name)),
            // Without a terminal only changes of state are worth a line.
            None if row.last != state => println!("{}  {state}", row.name),
            None => {}
        }
        row.last = state;
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
}
