//! The one task that owns the outlet: publishes what keepers tell, hands questions to them and their answers back.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use prost::Message;
use stator_common::{
    WorkerId,
    events::{
        ViewId,
        plane::{Asker, Outlet, Question},
    },
    proto::kv,
};
use tokio::sync::mpsc;
use tracing::warn;

use crate::keeper::{Ask, unknown};

/// What leaves a relay.
pub(crate) enum Outgoing {
    News { topic: Arc<str>, news: Bytes },
    Answer { asker: Asker, answer: Bytes },
}

impl Outgoing {
    pub(crate) fn answer(asker: &Asker, part: &kv::SnapshotPart) -> Self {
        Self::Answer {
            asker: asker.clone(),
            answer: part.encode_to_vec().into(),
        }
    }
}

/// Where questions about a view go.
pub(crate) type Desks = Arc<Mutex<HashMap<ViewId, mpsc::Sender<Ask>>>>;

/// Runs until nobody has anything to tell.
pub(crate) async fn run(
    mut outlet: Box<dyn Outlet>,
    mut outgoing: mpsc::Receiver<Outgoing>,
    desks: Desks,
) {
    loop {
        tokio::select! {
            next = outgoing.recv() => match next {
                Some(Outgoing::News { topic, news }) => outlet.publish(&topic, news).await,
                Some(Outgoing::Answer { asker, answer }) => outlet.answer(&asker, answer).await,
                None => return,
            },
            question = outlet.asked() => match question {
                Ok(question) => {
                    if let Some((asker, answer)) = route(question, &desks) {
                        outlet.answer(&asker, answer.encode_to_vec().into()).await;
                    }
                }
                Err(error) => {
                    warn!(%error, "no questions can be asked any more");
                    return;
                }
            },
        }
    }
}

/// Hands a question to who keeps the view. Returns the answer where nobody does.
fn route(question: Question, desks: &Desks) -> Option<(Asker, kv::SnapshotPart)> {
    let Question { asker, question } = question;
    let request = kv::SnapshotRequest::decode(question)
        .inspect_err(|error| warn!(%error, "a question cannot be read"))
        .ok()?;
    let view = ViewId {
        worker: WorkerId(request.worker),
        dp_rank: request.dp_rank,
    };
    let desk = desks.lock().get(&view).cloned();
    let ask = Ask {
        asker: asker.clone(),
        number: request.number,
    };
    match desk.map(|desk| desk.try_send(ask)) {
        Some(Ok(())) => None,
        // Too many ask at once, or none keeps it: ask again.
        Some(Err(_)) | None => Some((asker, unknown(&view.worker.0, view.dp_rank, request.number))),
    }
}
