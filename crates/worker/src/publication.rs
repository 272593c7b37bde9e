//! Makes a worker known while it has an engine, and takes it back while it has none.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use stator_common::{
    WorkerId,
    card::Role,
    discovery::{Discovery, Registration},
};
use stator_engine::Engine;
use tokio::time;
use tracing::{info, warn};

use crate::{
    adapters::Adapter, card, config::Config, files::Files, handler::Serving, kv_events::KvEvents,
    transfer::Transfer,
};

/// The wait before a worker that was known once tries to become known again; it doubles up to
/// [`REGISTER_AGAIN_MOST`].
const REGISTER_AGAIN_FIRST: Duration = Duration::from_millis(500);

/// The longest wait: the engine is loaded and idle meanwhile.
const REGISTER_AGAIN_MOST: Duration = Duration::from_secs(15);

/// Makes a worker known while it has an engine.
pub(crate) struct Publication<'a> {
    pub(crate) config: &'a Config,
    pub(crate) role: Role,
    pub(crate) transfer: &'a Transfer,
    pub(crate) kv_events: &'a KvEvents,
    pub(crate) id: &'a WorkerId,
    pub(crate) address: &'a str,
    pub(crate) discovery: &'a dyn Discovery,
    pub(crate) serving: &'a Serving,
}

impl Publication<'_> {
    /// Runs until it is dropped, which is leaving.
    ///
    /// # Errors
    /// The files of the model cannot be read, or the place of discovery cannot be written to, the first
    /// time. Later ones are tried for ever, as engines are.
    pub(crate) async fn run(&self) -> anyhow::Result<()> {
        let mut changed = self.serving.changed.clone();
        let mut registration: Option<Registration> = None;
        let mut complete = false;
        let mut was_known = false;
        let mut wait = REGISTER_AGAIN_FIRST;
        loop {
            changed.borrow_and_update();
            let engines: Vec<Engine> = self
                .serving
                .active()
                .map(|active| active.engine.clone())
                .collect();
            self.kv_events.listen(self.id, self.serving);
            complete |= engines.len() == self.serving.ranks.len();
            if engines.is_empty() {
                if registration.take().is_some() {
                    warn!("no engine: left discovery");
                }
            } else if complete && registration.is_none() {
                match self.register(&engines).await {
                    Ok(registered) => {
                        registration = Some(registered);
                        was_known = true;
                        wait = REGISTER_AGAIN_FIRST;
                    }
                    Err(error) if !was_known => return Err(error),
                    Err(error) => {
                        let wait_s = wait.as_secs_f32();
                        warn!(error = format!("{error:#}"), wait_s, "not in discovery");
                        // A change of the engines need not wait.
                        let _ = time::timeout(wait, changed.changed()).await;
                        wait = (wait * 2).min(REGISTER_AGAIN_MOST);
                        continue;
                    }
                }
            }
            if changed.changed().await.is_err() {
                return Ok(());
            }
        }
    }

    async fn register(&self, engines: &[Engine]) -> anyhow::Result<Registration> {
        let config = self.config;
        let folder = engines
            .first()
            .and_then(|engine| engine.info().model.clone());
        let files = Files::read(
            &config.model,
            folder.as_deref(),
            config.chat_template.as_deref(),
            &config.engine_args,
        )
        .context("read the model's files")?;
        let mut card = card::describe(config, self.role, self.id, self.address, engines, &files)
            .context("describe a worker without engines")?;
        card.adapters = self.serving.adapters.iter().map(Adapter::card).collect();
        card.handoff = self.transfer.card(&config.engine_args);
        card.kv_events = self.kv_events.card(self.serving);
        *self.serving.files.lock() = Arc::new(files);
        let (place, names) = (card.endpoint.to_string(), card.model.names.join(", "));
        let registration = self
            .discovery
            .register(card)
            .await
            .context("make the worker known")?;
        info!(worker = %self.id, place, model = names, adapters = self.serving.adapters.len(), address = self.address, "ready");
        Ok(registration)
    }
}
