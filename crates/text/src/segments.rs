//! Remembers the tokens of text segments, so that the turns of a conversation are tokenized once.
//!
//! A tokenizer cuts its input at the added tokens (`<|im_start|>`) before it does anything else, and
//! works on each piece alone. So a chat prompt is a list of pieces with fixed tokens in between, and the next
//! request of the same conversation repeats all pieces but the last. The pieces' ids are kept by a hash
//! of their text, least recently used out first.
//!
//! This is exact, not an approximation, under conditions that [`Segmenter::new`] checks; where one fails,
//! there is no segmenter and texts are encoded whole:
//! - added tokens that match before normalization have no `lstrip`, `rstrip` or `single_word`, so a cut
//!   depends on the token's own text only;
//! - no pre-tokenizer looks at where in the input a piece stands (`Metaspace` with `prepend_scheme: first` does);
//! - the model is deterministic (no BPE dropout).

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, Mutex, PoisonError};

use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::pre_tokenizers::metaspace::PrependScheme;
use tokenizers::{ModelWrapper, PreTokenizerWrapper, Tokenizer as HfTokenizer};
use xxhash_rust::xxh3::xxh3_128_with_seed;

/// How much a tokenizer may remember.
#[derive(Clone, Copy, Debug)]
pub struct SegmentCache {
    /// Bytes that remembered segments may take, bookkeeping included. 0 remembers nothing.
    pub bytes: usize,
    /// Seed of the hash that names a segment. It should be random and secret: whoever knows it could
    /// make a text whose tokens are taken for another's.
    pub seed: u64,
}

/// Bytes of bookkeeping per remembered segment: key and links in the map and the list, the `Arc`'s header, and
/// the map's spare room.
const ENTRY_OVERHEAD: usize = 128;

/// A piece of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Segment<'a> {
    /// An added token.
    Token(u32),
    /// Text between added tokens, never empty.
    Text(&'a str),
}

/// Cuts texts as the tokenizer does.
#[derive(Debug)]
pub(crate) struct Segmenter {
    /// `None` if there are no added tokens to cut at.
    matcher: Option<AhoCorasick>,
    /// Ids by pattern.
    ids: Vec<u32>,
}

impl Segmenter {
    /// Returns a segmenter if cutting is exact for this tokenizer.
    pub(crate) fn new(tokenizer: &HfTokenizer) -> Option<Self> {
        let deterministic =
            !matches!(tokenizer.get_model(), ModelWrapper::BPE(bpe) if bpe.dropout.is_some());
        let position_blind = tokenizer.get_pre_tokenizer().is_none_or(is_position_blind);
        if !deterministic || !position_blind || tokenizer.get_encode_special_tokens() {
            return None;
        }
        let mut patterns = Vec::new();
        let mut ids = Vec::new();
        for (id, token) in tokenizer.get_added_vocabulary().get_added_tokens_decoder() {
            if token.normalized {
                // Matched within a piece, after its normalization; not a place to cut.
                continue;
            }
            if token.lstrip || token.rstrip || token.single_word {
                return None;
            }
            patterns.push(token.content.as_str());
            ids.push(*id);
        }
        let matcher = match patterns.is_empty() {
            true => None,
            false => Some(
                AhoCorasick::builder()
                    .match_kind(MatchKind::LeftmostLongest)
                    .build(patterns)
                    .ok()?,
            ),
        };
        Some(Self { matcher, ids })
    }

    /// Returns the pieces of `text`, in order.
    pub(crate) fn cut<'a>(&'a self, text: &'a str) -> Vec<Segment<'a>> {
        let mut segments = Vec::new();
        let mut end = 0;
        if let Some(matcher) = &self.matcher {
            for found in matcher.find_iter(text) {
                if end < found.start() {
                    segments.push(Segment::Text(&text[end..found.start()]));
                }
                segments.push(Segment::Token(self.ids[found.pattern().as_usize()]));
                end = found.end();
            }
        }
        if end < text.len() {
            segments.push(Segment::Text(&text[end..]));
        }
        segments
    }
}

fn is_position_blind(pre_tokenizer: &PreTokenizerWrapper) -> bool {
    match pre_tokenizer {
        PreTokenizerWrapper::Metaspace(metaspace) => {
            metaspace.get_prepend_scheme() != PrependScheme::First
        }
        PreTokenizerWrapper::Sequence(sequence) => sequence.as_ref().iter().all(is_position_blind),
        PreTokenizerWrapper::BertPreTokenizer(_)
        | PreTokenizerWrapper::ByteLevel(_)
        | PreTokenizerWrapper::Delimiter(_)
        | PreTokenizerWrapper::Whitespace(_)
        | PreTokenizerWrapper::Split(_)
        | PreTokenizerWrapper::Punctuation(_)
        | PreTokenizerWrapper::WhitespaceSplit(_)
        | PreTokenizerWrapper::Digits(_)
        | PreTokenizerWrapper::UnicodeScripts(_)
        | PreTokenizerWrapper::FixedLength(_) => true,
    }
}

/// The remembered segments: a map into a doubly linked list, most recently used first.
#[derive(Debug)]
pub(crate) struct Remembered {
    seed: u64,
    capacity: usize,
    lru: Mutex<Lru>,
}

impl Remembered {
    pub(crate) fn new(config: SegmentCache) -> Self {
        Self {
            seed: config.seed,
            capacity: config.bytes,
            lru: Mutex::default(),
        }
    }

