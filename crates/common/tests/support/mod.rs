//! A card to register, and what a watch says of it.

use stator_common::{
    WorkerId,
    discovery::{Event, Watch},
};
pub(crate) use stator_testkit::card::card;
use stator_testkit::wait::PATIENCE;

pub(crate) fn put(worker: &str) -> Event {
    Event::Put(Box::new(card(worker)))
}

pub(crate) fn gone(worker: &str) -> Event {
    Event::Gone(WorkerId(worker.to_owned()))
}

pub(crate) async fn next(watch: &mut Watch) -> Event {
    let event = tokio::time::timeout(PATIENCE, watch.next()).await;
    event.expect("an event").expect("the watch goes on")
}
