//! Whether a prompt is worth a hand-off: computed by a prefill worker and fetched, or by the decode
//! worker itself.
//!
//! A hand-off pays for long prompts: a decode engine that computes one holds up every stream it runs. It does
//! not for short ones, whose transfer costs more than they do. The decision is pure; what was
//! measured comes in as [`Line`]s, which forget slowly, so that a change of hardware or load is seen.

use std::fmt;

/// When a prompt is computed by the decode worker that continues it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Conditional {
    /// Never.
    #[default]
    Off,
    /// By fixed numbers.
    Fixed(Bounds),
    /// Where the predicted waiting of everybody together is less that way.
    Auto,
}

/// The numbers of [`Conditional::Fixed`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bounds {
    /// Prompts with fewer uncached tokens stay with the decode worker. 0: none does.
    pub min_prefill_tokens: u64,
    /// Prompts stay with the decode worker while the prefill worker has more tokens to compute. Absent: any
    /// number is fine.
    pub max_prefill_queue: Option<u64>,
}

/// What a decision is made from.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Situation {
    /// Tokens of the prompt that the decode worker has not cached.
    pub uncached: u64,
    /// Tokens of the prompt that the prefill worker has not cached.
    pub uncached_at_prefill: u64,
    /// Tokens that the prefill worker has to compute before this prompt.
    pub prefill_queue: u64,
    /// Tokens that the decode worker itself has to compute before this prompt.
    pub decode_queue: u64,
    /// Streams that a prefill on the decode worker would hold up: those that it generates now.
    pub streams: u64,
    /// Prompts that a prefill on the prefill worker would hold up: those that come while this one waits, which are
    /// taken to be as many as wait before it. Choices that follow another one of their prompt are none: they come
    /// with it, and find it computed.
    pub queued: u64,
}

/// Where the prompt is to be computed, and why.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// By a prefill worker.
    Remote(Why),
    /// By the decode worker.
    Local(Why),
}

/// The values that decided.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Why {
    /// Prompts are never computed by decode workers.
    Off,
    /// The prompt against the least worth a hand-off.
    Length { uncached: u64, least: u64 },
    /// The prefill worker's queue against the longest allowed.
    Queue { tokens: u64, most: u64 },
    /// Nothing has been measured yet.
    Unmeasured,
    /// Predicted seconds of either way.
    Predicted { remote: Cost, local: Cost },
}

/// What a way costs, in seconds of waiting.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// Of the prompt itself, to its first token.
    pub first_token: f64,
    /// Of all others together, who are held up by it: each by the time that its tokens add to steps. What a step costs
    /// however many tokens it has, and the way to a worker and back, nobody waits for twice.
    pub harm: f64,
}

impl Cost {
    fn total(self) -> f64 {
        self.first_token + self.harm
    }
}

impl Verdict {
    /// Says whether the decode worker computes the prompt.
    pub fn is_local(&self) -> bool {
        matches!(self, Self::Local(_))
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (how, why) = match self {
            Self::Remote(why) => ("handed off", why),
            Self::Local(why) => ("computed by the decode worker", why),
        };
        write!(f, "{how}: ")?;
        match why {
            Why::Off => f.write_str("every prompt is"),
            Why::Length { uncached, least } => {
                write!(f, "{uncached} uncached tokens, {least} are worth it")
            }
            Why::Queue { tokens, most } => {
                write!(
                    f,
                    "{tokens} tokens are queued for prefill, {most} are allowed"
                )
            }
            Why::Unmeasured => f.write_str("nothing has been measured yet"),
            Why::Predicted { remote, local } => write!(
                f,
                "first token in {:.1} ms by a hand-off, which holds up others by {:.1} ms; in {:.1} ms without, which holds up others by {:.1} ms",
                remote.first_token * 1e3,
                remote.harm * 1e3,
                local.first_token * 1e3,
                local.harm * 1e3
            ),
        }
    }
}

/// What was measured about a model's hand-offs.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Tokens in front of and in a prompt, to seconds until a prefill worker had computed it.
    pub prefill: Line,
    /// Tokens of a prompt that had to be fetched, to seconds from the decode leg's beginning to its first token.
    pub transfer: Line,
    /// As `prefill`, for decode workers that computed a prompt themselves.
    pub local: Line,
}

impl Conditional {
    /// Decides about one prompt.
    pub fn decide(&self, situation: &Situation, measured: &Measured) -> Verdict {
        match self {
            Self::Off => Verdict::Remote(Why::Off),
            Self::Fixed(bounds) => bounds.decide(situation),
            Self::Auto => predicted(situation, measured),
        }
    }
}

