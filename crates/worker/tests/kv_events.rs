//! Who tells what a worker's engines cache, with simulated engines: the worker itself, or the relay of the machine.

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use stator_common::{
    Card,
    card::Role,
    discovery::{Discovery, mem::Mem},
    drain,
    events::{
        Change, Events, Follower, ViewId,
        follower::{Patience, Update},
    },
    nats::Nats,
    telemetry::Telemetry,
};
use stator_kv_relay::{config, node::Node};
use stator_router::hash;
use stator_testkit::{
    client::{outcome, request},
    ports,
    wait::PATIENCE,
};
use stator_worker::cli::KvRelay;
use support::Cluster;

const BLOCK: u32 = 32;

/// An engine's flags that publish from this port on.
fn publishing(port: u16) -> String {
    format!(
        "--sim-speedup 0 --block-size {BLOCK} --kv-events-config {{\"enable_kv_cache_events\":true,\
         \"endpoint\":\"tcp://*:{port}\",\"replay_endpoint\":\"tcp://*:{}\"}}",
        port + 1
    )
}

fn view(card: &Card, dp_rank: u32) -> ViewId {
    ViewId {
        worker: card.worker.clone(),
        dp_rank,
    }
}

/// What was heard, of all views.
struct Heard {
    _follower: Follower,
    events: Events,
    known: BTreeMap<ViewId, BTreeSet<u64>>,
}

fn follow(card: &Card) -> Heard {
    let (follower, events) = Follower::new(Patience::default(), Nats::default());
    let relay = card.kv_events.as_ref().expect("events").relay.as_ref();
    follower.follow(&card.worker, card.model.dp_size, relay.expect("a relay"));
    Heard {
        _follower: follower,
        events,
        known: BTreeMap::new(),
    }
}

impl Heard {
    /// Waits until a view is known to hold exactly these blocks.
    async fn until(&mut self, view: &ViewId, wanted: &BTreeSet<u64>) {
        while self.known.get(view) != Some(wanted) {
            let event = tokio::time::timeout(PATIENCE, self.events.next()).await;
            let event = event.expect("news in time").expect("a follower");
            match event.update {
                Update::Reset { blocks, .. } => {
                    let hashes = blocks.into_iter().flat_map(|b| b.hashes).collect();
                    self.known.insert(event.view, hashes);
                }
                Update::Changed(Change::Stored(blocks)) => {
                    let known = self.known.get_mut(&event.view).expect("a reset before");
                    known.extend(blocks.hashes);
                }
                Update::Lost => drop(self.known.remove(&event.view)),
                other => panic!("{other:?}"),
            }
        }
    }
}

fn names(prompt: std::ops::Range<u32>) -> BTreeSet<u64> {
    let tokens: Vec<u32> = prompt.collect();
    let names = hash::blocks(hash::root("", ""), &tokens, BLOCK as usize);
    names.into_iter().map(|name| name.0).collect()
}

#[tokio::test]
async fn a_worker_tells_what_each_of_its_engines_caches() {
    let mut cluster = Cluster::start(|config| {
        config.kv_relay = KvRelay::Embedded;
        config.data_parallel_size = 2;
    })
    .await;
    let port = ports::free_row(4);
    let _first = cluster.engine(0, &publishing(port));
    let second = cluster.engine(1, &publishing(port + 2));
    let card = cluster.card().await;
    let told = card.kv_events.as_ref().expect("events");
    assert!(told.engines.is_empty(), "{told:?}");
    let client = cluster.client().await;
    let mut heard = follow(&card);
    for rank in 0..2 {
        let mut prompt = request(100 * rank..100 * rank + 70, 1);
        prompt.dp_rank = Some(rank);
        assert_eq!(outcome(&client, &prompt).await.error, None);
        let wanted = names(100 * rank..100 * rank + 70);
        heard.until(&view(&card, rank), &wanted).await;
    }
    // An engine that is another one has nothing.
    second.kill();
    let _third = cluster.engine(1, &publishing(port + 2));
    heard.until(&view(&card, 1), &BTreeSet::new()).await;
    cluster.trigger.drain();
    cluster.ended().await;
}

#[tokio::test]
async fn the_relay_of_a_machine_finds_engines_by_their_workers_cards() {
    let discovery = Mem::default();
    let port = ports::free_row(4);
    let relay = port + 2;
    let mut cluster = Cluster::start_as(Role::Agg, discovery.clone(), |config| {
        config.kv_relay = KvRelay::Node;
        config.kv_relay_address = Some(format!("127.0.0.1:{relay}"));
    })
    .await;
    let _engine = cluster.engine(0, &publishing(port));
    let card = cluster.card().await;
    let told = card.kv_events.as_ref().expect("events");
    assert_eq!(told.engines[0].endpoint, format!("tcp://127.0.0.1:{port}"));
    let client = cluster.client().await;
    assert_eq!(outcome(&client, &request(1..70, 1)).await.error, None);
    let mut heard = follow(&card);

    let config = config::Config {
        port: relay,
        ..config::Config::default()
    };
    let discovery: Arc<dyn Discovery> = Arc::new(discovery);
    let (trigger, drain) = drain::channel();
    let node = Node::bind(&config, discovery).await.expect("bind");
    let served = tokio::spawn(node.serve(Telemetry::detached(), drain));
    heard.until(&view(&card, 0), &names(1..70)).await;
    trigger.drain();
    served.await.expect("no panic").expect("a clean end");
    cluster.trigger.drain();
    cluster.ended().await;
}

#[tokio::test]
async fn an_engine_that_publishes_nothing_is_nobodys_view() {
    let mut cluster = Cluster::start(|config| config.kv_relay = KvRelay::Off).await;
    let _engine = cluster.engine(0, "--sim-speedup 0");
    assert_eq!(cluster.card().await.kv_events, None);
    cluster.trigger.drain();
    cluster.ended().await;
}
