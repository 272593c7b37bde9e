//! The other way round: a target with room asks, and gets one of the prompts that wait.
//!
//! This is for a line that others stand in, too: whose turn it is, is decided elsewhere, and what is known of other
//! targets here is not all. So a prompt is not kept for a target that would have it ready first, but for one that has more
//! of it cached, and no longer than computing that anew would take; each prompt says so by itself.

use std::time::Duration;

use super::{Backlog, PASSES, Place, WINDOW, WINDOW_PER_TARGET};

/// Prompts that are looked at, those that are not for the target included.
const MOST_SEEN: usize = 1024;

/// What a prompt that waits says to a target that asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Not this one.
    Never,
    /// It waits for others that have more of it, for so long.
    Later(Duration),
    /// Now.
    Now {
        /// Tokens that this target has cached.
        cached: u64,
    },
}

/// What a target gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pulled {
    /// This prompt.
    Take(Place),
    /// Nothing yet; after so long there is something.
    Later(Duration),
    /// Nothing of what waits, as far as was looked.
    Nothing,
}

impl<T> Backlog<T> {
    /// Returns which prompt a target gets: of those that may go there now the one that it has most of, the first of
    /// equals; but one that was overtaken often enough goes first.
    ///
    /// - `targets`: how many there are.
    /// - `claim`: what a prompt says to this one.
    pub fn pull(&self, targets: usize, mut claim: impl FnMut(&T) -> Claim) -> Pulled {
        let window = WINDOW + WINDOW_PER_TARGET * targets;
        let passes = PASSES.saturating_mul(u32::try_from(targets).unwrap_or(u32::MAX));
        let mut best: Option<(u64, Place)> = None;
        let mut soonest: Option<Duration> = None;
        let mut seen = 0;
        for one in self.waiting.iter().take(MOST_SEEN) {
            match claim(&one.item) {
                Claim::Never => continue,
                Claim::Later(pause) => {
                    soonest = Some(soonest.map_or(pause, |least| least.min(pause)));
                }
                Claim::Now { cached } => {
                    if best.is_none_or(|(most, _)| cached > most) {
                        best = Some((cached, one.place));
                    }
                    // Nobody overtakes it any more; those before it that could go now go before it.
                    if one.passed >= passes {
                        break;
                    }
                }
            }
            seen += 1;
            if seen == window {
                break;
            }
        }
        match (best, soonest) {
            (Some((_, place)), _) => Pulled::Take(place),
            (None, Some(pause)) => Pulled::Later(pause),
            (None, None) => Pulled::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backlog(claims: &[Claim]) -> (Backlog<Claim>, Vec<Place>) {
        let mut backlog = Backlog::default();
        let places = claims.iter().map(|claim| {
            let place = backlog.place();
            backlog.insert(place, 1, *claim);
            place
        });
        let places = places.collect();
        (backlog, places)
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_target_gets_what_it_has_most_of_and_else_the_first() {
        let (backlog, places) = backlog(&[
            Claim::Later(SECOND),
            Claim::Now { cached: 0 },
            Claim::Never,
            Claim::Now { cached: 7 },
            Claim::Now { cached: 7 },
        ]);
        assert_eq!(backlog.pull(2, |claim| *claim), Pulled::Take(places[3]));
        let nothing = |claim: &Claim| match claim {
            Claim::Now { .. } => Claim::Now { cached: 0 },
            other => *other,
        };
        assert_eq!(backlog.pull(2, nothing), Pulled::Take(places[1]));
    }

    #[test]
    fn a_target_hears_when_to_ask_again() {
        let (waits, _) = backlog(&[Claim::Later(2 * SECOND), Claim::Later(SECOND), Claim::Never]);
        assert_eq!(waits.pull(1, |claim| *claim), Pulled::Later(SECOND));
        let (none, _) = backlog(&[Claim::Never]);
        assert_eq!(none.pull(1, |claim| *claim), Pulled::Nothing);
        assert_eq!(
            Backlog::<Claim>::default().pull(1, |claim| *claim),
            Pulled::Nothing
        );
    }

    #[test]
    fn no_more_is_looked_at_than_is_said() {
        let (backlog, _) = backlog(&vec![Claim::Never; 2 * MOST_SEEN]);
        let mut seen = 0;
        let pulled = backlog.pull(1, |claim| {
            seen += 1;
            *claim
        });
        assert_eq!((pulled, seen), (Pulled::Nothing, MOST_SEEN));
    }

    #[test]
    fn nobody_is_overtaken_for_ever() {
        let mut backlog = Backlog::default();
        let first = backlog.place();
        backlog.insert(first, 1, 0);
        let mut overtaken = 0;
        for _ in 0..=2 * PASSES {
            let next = backlog.place();
            backlog.insert(next, 1, 100);
            let Pulled::Take(place) = backlog.pull(2, |cached| Claim::Now { cached: *cached })
            else {
                panic!("somebody could go");
            };
            backlog.take(place);
            if place == first {
                break;
            }
            overtaken += 1;
        }
        assert_eq!((overtaken, backlog.get(first)), (2 * PASSES, None));
    }
}
