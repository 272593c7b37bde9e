//! The figures beside those to hold and the incumbents'.

use std::fmt::Write as _;

use serde_json::json;

/// What is measured. The order is the table's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    ProcessorPerRequest,
    WorkerPerRequest,
    BothPerRequest,
    RequestsPerSecond,
    YardstickPerRequest,
    ProcessorPerTokenFast,
    ProcessorPerTokenBrisk,
    ProcessorPerTokenPaced,
    WorkerPerTokenFast,
    WorkerPerTokenBrisk,
    WorkerPerTokenPaced,
    BothPerTokenPaced,
    TokensPerSecond,
    YardstickPerTokenBrisk,
    YardstickPerTokenPaced,
    FirstTokenMedian,
    FirstTokenTail,
    LongPrompts,
    LongPromptCpu,
    LongConversation,
    ProcessorSyscalls,
    WorkerSyscalls,
}

/// Which way is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Better {
    Less,
    More,
}

struct Row {
    what: What,
    name: &'static str,
    unit: &'static str,
    better: Better,
    /// What other servers were measured at, and on what. They were measured on 2 shared vCPUs of an
    /// EPYC; times on another machine are not comparable, orders of magnitude are.
    incumbent: &'static str,
    /// The figure to hold.
    hold: Option<Hold>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Hold {
    /// So much.
    At(f64),
    /// So many times what the bare server takes in the same run.
    Times(f64, What),
}

impl Hold {
    /// Returns the figure, if what it depends on was measured.
    fn value(self, figures: &[Figure]) -> Option<f64> {
        match self {
            Self::At(value) => Some(value),
            Self::Times(factor, of) => {
                let bare = figures.iter().find(|figure| figure.what == of)?;
                Some(factor * bare.value)
            }
        }
    }
}

const fn row(
    what: What,
    name: &'static str,
    unit: &'static str,
    better: Better,
    incumbent: &'static str,
    hold: Option<Hold>,
) -> Row {
    Row {
        what,
        name,
        unit,
        better,
        incumbent,
        hold,
    }
}

/// Dynamo: NVIDIA Dynamo 1.6.1, Python wheel, frontend and two mock workers, TinyLlama's tokenizer,
/// streaming completions, 20 words, 16 connections. vllm-rs: the Rust frontend of vLLM 0.33 before a tiny
/// model, 16 streams, one process. vLLM's router and SMG: proxies that pass on text, 128 streams, a chunk each 20 ms.
/// All on 2 shared vCPUs (EPYC). Dynamo's tokens came as fast as it could pass them on, so they stand beside ours
/// without a pace; with one, a token costs at least an event of its own, which is why those rows
/// are held to the bare server's.
const ROWS: [Row; 22] = {
    use Better::{Less, More};
    use Hold::{At, Times};
    use What::*;
    [
        row(
            ProcessorPerRequest,
            "processor CPU per request",
            "us",
            Less,
            "413-523 (Dynamo, round-robin), 602-683 (KV)",
            Some(At(100.0)),
        ),
        row(
            WorkerPerRequest,
            "worker CPU per request",
            "us",
            Less,
            "250-350 (Dynamo's mocker)",
            None,
        ),
        row(
            BothPerRequest,
            "processor + worker CPU per request",
            "us",
            Less,
            "280 (vllm-rs, one process)",
            Some(At(140.0)),
        ),
        row(
            YardstickPerRequest,
            "  bare HTTP server",
            "us",
            Less,
            "",
            None,
        ),
        row(
            RequestsPerSecond,
            "requests/s, 16 connections",
            "/s",
            More,
            "1300-1950 (Dynamo)",
            None,
        ),
        row(
            ProcessorPerTokenBrisk,
            "processor CPU per token, 1 ms steps",
            "us",
            Less,
            "",
            Some(Times(1.5, YardstickPerTokenBrisk)),
        ),
        row(
            WorkerPerTokenBrisk,
            "worker CPU per token, 1 ms steps",
            "us",
            Less,
            "",
            None,
        ),
        row(
            YardstickPerTokenBrisk,
            "  bare HTTP server, an event each ms",
            "us",
            Less,
            "",
            None,
        ),
        row(
            ProcessorPerTokenPaced,
            "processor CPU per token, 20 ms steps",
            "us",
            Less,
            "1.9 x bare (vLLM's router), 2.0 x (SMG)",
            Some(Times(1.5, YardstickPerTokenPaced)),
        ),
        row(
            WorkerPerTokenPaced,
            "worker CPU per token, 20 ms steps",
            "us",
            Less,
            "",
            None,
        ),
        row(
            BothPerTokenPaced,
            "processor + worker CPU per token, 20 ms",
            "us",
            Less,
            "17 (vllm-rs, one process)",
            Some(At(8.5)),
        ),
        row(
            YardstickPerTokenPaced,
            "  bare HTTP server, an event each 20 ms",
            "us",
            Less,
            "",
            None,
        ),
        row(
            ProcessorPerTokenFast,
            "processor CPU per token, no pace",
            "us",
            Less,
            "11-14 (Dynamo)",
            Some(At(3.0)),
        ),
        row(
            WorkerPerTokenFast,
            "worker CPU per token, no pace",
            "us",
            Less,
            "11-16 (Dynamo's mocker)",
            Some(At(1.5)),
        ),
        row(
            TokensPerSecond,
            "tokens/s, 16 streams, no pace",
            "/s",
            More,
            "50000-53000 (Dynamo)",
            None,
        ),
        row(
            FirstTokenMedian,
            "time to first token, idle, p50",
            "ms",
            Less,
            "1.9 (43.9 with 20 tokens) (Dynamo)",
            Some(At(1.0)),
        ),
        row(
            FirstTokenTail,
            "time to first token, idle, p99",
            "ms",
            Less,
            "48 (Dynamo)",
            Some(At(3.0)),
        ),
        row(
            LongPrompts,
            "prompts of 60k tokens, all new",
            "/s",
            More,
            "40 (Dynamo, published)",
            Some(At(400.0)),
        ),
        row(
            LongPromptCpu,
            "  processor CPU per such prompt",
            "us",
            Less,
            "",
            None,
        ),
        row(
            LongConversation,
            "chats of 60k tokens, only the end new",
            "/s",
            More,
            "40 (Dynamo, published)",
            Some(At(400.0)),
        ),
        row(
            ProcessorSyscalls,
            "processor system calls per token, paced",
            "",
            Less,
            "",
            None,
        ),
        row(
            WorkerSyscalls,
            "worker system calls per token, paced",
            "",
            Less,
            "",
            None,
        ),
    ]
};

/// One measured figure.
#[derive(Clone, Debug)]
pub(crate) struct Figure {
    pub(crate) what: What,
    pub(crate) value: f64,
    /// What else is to be known.
    pub(crate) note: String,
}

impl Figure {
    pub(crate) fn new(what: What, value: f64, note: impl Into<String>) -> Self {
        Self {
            what,
            value,
            note: note.into(),
        }
    }
}

/// The table for a person.
pub(crate) fn render(figures: &[Figure]) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{:<42} {:>12} {:>10}  {:<4} {:<46} note",
        "what", "measured", "to hold", "", "others, measured elsewhere"
    );
    for row in &ROWS {
        let Some(figure) = figures.iter().find(|figure| figure.what == row.what) else {
            continue;
        };
        let held_to = row.hold.and_then(|hold| hold.value(figures));
        let hold = held_to.map_or(String::new(), |hold| {
            let digits = if hold.fract() == 0.0 { 0 } else { 1 };
            match row.better {
                Better::Less => format!("<= {hold:.digits$}"),
                Better::More => format!(">= {hold:.digits$}"),
            }
        });
        let verdict = match held_to {
            Some(hold) if is_held(row, figure.value, hold) => "ok",
            Some(_) => "over",
            None => "",
        };
        let digits = if figure.value < 100.0 { 2 } else { 0 };
        let value = format!("{:.digits$} {}", figure.value, row.unit);
        let line = format!(
            "{:<42} {value:>12} {hold:>10}  {verdict:<4} {:<46} {}",
            row.name, row.incumbent, figure.note
        );
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

fn is_held(row: &Row, value: f64, hold: f64) -> bool {
    match row.better {
        Better::Less => value <= hold,
        Better::More => value >= hold,
    }
}

/// The figures for a program.
pub(crate) fn json(figures: &[Figure]) -> String {
    let rows = figures.iter().filter_map(|figure| {
        let row = ROWS.iter().find(|row| row.what == figure.what)?;
        let hold = row.hold.and_then(|hold| hold.value(figures));
        Some(json!({
            "what": row.name.trim(), "value": figure.value, "unit": row.unit, "hold": hold,
            "held": hold.map(|hold| is_held(row, figure.value, hold)), "note": figure.note,
        }))
    });
    format!("{:#}\n", json!(rows.collect::<Vec<_>>()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_stands_beside_the_one_to_hold() {
        let figures = [
            Figure::new(What::ProcessorPerRequest, 80.0, "60 % user"),
            Figure::new(What::LongPrompts, 100.0, ""),
        ];
        let text = render(&figures);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(
            lines[1].contains("80.00 us") && lines[1].contains("<= 100  ok"),
            "{text}"
        );
        assert!(lines[2].contains(">= 400  over"), "{text}");
    }

    #[test]
    fn a_paced_token_is_held_to_what_the_bare_server_takes() {
        let mut figures = vec![Figure::new(What::ProcessorPerTokenPaced, 20.0, "")];
        assert!(!render(&figures).contains("over"), "nothing to hold it to");
        figures.push(Figure::new(What::YardstickPerTokenPaced, 10.0, ""));
        assert!(render(&figures).contains("<= 15  over"));
        figures[1].value = 15.0;
        assert!(render(&figures).contains("<= 22.5  ok"));
    }
}
