//! TLS on the listener, with certificates that may be replaced while it runs.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;
use tracing::{error, info};

use crate::config::Config;

/// How often the files are looked at. Certificates are replaced days before they expire.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Why certificate and key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or is not PEM of the right kind.
    #[error("read {path}: {reason}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Certificate and key do not fit each other, or are of a kind that is not supported.
    #[error("use {path}: {source}")]
    Use {
        /// The certificate.
        path: PathBuf,
        /// Why.
        source: rustls::Error,
    },
}

/// The certificate in use.
pub(super) struct Tls {
    current: Arc<ArcSwap<ServerConfig>>,
    files: Files,
}

#[derive(Clone)]
struct Files {
    certificate: PathBuf,
    key: PathBuf,
}

impl Tls {
    /// Reads certificate and key; absent if TLS is not configured.
    pub(super) fn load(config: &Config) -> Result<Option<Self>, TlsError> {
        let (Some(certificate), Some(key)) = (&config.tls_cert_path, &config.tls_key_path) else {
            return Ok(None);
        };
        let files = Files {
            certificate: certificate.clone(),
            key: key.clone(),
        };
        let current = Arc::new(ArcSwap::from_pointee(files.read()?));
        Ok(Some(Self { current, files }))
    }

    /// Returns what shakes hands with the certificate of now.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.current.load_full())
    }

    /// Returns a future that replaces the certificate whenever its files change; it never ends.
    pub(super) fn watch(&self) -> impl Future<Output = ()> + Send + 'static {
        let (current, files) = (Arc::clone(&self.current), self.files.clone());
        async move {
            let mut seen = files.changed_at();
            loop {
                tokio::time::sleep(LOOK_EVERY).await;
                let now = files.changed_at();
                if now == seen {
                    continue;
                }
                seen = now;
                match files.read() {
                    Ok(config) => {
                        current.store(Arc::new(config));
                        info!(certificate = %files.certificate.display(), "certificate replaced");
                    }
                    // Half-written, perhaps: the old one stays, and the next change is tried again.
                    Err(error) => error!(%error, "certificate not replaced"),
                }
            }
        }
    }
}

impl Files {
    fn read(&self) -> Result<ServerConfig, TlsError> {
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(&self.certificate)
            .and_then(Iterator::collect)
            .map_err(|error| unreadable(&self.certificate, &error))?;
        let key = PrivateKeyDer::from_pem_file(&self.key)
            .map_err(|error| unreadable(&self.key, &error))?;
        let unusable = |source| TlsError::Use {
            path: self.certificate.clone(),
            source,
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(unusable)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }

    fn changed_at(&self) -> [Option<SystemTime>; 2] {
        [&self.certificate, &self.key].map(|path| {
            std::fs::metadata(path)
                .and_then(|file| file.modified())
                .ok()
        })
    }
}

fn unreadable(path: &Path, error: &rustls_pki_types::pem::Error) -> TlsError {
    TlsError::Read {
        path: path.to_owned(),
        reason: error.to_string(),
    }
}
