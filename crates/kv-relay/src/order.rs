//! The order of an engine's batches: what comes next, what came before, what is missing, and whether it is still the
//! same engine. No clock and no sockets.
//!
//! An engine numbers its batches from 0 on and says nothing about which life of it they belong to. But each bears
//! the time of its step, and an engine that is asked for the latest batch that we know says it again, with the same
//! time, if it is the one that published it. So whenever something is not as expected it is asked from that batch on:
//! the answer tells a gap from another engine, and fills the gap.

use std::collections::VecDeque;

/// Batches whose times are remembered: as many as an engine tells again by default (`buffer_steps`).
const REMEMBERED: usize = 10_000;

/// Rounds of asking that bring nothing new before what is missing counts as forgotten.
const ROUNDS: u32 = 3;

/// The order of the batches of one engine.
#[derive(Debug, Default)]
pub struct Order {
    /// The latest batch of this life.
    last: Option<u64>,
    /// The times of the latest batches, the last one's at the back.
    stamps: VecDeque<u64>,
    asking: Option<Asking>,
    /// Rounds of asking without anything new.
    idle_rounds: u32,
}

/// A question that is not answered to its end yet.
#[derive(Debug)]
struct Asking {
    /// Whether the batch that we know is still to be said again.
    unproven: bool,
    /// Whether something was left out, which happens with long answers.
    hole: bool,
    /// Whether the answer is another engine's, to its end.
    foreign: bool,
    news: bool,
}

/// What to do with a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the next one.
    Apply,
    /// It is the first one that is still known: what was before it is forgotten.
    ApplyPartial,
    /// It counted before, or cannot count yet.
    Skip,
    /// Something is missing or not as it was: ask.
    Ask,
    /// It is not the engine that was heard before.
    Restarted,
    /// What is missing cannot be had any more.
    Forgotten,
}

impl Order {
    /// Returns the number to ask from, and expects an answer.
    pub fn ask(&mut self) -> u64 {
        self.asking = Some(Asking {
            unproven: self.last.is_some(),
            hole: false,
            foreign: false,
            news: false,
        });
        self.last.unwrap_or(0)
    }

    /// Says whether an answer is expected.
    pub fn is_asking(&self) -> bool {
        self.asking.is_some()
    }

    /// Forgets the question: the connection that it was asked on is gone.
    pub fn forget_question(&mut self) {
        self.asking = None;
    }

    /// Begins with nothing: another engine, or one that forgot.
    pub fn begin(&mut self) {
        self.last = None;
        self.stamps.clear();
        self.idle_rounds = 0;
    }

    /// Judges a batch as it is published, while no answer is expected.
    ///
    /// - `stamp`: the bits of its time.
    /// - `repairs`: whether the engine can be asked.
    pub fn live(&mut self, seq: u64, stamp: u64, repairs: bool) -> Verdict {
        let verdict = match self.last {
            Some(last) if seq == last.wrapping_add(1) => Verdict::Apply,
            None if seq == 0 => Verdict::Apply,
            Some(last) if seq <= last && self.stamp(seq) == Some(stamp) => Verdict::Skip,
            _ if repairs => Verdict::Ask,
            None => Verdict::ApplyPartial,
            // Nobody can be asked: lower numbers are another engine's, higher ones leave a gap.
            Some(last) if seq <= last => Verdict::Restarted,
            Some(_) => Verdict::Forgotten,
        };
        if matches!(verdict, Verdict::Apply | Verdict::ApplyPartial) {
            self.took(seq, stamp);
        }
        verdict
    }

    /// Judges a batch that was asked for.
    pub fn again(&mut self, seq: u64, stamp: u64) -> Verdict {
        let Some(asking) = &mut self.asking else {
            return Verdict::Skip;
        };
        if asking.foreign || asking.hole {
            return Verdict::Skip;
        }
        let Some(last) = self.last else {
            let verdict = match seq {
                0 => Verdict::Apply,
                _ => Verdict::ApplyPartial,
            };
            asking.news = true;
            self.took(seq, stamp);
            return verdict;
        };
        if std::mem::take(&mut asking.unproven) {
            if seq == last && self.stamps.back() == Some(&stamp) {
                return Verdict::Skip;
            }
            asking.foreign = true;
            return match seq {
                // It knows more than we do, and not what we know.
                seq if seq > last => Verdict::Forgotten,
                _ => Verdict::Restarted,
            };
        }
        if seq == last.wrapping_add(1) {
            asking.news = true;
            self.took(seq, stamp);
            return Verdict::Apply;
        }
        asking.hole = seq > last;
        Verdict::Skip
    }

