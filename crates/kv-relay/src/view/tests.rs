use super::*;

fn stored(hashes: &[u64], parent: Option<u64>, tokens: &[u32]) -> Stored {
    Stored {
        hashes: hashes.to_vec(),
        parent,
        tokens: tokens.to_vec(),
        block_size: 2,
        ..Stored::default()
    }
}

fn removed(hashes: &[u64]) -> KvEvent {
    KvEvent::Removed(Removed {
        hashes: hashes.to_vec(),
        place: Place::default(),
    })
}

fn apply(view: &mut View, event: &KvEvent) -> Vec<Change> {
    let mut changes = Vec::new();
    view.apply(event, &mut |change| changes.push(change));
    changes
}

fn store(view: &mut View, stored: Stored) -> Vec<Change> {
    apply(view, &KvEvent::Stored(stored))
}

fn gpu(hashes: &[BlockHash]) -> Blocks {
    Blocks {
        medium: Medium::Gpu,
        hashes: hashes.iter().map(|hash| hash.0).collect(),
    }
}

#[test]
fn blocks_have_the_names_that_a_router_gives_them() {
    let mut view = View::default();
    let names = hash::blocks(hash::root("", ""), &[1, 2, 3, 4, 5, 6], 2);
    let changes = store(&mut view, stored(&[11, 12], None, &[1, 2, 3, 4]));
    assert_eq!(changes, [Change::Stored(gpu(&names[..2]))]);
    let changes = store(&mut view, stored(&[13], Some(12), &[5, 6]));
    assert_eq!(changes, [Change::Stored(gpu(&names[2..]))]);
    assert_eq!(view.len(), 3);
}

#[test]
fn adapters_salts_and_media_are_part_of_a_name() {
    let root = hash::root("adapter", "salt");
    let media = |offset| Media {
        id: "image",
        offset,
    };
    let first = hash::chain(root, &[1, 2], &[media(1)]);
    let second = hash::chain(first, &[3, 4], &[media(-1)]);
    let key = |offset| ExtraKey::Media {
        id: "image".to_owned(),
        offset,
    };
    let text = |text: &str| ExtraKey::Text(text.to_owned());
    let changes = store(
        &mut View::default(),
        Stored {
            lora: Some("adapter".to_owned()),
            extra_keys: vec![
                vec![text("adapter"), key(1), text("salt")],
                vec![text("adapter"), key(-1)],
            ],
            ..stored(&[11, 12], None, &[1, 2, 3, 4])
        },
    );
    assert_eq!(changes, [Change::Stored(gpu(&[first, second]))]);
    // A salt that is called as the adapter is one all the same.
    let same = Stored {
        lora: Some("x".to_owned()),
        extra_keys: vec![vec![text("x"), text("x")]],
        ..stored(&[11], None, &[1, 2])
    };
    let expected = hash::chain(hash::root("x", "x"), &[1, 2], &[]);
    let changes = store(&mut View::default(), same);
    assert_eq!(changes, [Change::Stored(gpu(&[expected]))]);
    // Embeddings make it another block than its placeholders alone would be.
    let embedded = Stored {
        extra_keys: vec![vec![ExtraKey::Digest(vec![7; 32])]],
        ..stored(&[11], None, &[0, 0])
    };
    let plain = hash::chain(hash::root("", ""), &[0, 0], &[]);
    assert_ne!(
        store(&mut View::default(), embedded),
        [Change::Stored(gpu(&[plain]))]
    );
}

#[test]
fn copies_are_counted_and_told_once() {
    let mut view = View::default();
    let twice = stored(&[11], None, &[1, 2]);
    assert_eq!(store(&mut view, twice.clone()).len(), 1);
    assert_eq!(store(&mut view, twice), []);
    assert_eq!(apply(&mut view, &removed(&[11])), []);
    assert_eq!(apply(&mut view, &removed(&[11, 99])).len(), 1);
    assert_eq!(apply(&mut view, &removed(&[11])), []);
    assert!(view.is_empty());
}

#[test]
fn a_tier_below_knows_blocks_by_the_engines_names() {
    let mut view = View::default();
    let names = hash::blocks(hash::root("", ""), &[1, 2, 3, 4], 2);
    store(&mut view, stored(&[11, 12], None, &[1, 2, 3, 4]));
    let below = |hash| Stored {
        hashes: vec![hash],
        place: Place {
            medium: Medium::Cpu,
            ..Place::default()
        },
        ..Stored::default()
    };
    let changes = store(&mut view, below(12));
    let cpu = Blocks {
        medium: Medium::Cpu,
        hashes: vec![names[1].0],
    };
    assert_eq!(changes, [Change::Stored(cpu.clone())]);
    assert_eq!(store(&mut view, below(99)), []);
    assert_eq!(view.orphans(), 1);
    // It stays there when the GPU lets go of it, and still has children.
    assert_eq!(apply(&mut view, &removed(&[12])).len(), 1);
    assert!(view.blocks().any(|blocks| blocks == cpu));
    assert_eq!(store(&mut view, stored(&[13], Some(12), &[5, 6])).len(), 1);
}

#[test]
fn only_the_group_that_needs_every_block_counts() {
    let mut view = View::default();
    let group = |group, spec| Stored {
        place: Place {
            group: Some(group),
            ..Place::default()
        },
        spec: Some(spec),
        ..stored(&[11], None, &[1, 2])
    };
    let gone = |group| {
        KvEvent::Removed(Removed {
            hashes: vec![11],
            place: Place {
                group: Some(group),
                ..Place::default()
            },
        })
    };
    assert_eq!(store(&mut view, group(0, Spec::Partial)), []);
    assert_eq!(store(&mut view, group(1, Spec::Full)).len(), 1);
    assert_eq!(store(&mut view, group(2, Spec::Full)), []);
    assert_eq!(apply(&mut view, &gone(0)), []);
    assert_eq!(apply(&mut view, &gone(2)), []);
    assert_eq!(apply(&mut view, &gone(1)).len(), 1);
}

#[test]
fn what_follows_an_unknown_block_is_left_out() {
    let mut view = View::default();
    assert_eq!(
        store(&mut view, stored(&[12, 13], Some(11), &[3, 4, 5, 6])),
        []
    );
    assert_eq!(view.orphans(), 2);
    // And what does not say its tokens right.
    assert_eq!(store(&mut view, stored(&[12], None, &[3, 4, 5])), []);
    assert_eq!(apply(&mut view, &KvEvent::Cleared), [Change::Cleared(None)]);
}
