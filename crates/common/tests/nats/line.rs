//! The line of prompts at a real server: who gets a ticket, and what becomes of one that nobody sees to.

use std::time::Duration;

use stator_common::{
    WorkerId,
    nats::Nats,
    plane,
    tickets::{
        Answer, Invitation, LineError, LineName, Offer, Ticket,
        desk::{Desk, Guest, Heard, Unanswered},
        line::{Line, Pulls, Taken},
    },
};
use stator_testkit::{nats::NatsServer, wait::PAUSE};
use tokio::time::{sleep, timeout};

use super::settings;

struct Place {
    server: NatsServer,
    nats: Nats,
    name: LineName,
}

impl Place {
    async fn new() -> Option<Self> {
        let server = NatsServer::start_with_jetstream().await?;
        Some(Self {
            nats: Nats::new(settings(&server), "test"),
            name: LineName::new("ns", "org/model"),
            server,
        })
    }

    async fn line(&self) -> Line {
        Line::open(&self.nats, &self.name).await.expect("a line")
    }

    async fn worker(&self, name: &str) -> (WorkerId, Pulls) {
        let id = WorkerId(name.to_owned());
        let pulls = self.line().await.pulls(&id).await;
        (id, pulls.expect("a worker in line"))
    }
}

fn ticket(number: u64) -> Ticket {
    let desk = "stator.desk.test".to_owned();
    Ticket { desk, number }
}

async fn put(line: &Line, only: Option<&WorkerId>, number: u64) {
    let is_there = line.put(only, &ticket(number)).await.expect("it is sent");
    is_there.await.expect("it is there");
}

async fn next(pulls: &mut Pulls) -> Taken {
    loop {
        pulls.ask().await.expect("asked");
        if let Some(taken) = pulls.next().await.expect("known") {
            return taken;
        }
    }
}

fn number(taken: &Taken) -> u64 {
    taken.ticket().expect("one of ours").number
}

#[tokio::test]
async fn a_ticket_goes_to_one_worker_and_to_another_if_that_gives_it_back_or_forgets_it() {
    let Some(place) = Place::new().await else {
        return;
    };
    let line = place.line().await;
    let (_, mut first) = place.worker("w.1").await;
    let (_, mut second) = place.worker("w.2").await;
    for number in 1..=2 {
        put(&line, None, number).await;
    }
    let one = next(&mut first).await;
    let two = next(&mut second).await;
    assert_eq!((number(&one), number(&two)), (1, 2));
    two.done().await;
    one.back(None).await;
    let again = next(&mut second).await;
    assert_eq!(number(&again), 1);
    again.done().await;

    put(&line, None, 3).await;
    let forgotten = next(&mut first).await;
    assert_eq!(number(&forgotten), 3);
    drop(forgotten);
    let found = next(&mut second).await;
    assert_eq!(number(&found), 3);
    found.done().await;
    while line.tickets().await.expect("it is there") != 0 {
        sleep(PAUSE).await;
    }
}

#[tokio::test]
async fn a_worker_gets_its_own_tickets_and_nobody_elses() {
    let Some(place) = Place::new().await else {
        return;
    };
    let line = place.line().await;
    let (mine, mut own) = place.worker("mine").await;
    let (_, mut other) = place.worker("other").await;
    put(&line, Some(&mine), 1).await;
    put(&line, None, 2).await;
    let taken = next(&mut other).await;
    assert_eq!(number(&taken), 2);
    taken.done().await;
    let taken = next(&mut own).await;
    assert_eq!(number(&taken), 1);
    taken.done().await;
    // Nor while the other one waits.
    other.ask().await.expect("asked");
    put(&line, Some(&mine), 3).await;
    assert_eq!(number(&next(&mut own).await), 3);
}