impl Bounds {
    fn decide(&self, situation: &Situation) -> Verdict {
        if let Some(most) = self.max_prefill_queue
            && situation.prefill_queue > most
        {
            let tokens = situation.prefill_queue;
            return Verdict::Local(Why::Queue { tokens, most });
        }
        let why = Why::Length {
            uncached: situation.uncached,
            least: self.min_prefill_tokens,
        };
        if situation.uncached < self.min_prefill_tokens {
            Verdict::Local(why)
        } else {
            Verdict::Remote(why)
        }
    }
}

fn predicted(situation: &Situation, measured: &Measured) -> Verdict {
    let ahead = situation.prefill_queue + situation.uncached_at_prefill;
    // A decode worker that never computed a prompt is taken to be as fast as a prefill worker.
    let local_line = measured.local.or(&measured.prefill);
    let lines = || {
        let prefill = measured.prefill.at(ahead as f64)?;
        let transfer = measured.transfer.at(situation.uncached as f64)?;
        let added = measured
            .prefill
            .growth(situation.uncached_at_prefill as f64)?;
        let local = local_line.at((situation.decode_queue + situation.uncached) as f64)?;
        let added_locally = local_line.growth(situation.uncached as f64)?;
        let remote = Cost {
            first_token: prefill + transfer,
            harm: added * situation.queued as f64,
        };
        let local = Cost {
            first_token: local,
            harm: added_locally * situation.streams as f64,
        };
        Some((remote, local))
    };
    let Some((remote, local)) = lines() else {
        return Verdict::Remote(Why::Unmeasured);
    };
    let why = Why::Predicted { remote, local };
    if local.total() < remote.total() {
        Verdict::Local(why)
    } else {
        Verdict::Remote(why)
    }
}

/// Weight that an observation keeps with each later one: the last hundred or so count.
const KEPT: f64 = 0.98;
/// Observations (weighed) before anything is predicted.
const ENOUGH: f64 = 4.0;

/// A straight line through observations, of which old ones count less (weighted least squares).
#[derive(Clone, Copy, Debug, Default)]
pub struct Line {
    weight: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
}

impl Line {
    /// Adds an observation.
    pub fn add(&mut self, x: f64, y: f64) {
        let add = |sum: &mut f64, term: f64| *sum = *sum * KEPT + term;
        add(&mut self.weight, 1.0);
        add(&mut self.x, x);
        add(&mut self.y, y);
        add(&mut self.xx, x * x);
        add(&mut self.xy, x * y);
    }

    /// Returns the value at `x`, never below zero; `None` while too little is known.
    pub fn at(&self, x: f64) -> Option<f64> {
        let mean = self.mean()?;
        Some(match self.slope() {
            Some(slope) => (mean + slope * (x - self.x / self.weight)).max(0.0),
            None => mean,
        })
    }

    /// Returns by how much the value is more at any place than `x` before it; `None` while too little is known. Where
    /// nothing tells which part of the value grows, or by noise none seems to, all of it is taken to.
    pub fn growth(&self, x: f64) -> Option<f64> {
        let mean = self.mean()?;
        let place = self.x / self.weight;
        Some(match self.slope() {
            Some(slope) if slope > 0.0 => slope * x,
            _ if place > 0.0 => mean * x / place,
            _ => 0.0,
        })
    }

    fn mean(&self) -> Option<f64> {
        (self.weight >= ENOUGH).then(|| self.y / self.weight)
    }

    /// Absent where all observations are at one place: they say nothing about it.
    fn slope(&self) -> Option<f64> {
        let spread = self.weight * self.xx - self.x * self.x;
        let slope = || ((self.weight * self.xy - self.x * self.y) / spread).max(0.0);
        (spread > 1e-9 * self.weight * self.xx).then(slope)
    }

