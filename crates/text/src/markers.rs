//! Keeps markers whole that arrive in pieces.
//!
//! Parsers look for markers (`</think>`) in the text that they are given, and some only recognise one that begins
//! with a piece of text or lies within it. Deltas end anywhere, so the start of a marker is held until the rest
//! of it is there.

/// Holds back what may be the start of a marker.
#[derive(Debug)]
pub(crate) struct Guard {
    markers: Vec<&'static str>,
    held: String,
}

impl Guard {
    pub(crate) fn new(markers: Vec<&'static str>) -> Self {
        Self {
            markers,
            held: String::new(),
        }
    }

    /// Returns the text that does not end inside a marker.
    pub(crate) fn push(&mut self, text: &str) -> String {
        let mut all = std::mem::take(&mut self.held);
        all.push_str(text);
        let cut = self
            .markers
            .iter()
            .map(|marker| all.len() - overlap(&all, marker))
            .min();
        if let Some(cut) = cut {
            self.held = all.split_off(cut);
        }
        all
    }

    /// Returns what is held: no marker after all.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Returns the bytes at the end of `text` that begin `marker`, without being all of it.
fn overlap(text: &str, marker: &str) -> usize {
    (1..marker.len().min(text.len() + 1))
        .rev()
        .find(|len| marker.is_char_boundary(*len) && text.ends_with(&marker[..*len]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_never_arrives_in_pieces() {
        let mut guard = Guard::new(vec!["<think>", "</think>"]);
        let pieces = ["a <", "b <t", "hink>c</", "thin", "k> d <thi"].map(|text| guard.push(text));
        assert_eq!(pieces, ["a ", "<b ", "<think>c", "", "</think> d "]);
        assert_eq!(guard.finish(), "<thi");
    }
}
