//! A cache line of sixteen words: compares all of them at once, and asks memory for one before it is needed.
//!
//! All that is `unsafe` in the index is here. Other processors than x86-64 do the same, more slowly.

/// A cache line.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u32; 16]);

impl Line {
    /// Returns the words for which `word & mask == tag`, one bit each.
    #[inline]
    pub(super) fn hits(&self, mask: u32, tag: u32) -> u32 {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: every x86-64 processor has SSE2.
        unsafe {
            hits(&self.0, mask, tag)
        }
        #[cfg(not(target_arch = "x86_64"))]
        hits(&self.0, mask, tag)
    }

    /// Lets memory bring the line, and does not wait for it.
    #[inline]
    pub(super) fn fetch(&self) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: a hint that changes nothing, of an address that may be read.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.0.as_ptr().cast()) }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "sse2")]
fn hits(words: &[u32; 16], mask: u32, tag: u32) -> u32 {
    use std::arch::x86_64::{
        __m128i, _mm_and_si128, _mm_cmpeq_epi32, _mm_movemask_epi8, _mm_packs_epi16,
        _mm_packs_epi32, _mm_set1_epi32,
    };
    let [mask, tag] = [mask, tag].map(|word| _mm_set1_epi32(word.cast_signed()));
    let [a, b, c, d] = bytemuck::cast::<[u32; 16], [__m128i; 4]>(*words)
        .map(|four| _mm_cmpeq_epi32(_mm_and_si128(four, mask), tag));
    // Each comparison's result, from four bytes to one.
    let all = _mm_packs_epi16(_mm_packs_epi32(a, b), _mm_packs_epi32(c, d));
    _mm_movemask_epi8(all).cast_unsigned()
}

#[cfg(not(target_arch = "x86_64"))]
fn hits(words: &[u32; 16], mask: u32, tag: u32) -> u32 {
    let hit = |slot: usize| u32::from(words[slot] & mask == tag) << slot;
    (0..words.len()).map(hit).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn all_words_that_agree_where_the_mask_says_so_are_found(
            words in prop::array::uniform16(0..4_u32), mask in 0..4_u32, tag in 0..4_u32, shift in 0..31_u32,
        ) {
            let line = Line(words.map(|word| word << shift));
            let each = (0..16).map(|slot| u32::from(words[slot] & mask == tag) << slot);
            prop_assert_eq!(line.hits(mask << shift, tag << shift), each.sum::<u32>());
        }
    }
}