    /// Returns this line, or the other while too little is known.
    fn or(&self, other: &Self) -> Self {
        if self.weight < ENOUGH { *other } else { *self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(start: f64, slope: f64) -> Line {
        let mut line = Line::default();
        for x in [10.0, 500.0, 2000.0, 100.0, 900.0, 50.0] {
            line.add(x, start + slope * x);
        }
        line
    }

    #[test]
    fn a_line_finds_start_and_slope_and_follows_a_change() {
        let mut found = line(0.01, 1e-4);
        assert!((found.at(1000.0).unwrap() - 0.11).abs() < 1e-6);
        for _ in 0..100 {
            for x in [100.0, 1000.0] {
                found.add(x, 3e-4 * x);
            }
        }
        assert!((found.at(1000.0).unwrap() - 0.3).abs() < 0.01);
    }

    #[test]
    fn a_line_without_spread_is_flat_and_a_new_one_knows_nothing() {
        let mut flat = Line::default();
        assert_eq!(flat.at(1.0), None);
        for _ in 0..10 {
            flat.add(64.0, 0.5);
        }
        assert!((flat.at(4096.0).unwrap() - 0.5).abs() < 1e-9);
    }

    #[test]
    fn what_tokens_add_is_without_what_is_paid_for_none_if_that_can_be_told() {
        assert!((line(0.02, 1e-4).growth(300.0).unwrap() - 0.03).abs() < 1e-6);
        let mut flat = Line::default();
        assert_eq!(flat.growth(1.0), None);
        for _ in 0..10 {
            flat.add(64.0, 0.5);
        }
        assert!((flat.growth(32.0).unwrap() - 0.25).abs() < 1e-9);
        let mut falling = Line::default();
        for tokens in 60..70 {
            falling.add(f64::from(tokens), 0.02 - 1e-6 * f64::from(tokens));
        }
        assert!(falling.growth(3000.0).unwrap() > 0.5);
    }

    #[test]
    fn fixed_bounds_keep_short_prompts_and_long_queues_away_from_prefill() {
        let fixed = Conditional::Fixed(Bounds {
            min_prefill_tokens: 100,
            max_prefill_queue: Some(5000),
        });
        let decide = |uncached, prefill_queue| {
            let situation = Situation {
                uncached,
                prefill_queue,
                ..Situation::default()
            };
            fixed.decide(&situation, &Measured::default())
        };
        assert!(decide(99, 0).is_local());
        assert!(!decide(100, 5000).is_local());
        assert!(decide(100, 5001).is_local());
    }

    #[test]
    fn prediction_weighs_the_transfer_against_the_harm_to_running_streams() {
        let measured = Measured {
            prefill: line(0.002, 1e-4),
            transfer: line(0.030, 1e-6),
            local: Line::default(),
        };
        let decide = |uncached, streams| {
            let situation = Situation {
                uncached,
                uncached_at_prefill: uncached,
                streams,
                ..Situation::default()
            };
            Conditional::Auto.decide(&situation, &measured)
        };
        // 4 ms of work are not worth 30 ms of transfer, unless many streams wait for them.
        assert!(decide(20, 0).is_local());
        assert!(!decide(20, 20).is_local());
        assert!(!decide(2000, 4).is_local());
        // So does a prompt that it has cached and the prefill worker has not.
        let known = Situation {
            uncached: 16,
            uncached_at_prefill: 2000,
            streams: 4,
            ..Situation::default()
        };
        assert!(Conditional::Auto.decide(&known, &measured).is_local());
        // A queue at the prefill worker speaks for the decode worker.
        let queued = Situation {
            uncached: 2000,
            uncached_at_prefill: 2000,
            prefill_queue: 20_000,
            streams: 4,
            ..Situation::default()
        };
        assert!(Conditional::Auto.decide(&queued, &measured).is_local());
    }

    #[test]
    fn where_both_are_busy_a_prompt_goes_where_it_holds_up_fewer() {
        let measured = Measured {
            prefill: line(0.0, 2e-5),
            transfer: line(0.006, 2e-6),
            local: line(0.0, 2e-5),
        };
        // A load that one prefill worker cannot keep up with: prompts of 60 ms, of 128 requests most wait there.
        let decide = |queued: u64, streams| {
            let situation = Situation {
                uncached: 3000,
                uncached_at_prefill: 3000,
                prefill_queue: queued * 3000,
                decode_queue: 0,
                streams,
                queued,
            };
            Conditional::Auto.decide(&situation, &measured)
        };
        assert!(decide(100, 28).is_local());
        assert!(!decide(10, 118).is_local());
        assert!(!decide(0, 1).is_local());
    }

    #[test]
    fn nobody_is_held_up_by_what_a_step_costs_anyway() {
        let measured = Measured {
            prefill: line(0.020, 1e-5),
            transfer: line(0.030, 0.0),
            local: Line::default(),
        };
        let decide = |streams, queued| {
            let situation = Situation {
                uncached: 100,
                uncached_at_prefill: 100,
                streams,
                queued,
                ..Situation::default()
            };
            Conditional::Auto.decide(&situation, &measured)
        };
        // 1 ms of each stream's time, and not 21, against 30 ms of transfer.
        assert!(decide(10, 0).is_local());
        assert!(!decide(40, 0).is_local());
        // As it is with those who wait at the prefill worker.
        assert!(!decide(40, 5).is_local());
        assert!(decide(40, 15).is_local());
    }

    #[test]
    fn without_measurements_prompts_are_handed_off() {
        let verdict = Conditional::Auto.decide(&Situation::default(), &Measured::default());
        assert_eq!(verdict, Verdict::Remote(Why::Unmeasured));
    }
}
