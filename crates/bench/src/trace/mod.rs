//! `stator-bench trace`: what routing is worth, by the real router over simulated engines in simulated time.
//!
//! Nothing is sent: requests, engines and the way of KV events are events in one queue, so that an hour of sixty-four
//! workers takes seconds and equal seeds give equal figures.

mod agenda;
mod engine;
mod prefill;
mod run;
mod workload;

use prefill::{Dispatch, Setting};
use run::{Chooser, Outcome};
use stator_router::Weights;
use workload::Workload;

/// What to simulate.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Workers; several numbers, several fleets.
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [8, 64])]
    workers: Vec<usize>,

    /// Simulated seconds.
    #[arg(long, value_name = "S", default_value_t = 600.0)]
    simulated: f64,

    /// Of requests and choices.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Compares ways to give prompts to prefill workers instead: pushed at once, or waiting at the processor until one
    /// has room, there or in a line that processors share. The workers get as many requests each as so many that also
    /// generate.
    #[arg(long, value_name = "FACTOR", value_delimiter = ',')]
    prefill: Vec<f64>,

    /// Kinds of use; absent: all.
    #[arg(long, value_name = "NAME")]
    workload: Option<String>,

    /// With --prefill: processors in front of the workers; several numbers, several fleets.
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1])]
    processors: Vec<usize>,

    /// With several processors: how often they tell each other what they booked, where they do.
    #[arg(long, value_name = "S", default_value_t = 0.02)]
    sync_every: f64,

    /// Weights of a decoded token to compare, beside the policies.
    #[arg(long, value_name = "WEIGHT", value_delimiter = ',')]
    decode_weights: Vec<f64>,
}

impl Options {
    fn workloads(&self) -> impl Iterator<Item = Workload> {
        let asked = |workload: &Workload| {
            let named = self.workload.as_ref();
            named.is_none_or(|name| workload.name() == name)
        };
        Workload::ALL.into_iter().filter(asked)
    }
}

/// Simulates and prints Markdown.
pub(crate) fn run(options: &Options) {
    if !options.prefill.is_empty() {
        return run_prefill(options);
    }
    for workload in options.workloads() {
        for &workers in &options.workers {
            let requests = workload.requests(options.simulated, workers, options.seed);
            println!(
                "\n{} on {workers} workers: {} requests in {} s\n",
                workload.name(),
                requests.len(),
                options.simulated
            );
            println!("| | TTFT p50, s | p99, s | mean, s | regret | hits | balance |");
            println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: |");
            let weighed = options.decode_weights.iter().flat_map(|&decoding| {
                let weights = Weights {
                    decoding,
                    ..Weights::WHOLE
                };
                [Chooser::Approx(weights), Chooser::Kv(weights)]
            });
            let choosers: Vec<_> = Chooser::ALL.into_iter().chain(weighed).collect();
            let outcomes = choosers
                .iter()
                .map(|&chooser| run::run(&requests, workers, chooser, options.seed));
            let outcomes: Vec<_> = outcomes.collect();
            let oracle = choosers
                .iter()
                .position(|chooser| *chooser == Chooser::Oracle)
                .map_or(0.0, |at| outcomes[at].mean());
            for (chooser, outcome) in choosers.iter().zip(&outcomes) {
                print(*chooser, outcome, oracle);
            }
        }
    }
}

/// Simulates prefill workers and prints Markdown.
fn run_prefill(options: &Options) {
    println!(
        "| | workers | load | processors | seed | dispatch | TTFT p50, s | p99, s | mean, s | hits | balance |"
    );
    println!("| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |");
    for workload in options.workloads() {
        for &workers in &options.workers {
            for &factor in &options.prefill {
                let served = (workers as f64 * factor) as usize;
                let requests = workload.requests(options.simulated, served, options.seed);
                for &processors in &options.processors {
                    for (name, dispatch, sync) in [
                        ("push", Dispatch::Push, false),
                        ("push, synced", Dispatch::Push, true),
                        ("queue", Dispatch::Queue, false),
                        ("queue, synced", Dispatch::Queue, true),
                        ("line", Dispatch::Line, false),
                    ] {
                        if sync && processors == 1 {
                            continue;
                        }
                        let setting = Setting {
                            workers,
                            processors,
                            dispatch,
                            sync: sync.then_some(options.sync_every),
                            seed: options.seed,
                        };
                        let outcome = prefill::run(&requests, setting);
                        println!(
                            "| {} | {workers} | {factor} | {processors} | {} | {name} | {:.3} | {:.3} | {:.3} | {:.1} % | {:.2} |",
                            workload.name(),
                            options.seed,
                            outcome.ttft(0.5),
                            outcome.ttft(0.99),
                            outcome.mean(),
                            100.0 * outcome.hits,
                            outcome.balance,
                        );
                    }
                }
            }
        }
    }
}

