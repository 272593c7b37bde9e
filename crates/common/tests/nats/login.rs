//! Who may log in, and what is said of who may not.

use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use stator_common::{
    nats::{Nats, NatsError},
    settings::{NatsSettings, Secret},
};
use stator_testkit::nats::NatsServer;

use crate::settings;

async fn connect(settings: NatsSettings) -> Result<(), NatsError> {
    Nats::new(settings, "test").connection().await.map(drop)
}

fn assert_refused(result: Result<(), NatsError>) {
    let error = result.unwrap_err();
    assert!(matches!(error, NatsError::Login { .. }), "{error}");
    let text = format!("{error} {error:?}");
    assert!(text.contains("--nats-password-file"), "{text}");
    assert!(
        !text.contains("s3cret") && !text.contains("wr0ng"),
        "{text}"
    );
}

#[tokio::test]
async fn a_name_with_a_password_is_let_in_and_a_wrong_one_is_not() {
    let own = "authorization { user: stator, password: s3cret }";
    let Some(server) = NatsServer::start_with(own).await else {
        return;
    };
    let login = |password: &str| NatsSettings {
        username: Some("stator".to_owned()),
        password: Some(Secret::from(password)),
        ..settings(&server)
    };
    connect(login("s3cret")).await.unwrap();
    assert_refused(connect(login("wr0ng")).await);
    assert_refused(connect(settings(&server)).await);
}

#[tokio::test]
async fn a_token_or_an_nkey_is_let_in_and_a_wrong_one_is_not() {
    let Some(server) = NatsServer::start_with("authorization { token: s3cret }").await else {
        return;
    };
    let login = |token: &str| NatsSettings {
        token: Some(Secret::from(token)),
        ..settings(&server)
    };
    connect(login("s3cret")).await.unwrap();
    assert_refused(connect(login("wr0ng")).await);

    // The pair that the documents of NATS show.
    let public = "UDXU4RCSJNZOIQHZNWXHXORDPRTGNJAHAHFRGZNEEJCPQTT2M7NLCNF4";
    let seed = "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY";
    let own = format!("authorization {{ users: [ {{ nkey: {public} }} ] }}");
    let server = NatsServer::start_with(&own).await.unwrap();
    let login = |seed: &str| NatsSettings {
        nkey: Some(Secret::from(seed)),
        ..settings(&server)
    };
    connect(login(seed)).await.unwrap();
    assert_refused(connect(login("wr0ng")).await);
}

/// Certificates for a server and a client, of one authority.
struct Papers {
    folder: tempfile::TempDir,
}

impl Papers {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let write = |name: &str, text: String| std::fs::write(folder.path().join(name), text);
        write("ca.pem", ca.pem()).unwrap();
        for name in ["server", "client"] {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new(["localhost".to_owned()]).unwrap();
            let cert = params.signed_by(&key, &ca).unwrap();
            write(&format!("{name}.pem"), cert.pem()).unwrap();
            write(&format!("{name}.key"), key.serialize_pem()).unwrap();
        }
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        Path::new(self.folder.path()).join(name)
    }

    /// Returns a server's settings.
    fn server(&self, more: &str) -> String {
        let path = |name| self.path(name).display().to_string();
        let (ca, cert, key) = (path("ca.pem"), path("server.pem"), path("server.key"));
        format!("tls {{ cert_file: '{cert}', key_file: '{key}', ca_file: '{ca}', {more} }}")
    }
}

#[tokio::test]
async fn a_server_with_tls_is_checked_and_checks_who_comes_if_it_likes() {
    let papers = Papers::new();
    let trusting = |server: &NatsServer| NatsSettings {
        tls_ca_cert_path: Some(papers.path("ca.pem")),
        ..settings(server)
    };
    let Some(server) = NatsServer::start_with(&papers.server("verify: false")).await else {
        return;
    };
    connect(trusting(&server)).await.unwrap();
    let unknown = connect(settings(&server)).await.unwrap_err();
    assert!(matches!(unknown, NatsError::Tls { .. }), "{unknown}");

    let server = NatsServer::start_with(&papers.server("verify: true")).await;
    let server = server.unwrap();
    let known = NatsSettings {
        tls_client_cert_path: Some(papers.path("client.pem")),
        tls_client_key_path: Some(papers.path("client.key")),
        ..trusting(&server)
    };
    connect(known).await.unwrap();
    let unknown = connect(trusting(&server)).await.unwrap_err();
    assert!(unknown.to_string().contains("--nats-"), "{unknown}");
}

#[tokio::test]
async fn a_server_that_is_not_there_or_allows_too_little_is_named_with_the_flag() {
    let Some(mut server) = NatsServer::start_with("max_payload: 1024").await else {
        return;
    };
    let little = connect(settings(&server)).await.unwrap_err().to_string();
    assert!(little.contains("max_payload"), "{little}");
    server.kill();
    let none = connect(settings(&server)).await.unwrap_err().to_string();
    assert!(
        none.contains("--nats-server") && none.contains(&server.url()),
        "{none}"
    );
}