    /// Returns the name of a segment.
    pub(crate) fn key(&self, text: &str) -> u128 {
        xxh3_128_with_seed(text.as_bytes(), self.seed)
    }

    /// Looks up several segments under one lock.
    pub(crate) fn get(&self, keys: &[u128]) -> Vec<Option<Arc<[u32]>>> {
        let mut lru = self.lru.lock().unwrap_or_else(PoisonError::into_inner);
        keys.iter().map(|key| lru.get(*key)).collect()
    }

    /// Remembers segments, and forgets the least recently used ones that no longer fit.
    pub(crate) fn put(&self, segments: Vec<(u128, Arc<[u32]>)>) {
        let mut lru = self.lru.lock().unwrap_or_else(PoisonError::into_inner);
        for (key, ids) in segments {
            // One that takes more than a quarter would push out everything else.
            if cost(&ids) <= self.capacity / 4 {
                lru.put(key, ids);
                lru.shrink_to(self.capacity);
            }
        }
    }

    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        self.lru.lock().unwrap().bytes
    }
}

fn cost(ids: &[u32]) -> usize {
    size_of_val(ids) + ENTRY_OVERHEAD
}

/// "No entry" in the list's links.
const NIL: u32 = u32::MAX;

#[derive(Debug)]
struct Lru {
    index: HashMap<u128, u32, BuildHasherDefault<KeyIsHash>>,
    entries: Vec<LruEntry>,
    /// Slots of `entries` that are not in use.
    free: Vec<u32>,
    newest: u32,
    oldest: u32,
    bytes: usize,
}

impl Default for Lru {
    fn default() -> Self {
        Self {
            index: HashMap::default(),
            entries: Vec::new(),
            free: Vec::new(),
            newest: NIL,
            oldest: NIL,
            bytes: 0,
        }
    }
}

#[derive(Debug)]
struct LruEntry {
    key: u128,
    ids: Arc<[u32]>,
    newer: u32,
    older: u32,
}

impl Lru {
    fn get(&mut self, key: u128) -> Option<Arc<[u32]>> {
        let slot = *self.index.get(&key)?;
        if slot != self.newest {
            self.unlink(slot);
            self.link_newest(slot);
        }
        Some(Arc::clone(&self.entries[slot as usize].ids))
    }

    fn put(&mut self, key: u128, ids: Arc<[u32]>) {
        if self.index.contains_key(&key) {
            return;
        }
        self.bytes += cost(&ids);
        let entry = LruEntry {
            key,
            ids,
            newer: NIL,
            older: NIL,
        };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.entries[slot as usize] = entry;
                slot
            }
            None => {
                self.entries.push(entry);
                (self.entries.len() - 1) as u32
            }
        };
        self.index.insert(key, slot);
        self.link_newest(slot);
    }

    fn shrink_to(&mut self, capacity: usize) {
        while self.bytes > capacity && self.oldest != NIL {
            let slot = self.oldest;
            self.unlink(slot);
            let entry = &mut self.entries[slot as usize];
            self.bytes -= cost(&entry.ids);
            entry.ids = Arc::default();
            self.index.remove(&entry.key);
            self.free.push(slot);
        }
    }

    fn unlink(&mut self, slot: u32) {
        let (newer, older) = (
            self.entries[slot as usize].newer,
            self.entries[slot as usize].older,
        );
        match newer {
            NIL => self.newest = older,
            newer => self.entries[newer as usize].older = older,
        }
        match older {
            NIL => self.oldest = newer,
            older => self.entries[older as usize].newer = newer,
        }
    }

    fn link_newest(&mut self, slot: u32) {
        let older = std::mem::replace(&mut self.newest, slot);
        let entry = &mut self.entries[slot as usize];
        (entry.newer, entry.older) = (NIL, older);
        match older {
            NIL => self.oldest = slot,
            older => self.entries[older as usize].newer = slot,
        }
    }
}

/// The keys are seeded hashes already; hashing them again would add nothing.
#[derive(Debug, Default)]
struct KeyIsHash(u64);

impl Hasher for KeyIsHash {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _bytes: &[u8]) {
        unreachable!("keys are u128")
    }

    fn write_u128(&mut self, key: u128) {
        self.0 = key as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(n: usize) -> Arc<[u32]> {
        vec![7; n].into()
    }

    #[test]
    fn the_least_recently_used_segment_is_forgotten_first() {
        let room_for_four = 4 * cost(&ids(8));
        let cache = Remembered::new(SegmentCache {
            bytes: room_for_four,
            seed: 1,
        });
        cache.put((0..4).map(|key| (key, ids(8))).collect());
        assert!(cache.get(&[0])[0].is_some());
        cache.put(vec![(4, ids(8))]);
        let found: Vec<bool> = cache
            .get(&[0, 1, 2, 3, 4])
            .iter()
            .map(Option::is_some)
            .collect();
        assert_eq!(found, [true, false, true, true, true]);
    }

    #[test]
    fn the_bound_in_bytes_holds_whatever_comes_and_goes() {
        let cache = Remembered::new(SegmentCache {
            bytes: 10_000,
            seed: 1,
        });
        for round in 0..2_000_u128 {
            cache.put(vec![(round, ids((round % 97) as usize))]);
            cache.get(&[round / 2, round / 3]);
            assert!(cache.bytes() <= 10_000);
        }
        cache.put(vec![(1 << 90, ids(3_000))]);
        assert!(
            cache.get(&[1 << 90])[0].is_none(),
            "one segment may not take all the room"
        );
        assert!(cache.get(&[1_999])[0].is_some());
    }
}
