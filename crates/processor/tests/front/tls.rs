//! TLS on the listener.

use std::path::Path;
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::pki_types::{CertificateDer, ServerName};
use stator_processor::config::Config;
use stator_processor::{BindError, Processor};
use stator_testkit::http::{get, send_h2_on, send_on};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::support::{Running, start};

/// Writes a new certificate for `localhost` and its key.
fn certify(dir: &Path) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(dir.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
    std::fs::write(dir.join("cert.pem"), made.cert.pem()).unwrap();
    made.cert.der().clone()
}

fn config(dir: &Path) -> Config {
    Config {
        tls_cert_path: Some(dir.join("cert.pem")),
        tls_key_path: Some(dir.join("key.pem")),
        ..Config::default()
    }
}

async fn connect(
    processor: &Running,
    trusted: &CertificateDer<'static>,
    alpn: &[u8],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    let stream = TcpStream::connect(processor.addr).await?;
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
}

#[tokio::test]
async fn both_versions_of_http_are_spoken_over_tls() {
    let dir = tempfile::tempdir().unwrap();
    let certificate = certify(dir.path());
    let processor = start(config(dir.path())).await;
    let stream = connect(&processor, &certificate, b"http/1.1")
        .await
        .unwrap();
    assert_eq!(send_on(stream, get("/live")).await.json()["status"], "live");
    let stream = connect(&processor, &certificate, b"h2").await.unwrap();
    let request = http::Request::get("https://localhost/live")
        .body(Default::default())
        .unwrap();
    assert_eq!(send_h2_on(stream, request).await.json()["status"], "live");
}

#[tokio::test]
async fn plain_text_is_not_spoken_on_a_tls_port() {
    let dir = tempfile::tempdir().unwrap();
    certify(dir.path());
    let processor = start(config(dir.path())).await;
    let answer = crate::connections::raw(processor.addr, "GET /live HTTP/1.1\r\nhost: x\r\n\r\n");
    assert!(!answer.await.contains("200"));
}

#[tokio::test(start_paused = true)]
async fn a_replaced_certificate_is_used_without_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let old = certify(dir.path());
    let processor = start(config(dir.path())).await;
    connect(&processor, &old, b"http/1.1").await.unwrap();
    // File times have a resolution: a replacement within it would not be seen.
    let before = std::fs::metadata(dir.path().join("cert.pem"))
        .unwrap()
        .modified()
        .unwrap();
    let new = loop {
        let new = certify(dir.path());
        if std::fs::metadata(dir.path().join("cert.pem"))
            .unwrap()
            .modified()
            .unwrap()
            != before
        {
            break new;
        }
    };
    while connect(&processor, &new, b"http/1.1").await.is_err() {
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    }
    assert!(connect(&processor, &old, b"http/1.1").await.is_err());
}

#[tokio::test]
async fn a_key_that_is_not_the_certificates_stops_the_start() {
    let dir = tempfile::tempdir().unwrap();
    certify(dir.path());
    let cert = std::fs::read(dir.path().join("cert.pem")).unwrap();
    certify(dir.path());
    std::fs::write(dir.path().join("cert.pem"), cert).unwrap();
    let bound = Processor::bind(Config {
        http_port: 0,
        ..config(dir.path())
    })
    .await;
    assert!(matches!(bound.err(), Some(BindError::Tls(_))));
}