    /// Takes the end of an answer. `Skip`: all is known that the engine knew.
    pub fn answered(&mut self) -> Verdict {
        let Some(asking) = self.asking.take() else {
            return Verdict::Skip;
        };
        if asking.foreign {
            // Said when it was noticed; now that engine's own batches are wanted.
            return Verdict::Ask;
        }
        if asking.unproven {
            // An engine always knows the batch that it published last.
            return Verdict::Restarted;
        }
        if !asking.hole {
            self.idle_rounds = 0;
            return Verdict::Skip;
        }
        self.idle_rounds = match asking.news {
            true => 0,
            false => self.idle_rounds + 1,
        };
        match self.idle_rounds {
            rounds if rounds >= ROUNDS => Verdict::Forgotten,
            _ => Verdict::Ask,
        }
    }

    fn took(&mut self, seq: u64, stamp: u64) {
        self.last = Some(seq);
        if self.stamps.len() == REMEMBERED {
            self.stamps.pop_front();
        }
        self.stamps.push_back(stamp);
    }

    /// Returns the time of a batch of this life, if it is remembered.
    fn stamp(&self, seq: u64) -> Option<u64> {
        let back = usize::try_from(self.last?.checked_sub(seq)?).ok()?;
        let at = self.stamps.len().checked_sub(back + 1)?;
        self.stamps.get(at).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An order that knows batches 0 to `last` with these times: ten times the number.
    fn knows(last: u64) -> Order {
        let mut order = Order::default();
        for seq in 0..=last {
            assert_eq!(order.live(seq, seq * 10, true), Verdict::Apply);
        }
        order
    }

    #[test]
    fn what_was_missed_is_filled_in_and_what_comes_twice_counts_once() {
        let mut order = knows(2);
        assert_eq!(order.live(5, 50, true), Verdict::Ask);
        assert_eq!(order.ask(), 2);
        assert_eq!(order.again(2, 20), Verdict::Skip);
        for seq in 3..=5 {
            assert_eq!(order.again(seq, seq * 10), Verdict::Apply);
        }
        assert_eq!(order.answered(), Verdict::Skip);
        assert_eq!(order.live(5, 50, true), Verdict::Skip);
        assert_eq!(order.live(6, 60, true), Verdict::Apply);
    }

    #[test]
    fn an_engine_that_starts_again_is_told_from_a_gap() {
        // Its first batch has a number that was there before, and another time.
        let mut order = knows(5);
        assert_eq!(order.live(0, 77, true), Verdict::Ask);
        assert_eq!(order.ask(), 5);
        assert_eq!(order.answered(), Verdict::Restarted);
        order.begin();
        assert_eq!(order.ask(), 0);
        assert_eq!(order.again(0, 77), Verdict::Apply);
        assert_eq!(order.answered(), Verdict::Skip);

        // It has gone on beyond what we knew.
        let mut order = knows(5);
        assert_eq!(order.live(9, 99, true), Verdict::Ask);
        order.ask();
        assert_eq!(order.again(5, 51), Verdict::Restarted);
        assert_eq!(order.again(6, 61), Verdict::Skip);
        order.begin();
        assert_eq!(order.answered(), Verdict::Ask);
    }

    #[test]
    fn what_the_engine_forgot_is_known_as_forgotten() {
        let mut order = knows(5);
        order.ask();
        assert_eq!(order.again(40, 400), Verdict::Forgotten);
        order.begin();
        assert_eq!(order.answered(), Verdict::Ask);
        order.ask();
        assert_eq!(order.again(30, 300), Verdict::ApplyPartial);
        assert_eq!(order.again(31, 310), Verdict::Apply);
    }

    #[test]
    fn holes_in_an_answer_are_asked_for_until_nothing_comes() {
        let mut order = knows(0);
        order.ask();
        assert_eq!(order.again(0, 0), Verdict::Skip);
        assert_eq!(order.again(1, 10), Verdict::Apply);
        assert_eq!(order.again(3, 30), Verdict::Skip);
        assert_eq!(order.answered(), Verdict::Ask);
        for round in 1..=ROUNDS {
            order.ask();
            assert_eq!(order.again(1, 10), Verdict::Skip);
            assert_eq!(order.again(3, 30), Verdict::Skip);
            let expected = match round {
                ROUNDS => Verdict::Forgotten,
                _ => Verdict::Ask,
            };
            assert_eq!(order.answered(), expected);
        }
    }

    #[test]
    fn without_anybody_to_ask_a_gap_is_final() {
        let mut order = knows(2);
        assert_eq!(order.live(4, 40, false), Verdict::Forgotten);
        order.begin();
        assert_eq!(order.live(4, 40, false), Verdict::ApplyPartial);
        assert_eq!(order.live(0, 1, false), Verdict::Restarted);
    }
}
