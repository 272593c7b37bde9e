//! The PEM files behind certificates, each known by the flag that names it.

use std::{
    fmt,
    path::{Path, PathBuf},
    time::SystemTime,
};

use rustls::pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{self, PemObject},
};

use super::Roots;

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or is not PEM of the right kind.
    #[error("{flag} {}: {reason}", .path.display())]
    Read {
        flag: &'static str,
        path: PathBuf,
        reason: String,
    },
    /// Certificate and key do not fit each other, or are of a kind that is not supported.
    #[error("{flag} {}: {source}", .path.display())]
    Use {
        flag: &'static str,
        path: PathBuf,
        source: rustls::Error,
    },
    /// One without the other cannot be used.
    #[error("{given} goes together with {missing}: give both or neither")]
    Half {
        given: &'static str,
        missing: &'static str,
    },
    /// A listener without a certificate.
    #[error("a certificate and its key are needed")]
    NoIdentity,
    /// A dialer that would believe anybody.
    #[error("certificates to check the peer's with are needed")]
    NoAuthority,
    /// Nothing that a certificate could bear.
    #[error("'{0}' is neither a host's name nor an address")]
    Name(String),
}

/// A file, and the flag that names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    pub flag: &'static str,
    pub path: PathBuf,
}

impl Named {
    pub fn new(flag: &'static str, path: &Path) -> Self {
        Self {
            flag,
            path: path.to_owned(),
        }
    }

    pub(super) fn unreadable(&self, reason: &impl fmt::Display) -> TlsError {
        TlsError::Read {
            flag: self.flag,
            path: self.path.clone(),
            reason: reason.to_string(),
        }
    }

    pub(super) fn unusable(&self, source: rustls::Error) -> TlsError {
        TlsError::Use {
            flag: self.flag,
            path: self.path.clone(),
            source,
        }
    }

    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let read: Result<Vec<_>, pem::Error> =
            CertificateDer::pem_file_iter(&self.path).and_then(Iterator::collect);
        let certificates = read.map_err(|error| self.unreadable(&error))?;
        if certificates.is_empty() {
            return Err(self.unreadable(&"it holds no certificate"));
        }
        Ok(certificates)
    }
}

/// The files of one side.
#[derive(Clone, Debug, Default)]
pub struct Files {
    /// What is shown: a certificate, with those that lead to its authority after it.
    pub certificate: Option<Named>,
    /// Its key.
    pub key: Option<Named>,
    /// What the other side's certificate is checked with.
    pub authority: Option<Named>,
}

/// A certificate's chain, its key, and the file to complain about.
type Identity<'a> = (
    Vec<CertificateDer<'static>>,
    PrivateKeyDer<'static>,
    &'a Named,
);

impl Files {
    /// Reads certificate and key.
    pub(super) fn identity(&self) -> Result<Option<Identity<'_>>, TlsError> {
        match (&self.certificate, &self.key) {
            (None, None) => Ok(None),
            (Some(certificate), Some(key)) => {
                let chain = certificate.certificates()?;
                let private = PrivateKeyDer::from_pem_file(&key.path)
                    .map_err(|error| key.unreadable(&error))?;
                Ok(Some((chain, private, key)))
            }
            (Some(certificate), None) => Err(half(certificate, "its key")),
            (None, Some(key)) => Err(half(key, "its certificate")),
        }
    }

    /// Reads what certificates are checked with.
    pub(super) fn authority(&self) -> Result<Option<(Roots, &Named)>, TlsError> {
        let Some(named) = &self.authority else {
            return Ok(None);
        };
        let mut roots = Roots::empty();
        for certificate in named.certificates()? {
            roots
                .add(certificate)
                .map_err(|source| named.unusable(source))?;
        }
        Ok(Some((roots, named)))
    }

    fn all(&self) -> [&Option<Named>; 3] {
        [&self.certificate, &self.key, &self.authority]
    }

    /// Returns when each was written last.
    pub(super) fn changed_at(&self) -> [Option<SystemTime>; 3] {
        self.all().map(|named| {
            let file = std::fs::metadata(&named.as_ref()?.path).ok()?;
            file.modified().ok()
        })
    }
}

fn half(given: &Named, missing: &'static str) -> TlsError {
    TlsError::Half {
        given: given.flag,
        missing,
    }
}

impl fmt::Display for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = self.all().into_iter().flatten();
        let paths: Vec<String> = named
            .map(|named| named.path.display().to_string())
            .collect();
        f.write_str(&paths.join(", "))
    }
}
