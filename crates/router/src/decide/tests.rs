use super::*;
use crate::{Ledger, Share};

const PROMPT: u64 = 3;

fn share(prompt: u64) -> Share {
    Share {
        prompt,
        ..Share::default()
    }
}

fn ids(n: usize) -> Vec<WorkerId> {
    (0..n).map(|i| WorkerId(format!("w{i}"))).collect()
}

fn candidates<'a>(ids: &'a [WorkerId], ledgers: &[Ledger]) -> Vec<Candidate<'a>> {
    let loads = ledgers.iter().map(Ledger::load);
    ids.iter()
        .zip(loads)
        .map(|(worker, load)| Candidate::new(worker, None, load))
        .collect()
}

fn idle(ids: &[WorkerId]) -> Vec<Candidate<'_>> {
    candidates(ids, &vec![Ledger::default(); ids.len()])
}

#[test]
fn no_candidate_is_an_error_that_another_time_may_cure() {
    let error = Router::new(Policy::RoundRobin, 0)
        .choose(&[], PROMPT)
        .unwrap_err();
    assert!(error.code().is_retryable());
}

#[test]
fn round_robin_takes_turns() {
    let ids = ids(3);
    let mut router = Router::new(Policy::RoundRobin, 0);
    let seen: Vec<_> = (0..7)
        .map(|_| router.choose(&idle(&ids), PROMPT).unwrap().index)
        .collect();
    assert_eq!(seen, [0, 1, 2, 0, 1, 2, 0]);
}

#[test]
fn random_draws_are_spread_and_follow_their_seed() {
    let ids = ids(4);
    let draw = |seed| {
        let mut router = Router::new(Policy::Random, seed);
        (0..400)
            .map(|_| router.choose(&idle(&ids), PROMPT).unwrap().index)
            .collect::<Vec<_>>()
    };
    assert_eq!(draw(7), draw(7));
    assert_ne!(draw(7), draw(8));
    for index in 0..4 {
        let count = draw(7).into_iter().filter(|i| *i == index).count();
        assert!(
            (60..=140).contains(&count),
            "{index} was drawn {count} times"
        );
    }
}

#[test]
fn requests_that_arrive_together_are_spread_by_what_was_booked() {
    let ids = ids(3);
    let ledgers: Vec<Ledger> = (0..3).map(|_| Ledger::default()).collect();
    let mut router = Router::new(Policy::LeastLoaded(Measure::Requests), 0);
    let mut running = Vec::new();
    for _ in 0..9 {
        let choice = router.choose(&candidates(&ids, &ledgers), PROMPT).unwrap();
        running.push(ledgers[choice.index].book(share(3)));
    }
    assert!(ledgers.iter().all(|l| l.load().requests == 3));

    // The first, fourth and seventh went to one target; when they end, it is the least loaded.
    let mut nth = 0;
    running.retain(|_| {
        nth += 1;
        nth % 3 != 1
    });
    let choice = router.choose(&candidates(&ids, &ledgers), PROMPT).unwrap();
    assert_eq!(ledgers[choice.index].load().requests, 0);
    let Reason::LeastLoaded {
        equals: 1, of: 3, ..
    } = choice.reason
    else {
        panic!("{:?}", choice.reason)
    };
}

#[test]
fn tokens_may_outweigh_requests() {
    let ids = ids(2);
    let ledgers = [Ledger::default(), Ledger::default()];
    let _long = ledgers[0].book(share(10_000));
    let _short = [ledgers[1].book(share(10)), ledgers[1].book(share(10))];
    let choose = |measure| {
        Router::new(Policy::LeastLoaded(measure), 0)
            .choose(&candidates(&ids, &ledgers), PROMPT)
            .unwrap()
            .index
    };
    assert_eq!(choose(Measure::Requests), 0);
    assert_eq!(choose(Measure::Tokens), 1);
}

#[test]
fn equally_idle_targets_take_turns() {
    let ids = ids(3);
    let mut router = Router::new(Policy::LeastLoaded(Measure::Requests), 0);
    let seen: Vec<_> = (0..6)
        .map(|_| router.choose(&idle(&ids), PROMPT).unwrap().index)
        .collect();
    assert_eq!(seen, [0, 1, 2, 0, 1, 2]);
}

fn kv(weights: Weights) -> Router {
    Router::new(Policy::Kv(weights), 3)
}

