//! `stator-router`.

use stator_router::BlockHash;
use stator_router::index::{self, LANES, Matches, Target};

use crate::corpus::{Event, Prompt, What};

pub struct Ours {
    index: index::Index,
    targets: Vec<Target>,
    matches: Matches,
}

pub struct Prepared {
    target: Target,
    hashes: Vec<BlockHash>,
    stored: bool,
}

impl crate::Index for Ours {
    type Event = Prepared;

    fn new(workers: usize) -> Self {
        let index = index::Index::new(LANES, 12345);
        Self {
            targets: (0..workers).map(|_| index.join()).collect(),
            index,
            matches: Matches::default(),
        }
    }

    fn event(&self, event: &Event) -> Prepared {
        let (What::Store { blocks, .. } | What::Remove { blocks }) = &event.what;
        Prepared {
            target: self.targets[event.worker],
            hashes: blocks.iter().map(|block| BlockHash(block.ours)).collect(),
            stored: matches!(event.what, What::Store { .. }),
        }
    }

    fn apply(&mut self, event: Prepared) {
        if event.stored {
            self.index.insert(event.target, &event.hashes);
        } else {
            self.index.remove(event.target, &event.hashes);
        }
    }

    fn look(&mut self, prompt: &Prompt) -> (usize, u32) {
        self.index.matches(&prompt.ours, &mut self.matches);
        let deepest = self.matches.iter().map(|(_, blocks)| blocks).max();
        (self.matches.iter().len(), deepest.unwrap_or(0))
    }
}
