//! What one engine's cache holds, by our names of blocks. Pure.
//!
//! An engine tells of copies: a block that two requests computed at once is stored twice and removed twice. Here copies
//! are counted, and what comes out is told once. Of a model with several kinds of attention only the group counts that
//! needs every block of a prefix; the others lose blocks that a prefix does not need.

use ahash::AHashMap;
use stator_common::events::{Blocks, Change, Medium};
use stator_engine::kv_events::{ExtraKey, KvEvent, Place, Removed, Spec, Stored};
use stator_router::hash::{self, BlockHash, Media};

/// Media there are.
const MEDIA: [Medium; 3] = [Medium::Gpu, Medium::Cpu, Medium::Storage];

/// Copies of a block, per medium.
type Copies = [u32; MEDIA.len()];

/// One engine's cache.
#[derive(Debug, Default)]
pub struct View {
    /// By the engine's names.
    blocks: AHashMap<u64, Block>,
    /// Copies by our names: two of the engine's may be one of ours.
    held: AHashMap<u64, Copies>,
    /// The group that counts, once one is known.
    group: Option<u32>,
    /// Blocks whose place in a prefix is not known, since the block before them is not.
    orphans: u64,
}

#[derive(Debug)]
struct Block {
    name: BlockHash,
    copies: Copies,
}

impl View {
    /// Takes an event, and tells what it changes.
    pub fn apply(&mut self, event: &KvEvent, changes: &mut impl FnMut(Change)) {
        match event {
            KvEvent::Stored(stored) => self.stored(stored, changes),
            KvEvent::Removed(removed) => self.removed(removed, changes),
            KvEvent::Cleared => {
                self.clear();
                changes(Change::Cleared(None));
            }
        }
    }

    /// Forgets every block.
    pub fn clear(&mut self) {
        self.blocks.clear();
        self.held.clear();
    }

    /// Returns all blocks, by medium; each once.
    pub fn blocks(&self) -> impl Iterator<Item = Blocks> + '_ {
        MEDIA.into_iter().enumerate().map(|(at, medium)| Blocks {
            medium,
            hashes: self
                .held
                .iter()
                .filter(|(_, copies)| copies[at] > 0)
                .map(|(name, _)| *name)
                .collect(),
        })
    }

    /// Returns how many blocks there are on any medium.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Says whether there are none.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Returns how many blocks could not be placed, since this view began.
    pub fn orphans(&self) -> u64 {
        self.orphans
    }

    fn stored(&mut self, stored: &Stored, changes: &mut impl FnMut(Change)) {
        if stored.spec == Some(Spec::Partial) || !self.counts(&stored.place, true) {
            return;
        }
        let names = self.names(stored);
        self.orphans += (stored.hashes.len() - names.len()) as u64;
        let at = index(stored.place.medium);
        let mut new = Vec::new();
        for (engine, name) in names {
            let block = self.blocks.entry(engine).or_insert(Block {
                name,
                copies: Copies::default(),
            });
            block.copies[at] += 1;
            let held = self.held.entry(name.0).or_default();
            held[at] += 1;
            if held[at] == 1 {
                new.push(name.0);
            }
        }
        if !new.is_empty() {
            changes(Change::Stored(Blocks {
                medium: stored.place.medium,
                hashes: new,
            }));
        }
    }

    /// Names blocks, up to the first that has no known place. Known ones keep their names: tiers below the GPU do
    /// not always say what a block holds.
    fn names(&self, stored: &Stored) -> Vec<(u64, BlockHash)> {
        let size = stored.block_size as usize;
        let described = size > 0 && stored.tokens.len() == size * stored.hashes.len();
        let mut parent = match stored.parent {
            None => described.then(|| root(stored)),
            Some(parent) => self.blocks.get(&parent).map(|block| block.name),
        };
        let mut names = Vec::with_capacity(stored.hashes.len());
        for (number, engine) in stored.hashes.iter().enumerate() {
            let known = self.blocks.get(engine).map(|block| block.name);
            let computed = || {
                let tokens = &stored.tokens[number * size..(number + 1) * size];
                let keys = stored.extra_keys.get(number).map_or(&[][..], Vec::as_slice);
                let first = number == 0 && stored.parent.is_none();
                Some(name(parent?, tokens, keys, stored.lora.as_deref(), first))
            };
            match known.or_else(|| described.then(computed).flatten()) {
                Some(name) => {
                    names.push((*engine, name));
                    parent = Some(name);
                }
                // Without tokens, what follows may still be known.
                None if !described => {}
                None => break,
            }
        }
        names
    }

    fn removed(&mut self, removed: &Removed, changes: &mut impl FnMut(Change)) {
        if !self.counts(&removed.place, false) {
            return;
        }
        let at = index(removed.place.medium);
        let mut gone = Vec::new();
        for engine in &removed.hashes {
            let Some(block) = self.blocks.get_mut(engine) else {
                continue;
            };
            if block.copies[at] == 0 {
                continue;
            }
            block.copies[at] -= 1;
            let name = block.name.0;
            if block.copies == Copies::default() {
                self.blocks.remove(engine);
            }
            if let Some(held) = self.held.get_mut(&name) {
                held[at] -= 1;
                if held[at] == 0 {
                    gone.push(name);
                }
                if *held == Copies::default() {
                    self.held.remove(&name);
                }
            }
        }
        if !gone.is_empty() {
            changes(Change::Removed(Blocks {
                medium: removed.place.medium,
                hashes: gone,
            }));
        }
    }

    /// Says whether blocks at this place count.
    fn counts(&mut self, place: &Place, stored: bool) -> bool {
        if place.remote {
            return false;
        }
        match (self.group, place.group) {
            (_, None) => true,
            (Some(own), Some(group)) => own == group,
            (None, Some(group)) => {
                // The first that is stored into: groups come in order, and where several need all blocks, each
                // has them.
                if stored {
                    self.group = Some(group);
                }
                stored
            }
        }
    }
}

