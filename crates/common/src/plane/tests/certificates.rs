//! Certificates for tests, made as they are needed.

use std::{path::Path, sync::LazyLock};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use crate::tls::{Files, Named};

/// Who signs certificates.
pub(super) struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// The one that workers and processors trust.
pub(super) static TRUSTED: LazyLock<Authority> = LazyLock::new(Authority::new);

/// Another one.
pub(super) static FOREIGN: LazyLock<Authority> = LazyLock::new(Authority::new);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        Self {
            pem: params.self_signed(&key).unwrap().pem(),
            issuer: Issuer::new(params, key),
        }
    }
}

/// Writes what one side is configured with.
///
/// - `trusted`: whom the other side's certificate must be signed by; absent: nothing is asked of it.
/// - `identity`: who signs this side's own certificate, and the name in it; absent: it shows none.
pub(super) fn files(
    dir: &Path,
    trusted: Option<&Authority>,
    identity: Option<(&Authority, &str)>,
) -> Files {
    let write = |flag: &'static str, pem: String| {
        let path = dir.join(format!("{flag}.pem"));
        std::fs::write(&path, pem).unwrap();
        Some(Named { flag, path })
    };
    let mut files = Files {
        authority: trusted.and_then(|authority| write("ca", authority.pem.clone())),
        ..Files::default()
    };
    if let Some((authority, name)) = identity {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &authority.issuer).unwrap();
        files.certificate = write("cert", certificate.pem());
        files.key = write("key", key.serialize_pem());
    }
    files
}