fn with_cache<'a>(ids: &'a [WorkerId], device: &[u64]) -> Vec<Candidate<'a>> {
    let mut candidates = idle(ids);
    for (candidate, &device) in candidates.iter_mut().zip(device) {
        candidate.cached.device = device;
    }
    candidates
}

fn queue(candidate: &mut Candidate<'_>, tokens: u64) {
    candidate.load.requests += 1;
    candidate.load.prefill_tokens += tokens;
}

#[test]
fn a_prompt_goes_where_its_prefix_is_until_more_waits_there_than_the_prefix_saves() {
    let ids = ids(3);
    let mut router = kv(Weights::WHOLE);
    let mut candidates = with_cache(&ids, &[0, 800, 640]);
    let choice = router.choose(&candidates, 1000).unwrap();
    assert_eq!(choice.index, 1);
    let Reason::Cheapest {
        terms,
        equals: 1,
        of: 3,
    } = choice.reason
    else {
        panic!("{:?}", choice.reason)
    };
    assert_eq!((terms.uncached, terms.cost), (200, 200.0));

    queue(&mut candidates[1], 161);
    assert_eq!(router.choose(&candidates, 1000).unwrap().index, 2);
    queue(&mut candidates[2], 641);
    queue(&mut candidates[1], 640);
    assert_eq!(router.choose(&candidates, 1000).unwrap().index, 0);
}

#[test]
fn slower_media_save_less_and_decoding_costs_its_weight() {
    let ids = ids(2);
    let mut candidates = with_cache(&ids, &[500, 0]);
    candidates[1].cached = Cached {
        device: 0,
        host: 500,
        storage: 400,
    };
    let mut router = kv(Weights::WHOLE);
    assert_eq!(router.choose(&candidates, 1000).unwrap().index, 0);
    candidates[1].cached.host = 900;
    assert_eq!(router.choose(&candidates, 1000).unwrap().index, 1);
    candidates[1].load.decode_tokens = 10_000;
    assert_eq!(router.choose(&candidates, 1000).unwrap().index, 0);
    // Where nothing is decoded it does not count.
    assert_eq!(
        kv(Weights::PREFILL)
            .choose(&candidates, 1000)
            .unwrap()
            .index,
        1
    );
}

#[test]
fn a_full_target_is_left_to_others_and_taken_if_all_are_full() {
    let ids = ids(2);
    let mut candidates = with_cache(&ids, &[990, 0]);
    let room = Room {
        requests: 2,
        kv_tokens: 2000,
    };
    candidates
        .iter_mut()
        .for_each(|candidate| candidate.room = room);
    let mut router = kv(Weights::WHOLE);
    assert_eq!(router.choose(&candidates, 1000).unwrap().index, 0);
    candidates[0].load.requests = 2;
    assert_eq!(router.choose(&candidates, 1000).unwrap().index, 1);
    candidates[1].load = Load {
        requests: 1,
        kv_tokens: 1001,
        ..Load::default()
    };
    let choice = router.choose(&candidates, 1000).unwrap();
    assert!(matches!(choice.reason, Reason::Cheapest { terms, .. } if terms.full));
    assert_eq!(choice.index, 0);
}

#[test]
fn equals_are_drawn_and_temperature_draws_dearer_ones_the_more_rarely() {
    let ids = ids(4);
    let count = |mut router: Router, device: &[u64]| {
        let mut counts = [0; 4];
        for _ in 0..2000 {
            counts[router
                .choose(&with_cache(&ids, device), 1000)
                .unwrap()
                .index] += 1;
        }
        counts
    };
    let equal = count(kv(Weights::WHOLE), &[500, 500, 100, 500]);
    assert_eq!(equal[2], 0);
    assert!(
        equal.iter().filter(|n| (550..=780).contains(*n)).count() == 3,
        "{equal:?}"
    );

    let warm = Weights {
        temperature: 0.3,
        ..Weights::WHOLE
    };
    let drawn = count(kv(warm), &[1000, 700, 400, 100]);
    // Each costs 300 more than the one before: e times less often.
    for pair in drawn.windows(2) {
        let ratio = f64::from(pair[0]) / f64::from(pair[1]);
        assert!((2.0..=3.7).contains(&ratio), "{drawn:?}");
    }
}

#[test]
fn a_copy_decides_as_the_original_would() {
    let ids = ids(5);
    let mut router = kv(Weights::WHOLE);
    for _ in 0..20 {
        let foretold = router.clone().choose(&idle(&ids), 10).unwrap();
        assert_eq!(router.choose(&idle(&ids), 10).unwrap(), foretold);
    }
}
