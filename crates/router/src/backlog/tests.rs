use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const FREE: Seat = Seat {
    queued: 0,
    room: true,
};

fn busy(queued: u64) -> Seat {
    Seat {
        queued,
        room: false,
    }
}

fn backlog(names: &[&'static str]) -> Backlog<&'static str> {
    let mut backlog = Backlog::default();
    for name in names {
        let place = backlog.place();
        backlog.insert(place, 10, *name);
    }
    backlog
}

/// What there is to do for a prompt of a thousand tokens.
fn cached(cached: u64) -> Option<Fit> {
    Some(Fit {
        cached,
        uncached: 1000 - cached,
    })
}

#[test]
fn a_free_target_takes_what_it_has_most_of() {
    let mut backlog = backlog(&["cold", "warm", "hot"]);
    let fits = |name: &&str, out: &mut [Option<Fit>]| {
        out.fill(cached(0));
        out[0] = cached(match *name {
            "warm" => 300,
            "hot" => 500,
            _ => 0,
        });
    };
    let seats = [FREE, busy(9000)];
    let taken = std::iter::from_fn(|| {
        let next = backlog.next(&seats, fits)?;
        assert_eq!(next.targets[..], [0]);
        backlog.take(next.place)
    });
    assert_eq!(taken.collect::<Vec<_>>(), ["hot", "warm", "cold"]);
    assert_eq!((backlog.len(), backlog.tokens()), (0, 0));
}

#[test]
fn an_overdue_prompt_that_only_a_busy_target_may_have_holds_up_nobody_else() {
    let mut backlog = backlog(&["bound", "free"]);
    backlog.hurry(|_| true);
    let fits = |name: &&str, out: &mut [Option<Fit>]| {
        out.fill(None);
        out[1] = cached(0);
        if *name == "free" {
            out[0] = cached(0);
        }
    };
    let next = backlog.next(&[FREE, busy(100)], fits).unwrap();
    assert_eq!(backlog.take(next.place), Some("free"));
    let next = backlog.next(&[FREE, FREE], fits).unwrap();
    assert_eq!(
        (next.targets[..].to_vec(), backlog.take(next.place)),
        (vec![1], Some("bound"))
    );
}

#[test]
fn hurried_prompts_wait_for_no_cache() {
    let mut backlog = backlog(&["first"]);
    let seats = [FREE, busy(100)];
    let fits = |_: &&str, out: &mut [Option<Fit>]| {
        out[0] = cached(0);
        out[1] = cached(990);
    };
    assert_eq!(backlog.next(&seats, fits), None);
    backlog.hurry(|name| *name != "first");
    assert_eq!(backlog.next(&seats, fits), None);
    backlog.hurry(|name| *name == "first");
    assert_eq!(backlog.next(&seats, fits).unwrap().targets[..], [0]);
}

#[test]
fn what_is_cached_at_a_busy_target_is_waited_for_while_that_is_quicker() {
    let backlog = backlog(&["first", "second"]);
    let at = |queued: u64| {
        backlog.next(&[FREE, busy(queued)], |_, out| {
            out[0] = cached(0);
            out[1] = cached(800);
        })
    };
    // 200 after 500, and 200 after 700, are less than 1000.
    assert_eq!(at(500), None);
    // Then the second would be ready later there than here.
    let place = |nth| backlog.waiting[nth].place;
    assert_eq!(at(700).unwrap().place, place(1));
    assert_eq!(at(801).unwrap().place, place(0));
}

#[test]
fn no_target_is_idle_for_prompts_that_nobody_looks_at() {
    let next = |waiting: usize| {
        let backlog = backlog(&vec!["all at the other"; waiting]);
        let next = backlog.next(&[FREE, busy(10)], |_, out| {
            out[0] = cached(0);
            out[1] = cached(1000);
        });
        next.map(|next| (next.place, next.targets[0]))
    };
    assert_eq!(next(10), None);
    assert_eq!(next(100), Some((Place(1), 0)));
}

#[test]
fn equally_free_targets_are_left_to_the_caller_and_forbidden_ones_are_not_named() {
    let backlog = backlog(&["nobody's", "any's"]);
    let next = backlog.next(&[FREE; 3], |name, out| {
        if *name == "any's" {
            out[1] = cached(0);
            out[2] = cached(0);
        }
    });
    assert_eq!(next.unwrap().targets[..], [1, 2]);
}

#[test]
fn a_prompt_that_comes_back_takes_its_place_again() {
    let mut backlog = backlog(&["a", "b", "c"]);
    let next = |backlog: &Backlog<_>| {
        let next = backlog.next(&[FREE], |_, out| out.fill(cached(0)));
        next.unwrap().place
    };
    let first = next(&backlog);
    let again = backlog.take(first).unwrap();
    assert_eq!(backlog.tokens(), 20);
    backlog.insert(first, 10, again);
    assert_eq!(next(&backlog), first);
    assert_eq!(backlog.remove(first), Some("a"));
    assert_eq!(backlog.remove(first), None);
    assert_eq!(backlog.remove_if(|item| *item == "c"), ["c"]);
    assert_eq!(backlog.len(), 1);
}

#[test]
fn a_target_has_room_for_the_step_that_runs_and_the_next() {
    let load = |requests, prefill_tokens| Load {
        requests,
        prefill_tokens,
        ..Load::default()
    };
    let room = Room {
        requests: 8,
        ..Room::default()
    };
    assert!(has_room(&load(0, 0), room, 0));
    assert!(has_room(&load(7, 4095), room, 2048));
    assert!(!has_room(&load(1, 4096), room, 2048));
    assert!(!has_room(&load(8, 0), room, 2048));
}

proptest! {
    /// Whatever is cached where: nobody is overtaken more often than is said, and no target is idle while somebody
    /// waits whom it may have and of whom nobody else has more.
    #[test]
    fn nobody_starves_and_nobody_is_idle_for_nothing(
        steps in prop::collection::vec((0_usize..6, prop::collection::vec((any::<bool>(), 0_u64..2000), 4)), 1..200),
        held in prop::collection::vec(0_u64..1000, 64),
        // Of which targets a prompt may have only one; the others take any.
        bound in prop::collection::vec(prop::option::weighted(0.2, 0_usize..4), 64),
    ) {
        let mut backlog = Backlog::default();
        let mut overtaken: BTreeMap<usize, u32> = BTreeMap::new();
        let mut arrived = 0;
        let may = |number: usize, target: usize| {
            bound[number % bound.len()].is_none_or(|only| only == target)
        };
        let has = |number: usize, target: usize| held[(number * 7 + target * 3) % held.len()];
        for (arrivals, seats) in steps {
            for _ in 0..arrivals {
                let place = backlog.place();
                backlog.insert(place, 1, arrived);
                overtaken.insert(arrived, 0);
                arrived += 1;
            }
            let seats: Vec<_> = seats
                .into_iter()
                .map(|(room, queued)| Seat { room, queued: if room { 0 } else { queued } })
                .collect();
            let next = backlog.next(&seats, |number, out| {
                for (target, out) in out.iter_mut().enumerate() {
                    *out = may(*number, target).then(|| cached(has(*number, target))).flatten();
                }
            });
            let best_here = |number: usize| (0..seats.len()).any(|target| {
                seats[target].room && may(number, target)
                    && (0..seats.len()).all(|other| !may(number, other) || has(number, other) <= has(number, target))
            });
            let first = overtaken.keys().next();
            if first.is_some_and(|first| best_here(*first)) {
                prop_assert!(next.is_some());
            }
            let Some(Next { place, targets }) = next else { continue };
            let taken = backlog.take(place).expect("it waits");
            prop_assert!(targets.iter().all(|target| seats[*target].room && may(taken, *target)));
            prop_assert!(!targets.is_empty());
            overtaken.remove(&taken);
            for (number, times) in overtaken.range_mut(..taken) {
                *times += 1;
                let unbound = bound[number % bound.len()].is_none();
                prop_assert!(!unbound || *times <= PASSES * 4, "{number} was overtaken {times} times");
            }
        }
        prop_assert_eq!(backlog.len(), overtaken.len());
    }
}
