//! Prompts that take long to tokenize.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use futures::future::try_join_all;

use super::{Bench, SHORT, kernel, say};
use crate::client::{Ask, Connection};
use crate::cpu::Cpu;
use crate::model;
use crate::prompts::Prompts;
use crate::table::{Figure, What};
use crate::topology::Topology;

/// Tokens of a long prompt, about.
const TOKENS: usize = 60_000;

/// Turns of a long conversation before its last.
const TURNS: usize = 40;

/// Prompts that are measured, and those sent before so that no first use of anything is.
const PROMPTS: usize = 100;
const FIRST: usize = 8;

/// Requests on the way at a time.
const AT_A_TIME: usize = 4;

impl Bench {
    /// New long prompts, and a long conversation that goes on.
    pub(super) async fn long_prompts(&self, topology: &Topology) -> anyhow::Result<Vec<Figure>> {
        say("prompts of 60k tokens");
        let mut prompts = Prompts::new(11);
        let words = (TOKENS as f64 / model::tokens_per_word(&self.model)?) as usize;
        // Made before they are needed, so that making them takes no CPU from what is measured.
        let new = |index| Ask::completion(&format!("{index} {}", prompts.text(words)), 1);
        let new: Vec<Ask> = (0..FIRST + PROMPTS).map(new).collect();
        let turns: Vec<String> = (0..TURNS).map(|_| prompts.text(words / TURNS)).collect();
        let chats = (0..PROMPTS).map(|_| {
            let mut turns = turns.clone();
            turns.push(prompts.text(SHORT));
            Ask::chat(&turns)
        });
        let chats: Vec<Ask> = chats.collect();
        let (first, new) = new.split_at(FIRST);
        self.send_all(topology, first).await?;
        let (rate, count, used) = self.send_all(topology, new).await?;
        let (chat_rate, chat_count, chat_used) = self.send_all(topology, &chats).await?;
        let note = format!("{count} prompts of {} KiB", new[0].len() / 1024);
        let chat_note = format!(
            "{chat_count} chats, {:.0} us of processor CPU each",
            chat_used.micros_each(chat_count)
        );
        Ok(vec![
            Figure::new(What::LongPrompts, rate, note),
            Figure::new(What::LongPromptCpu, used.micros_each(count), kernel(used)),
            Figure::new(What::LongConversation, chat_rate, chat_note),
        ])
    }

    /// Sends each request once, for as long as there is time: how many a second were answered, how
    /// many at all, and the processor's CPU.
    async fn send_all(
        &self,
        topology: &Topology,
        asks: &[Ask],
    ) -> anyhow::Result<(f64, usize, Cpu)> {
        let before = Cpu::of_all(&topology.processor())?;
        let next = Arc::new(AtomicUsize::new(0));
        let start = Instant::now();
        let end = start + self.options.window();
        let senders = (0..AT_A_TIME).map(|_| {
            let next = next.clone();
            async move {
                let mut connection = Connection::open(&topology.address).await?;
                let mut answered = 0;
                while Instant::now() < end
                    && let Some(ask) = asks.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    connection.ask(ask).await?;
                    answered += 1;
                }
                anyhow::Ok(answered)
            }
        });
        let answered: usize = try_join_all(senders).await?.into_iter().sum();
        let rate = answered as f64 / start.elapsed().as_secs_f64();
        let used = Cpu::of_all(&topology.processor())?.since(before);
        Ok((rate, answered, used))
    }
}
