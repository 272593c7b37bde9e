//! Whether what a target says that it holds is what its engine finds there.
//!
//! Each answer says how much of its prompt came from the cache. If that is less than what the target was known
//! to hold, blocks went between decision and computation, which happens, or what is known is wrong, which
//! must not last. So the two are compared over the last some requests.

/// Weight that an answer keeps with each later one: the last fifty or so count.
const KEPT: f64 = 0.98;
/// Answers (weighed) before anything is concluded.
const ENOUGH: f64 = 10.0;
/// Share of what was expected that may be missing. Engines under pressure lose a few percent on the way.
const BOUND: f64 = 0.2;

/// How far expectation and finding are apart for one target.
#[derive(Clone, Copy, Debug, Default)]
pub struct Drift {
    answers: f64,
    expected: f64,
    missing: f64,
}

impl Drift {
    /// Compares one answer. Returns whether what is known should be asked for again; the counting then begins anew.
    ///
    /// - `expected`: tokens of the prompt that the target was known to hold; nothing is concluded from 0.
    /// - `found`: tokens that came from its cache.
    pub fn compare(&mut self, expected: u64, found: u64) -> bool {
        if expected == 0 {
            return false;
        }
        let add = |sum: &mut f64, term: f64| *sum = *sum * KEPT + term;
        add(&mut self.answers, 1.0);
        add(&mut self.expected, expected as f64);
        add(&mut self.missing, expected.saturating_sub(found) as f64);
        let wrong = self.answers >= ENOUGH && self.share() > BOUND;
        if wrong {
            *self = Self::default();
        }
        wrong
    }

    /// Returns the share of what was expected that was missing, 0 to 1.
    pub fn share(&self) -> f64 {
        if self.expected > 0.0 {
            self.missing / self.expected
        } else {
            0.0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_that_has_what_it_says_is_never_asked_again() {
        let mut drift = Drift::default();
        for n in 0..1000 {
            // One in ten lost its prefix on the way.
            let found = if n % 10 == 9 { 0 } else { 640 };
            assert!(!drift.compare(640, found));
            assert!(!drift.compare(0, 0));
        }
        assert!((drift.share() - 0.1).abs() < 0.03);
    }

    #[test]
    fn a_target_that_has_forgotten_is_asked_once_and_then_given_time() {
        let mut drift = Drift::default();
        let asked: Vec<_> = (0..30).filter(|_| drift.compare(640, 0)).collect();
        // Later answers weigh more, so ten of them have less than the weight of ten.
        assert_eq!(asked, [11, 23]);
        assert!(drift.share() > 0.9);
    }
}
