//! Names of KV blocks: what the router and whoever tells it what caches hold must compute alike.
//!
//! A block's hash covers its tokens and every block before it, so equal hashes mean equal prefixes. The chain starts
//! at a [`root`] that stands for what makes equal tokens different KV: the adapter and the cache salt. Engines
//! name blocks by hashes of their own; since their events carry the tokens, these need not agree with those.

use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

/// The name of a KV block and of everything before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockHash(pub u64);

/// An image, or other media, whose embedding takes the place of tokens in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Media<'a> {
    /// The content's identifier, as the engine has it (`mm_hash` in vLLM).
    pub id: &'a str,
    /// Where the media begins, in tokens, relative to the block's first token; negative if in a block before.
    pub offset: i64,
}

/// Returns where the chain of a prompt begins.
///
/// - `lora`: name of the adapter; empty: the base model.
/// - `cache_salt`: empty: the cache is shared.
pub fn root(lora: &str, cache_salt: &str) -> BlockHash {
    if lora.is_empty() && cache_salt.is_empty() {
        return BlockHash(0);
    }
    let mut state = Xxh3::new();
    // The length keeps ("ab", "c") and ("a", "bc") apart.
    state.update(&(lora.len() as u64).to_le_bytes());
    state.update(lora.as_bytes());
    state.update(cache_salt.as_bytes());
    BlockHash(state.digest())
}

/// Returns the hash of the block with these tokens after `parent`, which is the block before or the [`root`].
///
/// - `tokens`: the ids of one full block.
/// - `media`: what stands in for some of the tokens, in the order of the prompt; mostly nothing.
pub fn chain(parent: BlockHash, tokens: &[u32], media: &[Media<'_>]) -> BlockHash {
    if cfg!(target_endian = "little") && media.is_empty() {
        // One pass over the memory as it is; the copy below costs more than the hash.
        let bytes: &[u8] = bytemuck::cast_slice(tokens);
        return BlockHash(xxh3_64_with_seed(bytes, parent.0));
    }
    let mut bytes: Vec<u8> = tokens
        .iter()
        .flat_map(|token| token.to_le_bytes())
        .collect();
    for one in media {
        bytes.extend_from_slice(&(one.id.len() as u64).to_le_bytes());
        bytes.extend_from_slice(one.id.as_bytes());
        bytes.extend_from_slice(&one.offset.to_le_bytes());
    }
    BlockHash(xxh3_64_with_seed(&bytes, parent.0))
}

/// Returns the hashes of the full blocks of a prompt without media; a trailing partial block has none.
///
/// - `tokens`: `[n]` ids as the engine sees them, after the chat template.
/// - `block_size`: tokens per block, not zero.
/// - result: `[n / block_size]`.
pub fn blocks(root: BlockHash, tokens: &[u32], block_size: usize) -> Vec<BlockHash> {
    let mut parent = root;
    tokens
        .chunks_exact(block_size)
        .map(|block| {
            parent = chain(parent, block, &[]);
            parent
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_prefixes_have_equal_hashes_and_others_do_not() {
        let root = root("", "");
        let first = blocks(root, &[1, 2, 3, 4, 5, 6, 7], 2);
        let second = blocks(root, &[1, 2, 3, 4, 9, 9], 2);
        assert_eq!(first.len(), 3);
        assert_eq!(first[..2], second[..2]);
        assert_ne!(first[2], second[2]);
        // The same tokens after something else.
        assert_ne!(blocks(root, &[5, 6], 2)[0], first[2]);
    }

    #[test]
    fn adapters_salts_and_media_keep_equal_tokens_apart() {
        let tokens = [1, 2, 3, 4];
        let media = |id, offset| chain(root("", ""), &tokens, &[Media { id, offset }]);
        let hashes = [
            chain(root("", ""), &tokens, &[]),
            chain(root("a", ""), &tokens, &[]),
            chain(root("", "a"), &tokens, &[]),
            chain(root("ab", "c"), &tokens, &[]),
            chain(root("a", "bc"), &tokens, &[]),
            media("x", 0),
            media("x", 1),
            media("y", 0),
        ];
        for (i, hash) in hashes.iter().enumerate() {
            assert!(!hashes[..i].contains(hash), "{i}");
        }
    }

    #[test]
    fn values_are_the_same_on_every_machine_and_in_every_version() {
        let root = root("adapter", "salt");
        let long: Vec<u32> = (0..128).collect();
        let values = [
            root.0,
            chain(root, &[1, 2, 3, 4], &[]).0,
            chain(root, &long, &[]).0,
            chain(
                root,
                &[1],
                &[Media {
                    id: "m",
                    offset: -3,
                }],
            )
            .0,
        ];
        assert_eq!(values, GOLDEN, "{values:#x?}");
    }

    // Written by the first version; cards and events of other versions carry such values.
    const GOLDEN: [u64; 4] = [
        1272593289172363365,
        5021200728551468179,
        9940979753046044067,
        10814488714833694980,
    ];
}