fn index(medium: Medium) -> usize {
    match medium {
        Medium::Gpu => 0,
        Medium::Cpu => 1,
        Medium::Storage => 2,
    }
}

/// Returns where the chain of a prompt begins whose first blocks these are.
fn root(stored: &Stored) -> BlockHash {
    let lora = stored.lora.as_deref().unwrap_or_default();
    let keys = stored.extra_keys.first().map_or(&[][..], Vec::as_slice);
    hash::root(lora, salt(keys, stored.lora.as_deref()).unwrap_or_default())
}

/// Returns the cache salt among the extra keys of a prompt's first block, which come in this order: adapter,
/// media, salt, embeddings.
fn salt<'a>(keys: &'a [ExtraKey], lora: Option<&str>) -> Option<&'a str> {
    texts(keys, lora).last()
}

/// Returns the texts among extra keys, without the adapter's name in front.
fn texts<'a>(keys: &'a [ExtraKey], lora: Option<&str>) -> impl Iterator<Item = &'a str> {
    let own =
        usize::from(matches!(keys.first(), Some(ExtraKey::Text(text)) if Some(&text[..]) == lora));
    keys[own..].iter().filter_map(|key| match key {
        ExtraKey::Text(text) => Some(&text[..]),
        ExtraKey::Media { .. } | ExtraKey::Digest(_) => None,
    })
}

fn name(
    parent: BlockHash,
    tokens: &[u32],
    keys: &[ExtraKey],
    lora: Option<&str>,
    first: bool,
) -> BlockHash {
    if keys.is_empty() {
        return hash::chain(parent, tokens, &[]);
    }
    // Adapter and salt are in the root.
    let salt = first.then(|| salt(keys, lora)).flatten();
    let digests: Vec<String> = keys
        .iter()
        .filter_map(|key| match key {
            ExtraKey::Digest(bytes) => {
                Some(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
            }
            ExtraKey::Media { .. } | ExtraKey::Text(_) => None,
        })
        .collect();
    let media = keys.iter().filter_map(|key| match key {
        ExtraKey::Media { id, offset } => Some(Media {
            id,
            offset: *offset,
        }),
        ExtraKey::Text(_) | ExtraKey::Digest(_) => None,
    });
    // What is not known here still makes another block.
    let others = texts(keys, lora)
        .filter(|text| Some(*text) != salt)
        .chain(digests.iter().map(String::as_str))
        .map(|id| Media { id, offset: 0 });
    let media: Vec<Media<'_>> = media.chain(others).collect();
    hash::chain(parent, tokens, &media)
}

#[cfg(test)]
mod tests;