fn print(chooser: Chooser, outcome: &Outcome, oracle: f64) {
    let name = match chooser {
        Chooser::Approx(weights) | Chooser::Kv(weights) if weights != Weights::WHOLE => {
            format!("{}, {}", chooser.name(), weights.decoding)
        }
        _ => chooser.name().to_owned(),
    };
    println!(
        "| {name} | {:.3} | {:.3} | {:.3} | {:+.0} % | {:.1} % | {:.2} |",
        outcome.ttft(0.5),
        outcome.ttft(0.99),
        outcome.mean(),
        100.0 * (outcome.mean() / oracle - 1.0),
        100.0 * outcome.hits,
        outcome.balance,
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(workload: Workload, chooser: Chooser) -> Outcome {
        // Long enough for caches to be full: before, to guess what they hold is as good as to know it.
        let requests = workload.requests(300.0, 8, 3);
        run::run(&requests, 8, chooser, 3)
    }

    #[test]
    fn equal_seeds_give_equal_figures_and_every_request_is_answered() {
        let requests = Workload::Conversations.requests(60.0, 8, 3);
        let once = || run::run(&requests, 8, Chooser::Kv(Weights::WHOLE), 3);
        let (one, two) = (once(), once());
        assert_eq!(one.ttft, two.ttft);
        assert_eq!(one.ttft.len(), requests.len());
    }

    fn prefilled(load: f64, processors: usize, dispatch: Dispatch, sync: bool) -> Outcome {
        let requests = Workload::Mooncake.requests(100.0, (8.0 * load) as usize, 3);
        let setting = Setting {
            workers: 8,
            processors,
            dispatch,
            sync: sync.then_some(0.02),
            seed: 3,
        };
        let outcome = prefill::run(&requests, setting);
        assert_eq!(outcome.ttft.len(), requests.len());
        outcome
    }

    #[test]
    fn prompts_that_wait_at_the_processor_are_answered_sooner_when_much_waits() {
        let push = prefilled(2.0, 1, Dispatch::Push, false);
        let queue = prefilled(2.0, 1, Dispatch::Queue, false);
        assert!(queue.mean() < 0.9 * push.mean());
        assert!(queue.ttft(0.99) < push.ttft(0.99));
    }

    #[test]
    fn processors_that_share_a_line_answer_sooner_than_those_that_have_a_queue_each() {
        let line = prefilled(1.5, 4, Dispatch::Line, false);
        let apart = prefilled(1.5, 4, Dispatch::Queue, false);
        assert!(line.mean() < 0.85 * apart.mean());
        // Where much waits, also if those tell each other what they booked.
        let line = prefilled(2.0, 4, Dispatch::Line, false);
        let synced = prefilled(2.0, 4, Dispatch::Queue, true);
        assert!(line.mean() < 0.7 * synced.mean());
    }

    #[test]
    fn processors_that_tell_each_other_what_they_booked_answer_sooner() {
        for dispatch in [Dispatch::Push, Dispatch::Queue] {
            let apart = prefilled(1.5, 4, dispatch, false);
            let synced = prefilled(1.5, 4, dispatch, true);
            assert!(synced.mean() < 0.85 * apart.mean(), "{dispatch:?}");
        }
    }

    #[test]
    fn looking_at_caches_answers_sooner_and_knowing_them_sooner_than_guessing() {
        for workload in Workload::ALL {
            let blind = outcome(workload, Chooser::LeastLoaded);
            let kv = outcome(workload, Chooser::Kv(Weights::WHOLE));
            assert!(kv.hits > blind.hits + 0.1, "{workload:?}");
            assert!(kv.mean() < 0.8 * blind.mean(), "{workload:?}");
            let approx = outcome(workload, Chooser::Approx(Weights::WHOLE));
            assert!(kv.ttft(0.99) < approx.ttft(0.99), "{workload:?}");
        }
    }
}
