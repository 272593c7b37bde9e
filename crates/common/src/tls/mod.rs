//! Certificates: how listeners and dialers of every role speak TLS, from PEM files that may be replaced meanwhile.
//!
//! What is spoken above TLS, and which flags name the files, is the business of whoever uses this. The cryptography is
//! `ring`'s, wherever it runs.

mod files;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::ServerName,
    server::WebPkiClientVerifier,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tracing::{error, info};

pub use files::{Files, Named, TlsError};

/// How often the files are looked at. Certificates are replaced days before they expire.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// What a listener shows, and whom it lets in. Clones are the same.
#[derive(Clone)]
pub struct Server(Kept<ServerConfig>);

impl Server {
    /// Reads the files: certificate and key are needed; with an authority, peers must show a certificate that
    /// it signed.
    ///
    /// - `speech`: what is spoken above TLS (ALPN), the best first; empty: anything.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn load(files: Files, speech: &'static [&'static str]) -> Result<Self, TlsError> {
        Kept::load(files, move |files| {
            let (chain, key, named) = files.identity()?.ok_or(TlsError::NoIdentity)?;
            let builder = ServerConfig::builder_with_provider(provider())
                .with_safe_default_protocol_versions()
                .map_err(|source| named.unusable(source))?;
            let builder = match files.authority()? {
                None => builder.with_no_client_auth(),
                Some((roots, named)) => {
                    let verifier =
                        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
                            .build()
                            .map_err(|error| named.unreadable(&error))?;
                    builder.with_client_cert_verifier(verifier)
                }
            };
            let mut config = builder
                .with_single_cert(chain, key)
                .map_err(|source| named.unusable(source))?;
            config.alpn_protocols = alpn(speech);
            Ok(config)
        })
        .map(Self)
    }

    /// Returns what shakes hands with the certificate of now.
    pub fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.0.current.load_full())
    }

    /// Returns a future that reads the files again whenever they change; it never ends.
    pub fn watch(&self) -> impl Future<Output = ()> + Send + 'static {
        self.0.clone().watch()
    }
}

/// How a dialer checks whom it reached, and what it shows. Clones are the same.
#[derive(Clone)]
pub struct Client {
    kept: Kept<ClientConfig>,
    name: Option<ServerName<'static>>,
}

impl Client {
    /// Reads the files: the authority is needed; with certificate and key, the dialer shows those.
    ///
    /// - `name`: the name that certificates must bear; absent: that of whom is dialled.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn load(files: Files, name: Option<&str>) -> Result<Self, TlsError> {
        let kept = Kept::load(files, |files| {
            let (roots, named) = files.authority()?.ok_or(TlsError::NoAuthority)?;
            let builder = ClientConfig::builder_with_provider(provider())
                .with_safe_default_protocol_versions()
                .map_err(|source| named.unusable(source))?
                .with_root_certificates(roots);
            match files.identity()? {
                None => Ok(builder.with_no_client_auth()),
                Some((chain, key, named)) => builder
                    .with_client_auth_cert(chain, key)
                    .map_err(|source| named.unusable(source)),
            }
        })?;
        let name = name.map(|name| {
            ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Name(name.to_owned()))
        });
        Ok(Self {
            kept,
            name: name.transpose()?,
        })
    }

    /// Returns what shakes hands, with the certificates of now.
    ///
    /// - `speech`: what is to be spoken above TLS (ALPN); empty: it is not asked for.
    pub fn connector(&self, speech: &[&str]) -> TlsConnector {
        let mut config = ClientConfig::clone(&self.kept.current.load());
        config.alpn_protocols = alpn(speech);
        TlsConnector::from(Arc::new(config))
    }

    /// Returns the name that the certificate of `host` must bear.
    ///
    /// # Errors
    /// The host is neither a name nor an address.
    pub fn name(&self, host: &str) -> Result<ServerName<'static>, TlsError> {
        match &self.name {
            Some(name) => Ok(name.clone()),
            None => {
                ServerName::try_from(host.to_owned()).map_err(|_| TlsError::Name(host.to_owned()))
            }
        }
    }

    /// Returns a future that reads the files again whenever they change; it never ends.
    pub fn watch(&self) -> impl Future<Output = ()> + Send + 'static {
        self.kept.clone().watch()
    }
}

/// Returns the cryptography that is used.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn alpn(speech: &[&str]) -> Vec<Vec<u8>> {
    speech.iter().map(|name| name.as_bytes().to_vec()).collect()
}

/// Certificates that are checked with these.
type Roots = RootCertStore;

type Read<T> = Arc<dyn Fn(&Files) -> Result<T, TlsError> + Send + Sync>;

/// What was made of some files, and is made again when they change.
struct Kept<T> {
    current: Arc<ArcSwap<T>>,
    files: Arc<Files>,
    read: Read<T>,
}

impl<T> Clone for Kept<T> {
    fn clone(&self) -> Self {
        Self {
            current: self.current.clone(),
            files: self.files.clone(),
            read: self.read.clone(),
        }
    }
}

impl<T: Send + Sync + 'static> Kept<T> {
    fn load(
        files: Files,
        read: impl Fn(&Files) -> Result<T, TlsError> + Send + Sync + 'static,
    ) -> Result<Self, TlsError> {
        Ok(Self {
            current: Arc::new(ArcSwap::from_pointee(read(&files)?)),
            files: Arc::new(files),
            read: Arc::new(read),
        })
    }

    async fn watch(self) {
        let mut seen: [Option<SystemTime>; 3] = self.files.changed_at();
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let now = self.files.changed_at();
            if now == seen {
                continue;
            }
            seen = now;
            match (self.read)(&self.files) {
                Ok(read) => {
                    self.current.store(Arc::new(read));
                    info!(files = %self.files, "certificates replaced");
                }
                // Half-written, perhaps: the old ones stay, and the next change is tried again.
                Err(error) => error!(%error, "certificates not replaced"),
            }
        }
    }
}
