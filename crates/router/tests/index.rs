//! The index against a model of it that is too simple to be wrong.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use stator_router::BlockHash;
use stator_router::hash;
use stator_router::index::{Index, Matches, Target};

/// What can happen. Chains are numbers, blocks are positions in them.
#[derive(Clone, Debug)]
enum Change {
    Insert(usize, usize, std::ops::Range<usize>),
    /// In reverse, as engines give them up.
    Remove(usize, usize, std::ops::Range<usize>),
    Clear(usize),
    Leave(usize),
    /// Blocks of several chains in any order.
    Scattered(usize, Vec<(usize, usize)>, bool),
    Sweep,
}

const TARGETS: usize = 7;
const CHAINS: usize = 6;
const LENGTH: usize = 40;

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let range = || (0..LENGTH, 1..LENGTH).prop_map(|(from, n)| from..(from + n).min(LENGTH));
    let block = (0..CHAINS, 0..LENGTH);
    let change = prop_oneof![
        8 => (0..TARGETS, 0..CHAINS, range()).prop_map(|(t, c, r)| Change::Insert(t, c, r)),
        5 => (0..TARGETS, 0..CHAINS, range()).prop_map(|(t, c, r)| Change::Remove(t, c, r)),
        1 => (0..TARGETS).prop_map(Change::Clear),
        1 => (0..TARGETS).prop_map(Change::Leave),
        2 => (0..TARGETS, prop::collection::vec(block, 1..20), any::<bool>())
            .prop_map(|(t, blocks, add)| Change::Scattered(t, blocks, add)),
        1 => Just(Change::Sweep),
    ];
    prop::collection::vec(change, 1..120)
}

/// Chains that share their beginnings, as conversations do: chain `c` leaves chain `c / 2` after some blocks.
///
/// - `scale`: blocks at each position.
fn chains(scale: usize) -> Vec<Vec<BlockHash>> {
    let tokens = |chain: usize| -> Vec<u32> {
        (0..LENGTH * scale)
            .map(|at| {
                let (mut owner, mut fork) = (chain, chain * 7 % 30);
                while owner > 0 && at / scale < fork {
                    owner /= 2;
                    fork = owner * 7 % 30;
                }
                (owner * 1_000_000 + at) as u32
            })
            .collect()
    };
    (0..CHAINS)
        .map(|chain| hash::blocks(hash::root("", ""), &tokens(chain), 1))
        .collect()
}

#[derive(Default)]
struct Model {
    held: HashMap<usize, BTreeSet<BlockHash>>,
}

impl Model {
    fn matched(&self, target: usize, chain: &[BlockHash]) -> u32 {
        let held = self.held.get(&target);
        let has = |hash: &&BlockHash| held.is_some_and(|held| held.contains(hash));
        chain.iter().take_while(has).count() as u32
    }
}

fn check(index: &Index, targets: &[Target], model: &Model, chains: &[Vec<BlockHash>]) {
    let scale = chains[0].len() / LENGTH;
    let mut matches = Matches::default();
    for chain in chains {
        for from in [0, 3, 20] {
            let chain = &chain[from * scale..];
            index.matches(chain, &mut matches);
            for (number, target) in targets.iter().enumerate() {
                let held = model.matched(number, chain);
                assert_eq!(matches.blocks(*target), held);
                assert_eq!(index.own(*target, chain), held);
            }
            assert!(matches.iter().all(|(_, blocks)| blocks > 0));
        }
    }
    for (number, target) in targets.iter().enumerate() {
        let held = model.held.get(&number).map_or(0, BTreeSet::len);
        assert_eq!(index.blocks(*target), held as u64);
    }
}