#[tokio::test]
async fn a_ticket_whose_desk_is_no_subject_is_not_ours_and_harms_nobody() {
    let Some(place) = Place::new().await else {
        return;
    };
    let line = place.line().await;
    let (_, mut pulls) = place.worker("w").await;
    for desk in ["stator.desk.a\r\nPUB x 0\r\n", "stator.desk.a b", "x.y"] {
        let desk = desk.to_owned();
        let ticket = Ticket { desk, number: 1 };
        let is_there = line.put(None, &ticket).await.expect("it is sent");
        is_there.await.expect("it is there");
        let taken = next(&mut pulls).await;
        assert_eq!(taken.ticket(), None);
        taken.done().await;
    }
    put(&line, None, 2).await;
    assert_eq!(number(&next(&mut pulls).await), 2);
    assert!(!pulls.is_over());
}

#[tokio::test]
async fn a_worker_whose_name_is_longer_than_a_server_takes_gets_its_own_tickets() {
    let Some(place) = Place::new().await else {
        return;
    };
    let line = place.line().await;
    let (mine, mut own) = place.worker(&"w".repeat(400)).await;
    put(&line, Some(&mine), 1).await;
    assert_eq!(number(&next(&mut own).await), 1);
}

#[tokio::test]
async fn a_line_that_was_lost_with_its_server_is_noticed_and_can_be_opened_again() {
    let Some(mut place) = Place::new().await else {
        return;
    };
    let line = place.line().await;
    put(&line, None, 1).await;
    let (_, pulls) = place.worker("w").await;
    assert_eq!(line.tickets().await.expect("it is there"), 1);
    place.server.restart().await;
    line.life().cancelled().await;
    assert!(pulls.is_over());
    let again = loop {
        match Line::open(&place.nats, &place.name).await {
            Ok(line) => break line,
            Err(_) => sleep(PAUSE).await,
        }
    };
    assert_eq!(again.tickets().await.expect("it is there"), 0);
    let error = line.tickets().await.expect_err("another one");
    assert!(matches!(error, LineError::Lost(_)), "{error}");
}

#[tokio::test]
async fn a_server_without_jetstream_is_said_with_the_remedy() {
    let Some(server) = NatsServer::start().await else {
        return;
    };
    let nats = Nats::new(settings(&server), "test");
    let refused = Line::open(&nats, &LineName::new("a", "b")).await;
    let error = refused.err().expect("no line").to_string();
    assert!(error.contains("nats-server -js"), "{error}");
}

#[tokio::test]
async fn workers_are_invited_and_their_offers_answered_or_known_to_be_in_vain() {
    let Some(place) = Place::new().await else {
        return;
    };
    let worker = WorkerId("w".to_owned());
    let at = plane::nats::subject("ns", &worker);
    let mut guest = Guest::listen(&place.nats, &at, worker.clone())
        .await
        .expect("a guest");
    let mut desk = Desk::open(&place.nats).await.expect("a desk");
    let invitation = Invitation {
        line: place.name.clone(),
    };
    desk.invite(&at, &invitation).await.expect("invited");
    let (invited, from) = guest.invited().await;
    assert_eq!(invited, invitation);
    guest.accept(from).await;
    assert!(matches!(desk.next().await, Some(Heard::Pulls(id)) if id == worker));

    let ticket = desk.ticket(7);
    let offer = guest.offer(&ticket, vec![0]);
    let answer = async {
        let Some(Heard::Offers(offer, reply)) = desk.next().await else {
            panic!("an offer");
        };
        let ranks = vec![0];
        assert_eq!(
            offer,
            Offer {
                number: 7,
                worker,
                ranks
            }
        );
        desk.answer(reply, &Answer::Over).await;
        desk
    };
    let (answered, desk) = tokio::join!(offer, answer);
    assert_eq!(answered, Ok(Answer::Over));
    // Nobody answers, but somebody could.
    assert_eq!(guest.offer(&ticket, vec![0]).await, Err(Unanswered::Silent));
    drop(desk);
    let gone = timeout(Duration::from_secs(30), async {
        // Until the server has heard it.
        while guest.offer(&ticket, vec![0]).await != Err(Unanswered::Gone) {
            sleep(PAUSE).await;
        }
    });
    gone.await.expect("known to be gone");
}
