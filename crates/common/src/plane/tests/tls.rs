//! Who is let in by certificate, and who is believed.

use super::{
    certificates::{Authority, FOREIGN, TRUSTED, files},
    *,
};
use crate::tls;

/// Connects as somebody else would.
fn stranger(
    worker: &Worker,
    trusted: &Authority,
    identity: Option<&Authority>,
    name: Option<&str>,
) -> Client {
    let dir = tempfile::tempdir().unwrap();
    let identity = identity.map(|authority| (authority, "processor"));
    let files = files(dir.path(), Some(trusted), identity);
    let tls = tls::Client::load(files, name).unwrap();
    let config = ClientConfig {
        tls: Some(Arc::new(tls)),
        ..ClientConfig::default()
    };
    Client::connect(&worker.address, config)
}

/// Waits until an attempt to connect has failed, and returns why.
async fn failed(client: &Client) -> String {
    let mut state = client.state();
    let failed = |state: &State| match state {
        State::Connecting { reason } => reason != "first attempt",
        State::Ready | State::Draining | State::Gone { .. } => true,
    };
    match state.wait_for(failed).await.unwrap().clone() {
        State::Connecting { reason } => reason,
        other => panic!("{other:?}"),
    }
}

async fn only_processors_with_a_certificate_are_let_in(plane: Plane) {
    let mut worker = plane.worker(|_| {});
    let nobody = failed(&stranger(&worker, &TRUSTED, None, Some("worker"))).await;
    assert!(nobody.contains("CertificateRequired"), "{nobody}");
    let foreign = stranger(&worker, &TRUSTED, Some(&FOREIGN), Some("worker"));
    let foreign = failed(&foreign).await;
    assert!(foreign.contains("alert"), "{foreign}");
    assert!(worker.seen.try_recv().is_err());
    let known = stranger(&worker, &TRUSTED, Some(&TRUSTED), Some("worker"));
    known.ready().await.unwrap();
}

async fn only_workers_with_the_right_name_and_authority_are_believed(plane: Plane) {
    let worker = plane.worker(|_| {});
    let foreign = stranger(&worker, &FOREIGN, Some(&TRUSTED), Some("worker"));
    let foreign = failed(&foreign).await;
    assert!(foreign.contains("invalid peer certificate"), "{foreign}");
    // The certificate bears a name, and the worker was found by its address.
    let unnamed = failed(&stranger(&worker, &TRUSTED, Some(&TRUSTED), None)).await;
    assert!(unnamed.contains("not valid for name"), "{unnamed}");
}

async fn a_processor_that_cannot_check_workers_says_so(plane: Plane) {
    let worker = plane.worker(|_| {});
    let client = Client::connect(&worker.address, ClientConfig::default());
    let error = client.ready().await.unwrap_err().to_string();
    assert!(error.contains("--request-plane-tls-ca"), "{error}");
}

on_every_tls_plane!(
    only_processors_with_a_certificate_are_let_in,
    only_workers_with_the_right_name_and_authority_are_believed,
    a_processor_that_cannot_check_workers_says_so,
);

#[tokio::test]
async fn files_that_cannot_be_used_are_refused_by_their_flags() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |files: tls::Files| {
        let mut config = ServerConfig::new(WorkerId("w".to_owned()));
        config.tls = Some(files);
        let bound = Server::bind("127.0.0.1:0".parse().unwrap(), config);
        bound.err().unwrap().to_string()
    };
    let good = files(dir.path(), Some(&TRUSTED), Some((&TRUSTED, "worker")));
    let other = tempfile::tempdir().unwrap();
    let other = files(other.path(), None, Some((&TRUSTED, "worker")));

    let half = tls::Files {
        key: None,
        ..good.clone()
    };
    assert!(refused(half).starts_with("cert goes together with"));
    let missing = tls::Files {
        key: other.key.clone(),
        ..good.clone()
    };
    std::fs::remove_file(&other.key.unwrap().path).unwrap();
    assert!(refused(missing).starts_with("key "));
    let swapped = tls::Files {
        certificate: good.key.clone(),
        ..good.clone()
    };
    assert!(refused(swapped).contains("holds no certificate"));
    // A key of another certificate.
    let unfit = tempfile::tempdir().unwrap();
    let unfit = files(unfit.path(), None, Some((&TRUSTED, "worker")));
    std::fs::copy(&unfit.key.unwrap().path, &good.key.as_ref().unwrap().path).unwrap();
    let unfit = refused(good);
    assert!(unfit.starts_with("key "), "{unfit}");
}