fn run(lanes: usize, scale: usize, changes: &[Change]) {
    let chains = chains(scale);
    let scaled = |range: std::ops::Range<usize>| range.start * scale..range.end * scale;
    let index = Index::new(lanes, 99);
    let mut targets: Vec<_> = (0..TARGETS).map(|_| index.join()).collect();
    let mut model = Model::default();
    for (nth, change) in changes.iter().enumerate() {
        match change.clone() {
            Change::Insert(target, chain, range) => {
                let hashes = &chains[chain][scaled(range)];
                let held = model.held.entry(target).or_default();
                let new = hashes.iter().filter(|hash| held.insert(**hash)).count();
                assert_eq!(index.insert(targets[target], hashes), new as u64);
            }
            Change::Remove(target, chain, range) => {
                let hashes = &chains[chain][scaled(range)];
                let hashes: Vec<_> = hashes.iter().rev().copied().collect();
                let held = model.held.entry(target).or_default();
                hashes.iter().for_each(|hash| {
                    held.remove(hash);
                });
                index.remove(targets[target], &hashes);
            }
            Change::Clear(target) => {
                model.held.remove(&target);
                index.clear(targets[target]);
            }
            Change::Leave(target) => {
                model.held.remove(&target);
                index.leave(targets[target]);
                targets[target] = index.join();
            }
            Change::Scattered(target, blocks, add) => {
                let hashes: Vec<_> = blocks
                    .iter()
                    .map(|&(chain, at)| chains[chain][at * scale])
                    .collect();
                let held = model.held.entry(target).or_default();
                if add {
                    held.extend(&hashes);
                    index.insert(targets[target], &hashes);
                } else {
                    held.retain(|hash| !hashes.contains(hash));
                    index.remove(targets[target], &hashes);
                }
            }
            Change::Sweep => {
                index.sweep();
            }
        }
        if nth % scale == 0 {
            check(&index, &targets, &model, &chains);
        }
    }
    while index.sweep() {}
    check(&index, &targets, &model, &chains);
    let distinct: BTreeSet<_> = model.held.values().flatten().collect();
    let memory = index.memory();
    assert_eq!(
        memory.held,
        model
            .held
            .values()
            .map(|held| held.len() as u64)
            .sum::<u64>()
    );
    if lanes == 1 {
        assert_eq!(memory.blocks, distinct.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_happens_the_index_holds_what_the_model_holds(changes in changes()) {
        run(1, 1, &changes);
        run(3, 1, &changes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// So many that places are allocated several times, and the table's parts double and overflow.
    #[test]
    fn thousands_of_blocks_are_held_as_the_model_holds_them(changes in changes()) {
        run(1, 40, &changes);
    }
}

#[test]
fn threads_that_change_different_targets_do_not_disturb_each_other_or_those_who_look() {
    let chains = chains(1);
    let index = Index::new(2, 5);
    let targets: Vec<_> = (0..4).map(|_| index.join()).collect();
    let still = index.join();
    for chain in &chains {
        index.insert(still, chain);
    }
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = targets
            .iter()
            .enumerate()
            .map(|(number, &target)| {
                let (index, chains) = (&index, &chains);
                scope.spawn(move || {
                    for round in 0..2000 {
                        let chain = &chains[(round + number) % CHAINS];
                        index.insert(target, chain);
                        match round % 7 {
                            0 => index.clear(target),
                            n => {
                                let gone: Vec<_> = chain[n * 5..].iter().rev().copied().collect();
                                index.remove(target, &gone);
                            }
                        }
                    }
                    index.clear(target);
                    index.insert(target, &chains[number][..10 + number]);
                })
            })
            .collect();
        scope.spawn(|| {
            let mut matches = Matches::default();
            while !done.load(Ordering::Relaxed) {
                for chain in &chains {
                    index.matches(chain, &mut matches);
                    assert_eq!(matches.blocks(still) as usize, chain.len());
                    assert!(matches.iter().all(|(_, blocks)| blocks as usize <= LENGTH));
                }
            }
        });
        for writer in writers {
            writer.join().unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    while index.sweep() {}
    let mut matches = Matches::default();
    for (number, target) in targets.iter().enumerate() {
        index.matches(&chains[number], &mut matches);
        assert_eq!(matches.blocks(*target), 10 + number as u32);
        assert_eq!(index.blocks(*target), 10 + number as u64);
    }
}
