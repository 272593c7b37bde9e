//! Who may ask for what.

use std::fmt;

use http::{HeaderMap, header};
use stator_common::Code;

use super::routes::Route;
use crate::config::Config;
use crate::openai::ApiError;

/// The keys of which a client must send one; with none, everybody is let in.
///
/// Keys are kept and compared as blake3 hashes: comparing two hashes takes the same time wherever they
/// differ, and tells nothing about the keys.
pub(crate) struct Keys {
    keys: Vec<blake3::Hash>,
    /// Whether the routes for operators ask for a key as well.
    operators: bool,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} keys", self.keys.len())
    }
}

impl Keys {
    pub(crate) fn new(config: &Config) -> Self {
        let keys = config
            .api_key
            .iter()
            .map(|key| blake3::hash(key.reveal().as_bytes()))
            .collect();
        Self {
            keys,
            operators: config.metrics_auth,
        }
    }

    /// Lets a request in, or says why not.
    ///
    /// # Errors
    /// [`Code::Unauthenticated`].
    pub(super) fn admit(&self, route: Route, headers: &HeaderMap) -> Result<(), ApiError> {
        if self.keys.is_empty() || route.is_open() || (route.is_for_operators() && !self.operators)
        {
            return Ok(());
        }
        let refuse = |message: &str| Err(ApiError::new(Code::Unauthenticated, message));
        let Some(value) = headers.get(header::AUTHORIZATION) else {
            return refuse("no API key: send it as 'Authorization: Bearer KEY'");
        };
        let Some(key) = bearer(value.as_bytes()) else {
            return refuse("the Authorization header is not 'Bearer KEY'");
        };
        let given = blake3::hash(key);
        // Every key is compared, so that the time does not tell which one came close.
        match self
            .keys
            .iter()
            .fold(false, |found, key| found | (*key == given))
        {
            true => Ok(()),
            false => refuse("incorrect API key"),
        }
    }
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked(b"Bearer ".len())?;
    scheme
        .eq_ignore_ascii_case(b"Bearer ")
        .then(|| key.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(metrics_auth: bool) -> Keys {
        let api_key = vec!["one".into(), "two".into()];
        Keys::new(&Config {
            api_key,
            metrics_auth,
            ..Config::default()
        })
    }

    fn with(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())])
    }

    #[test]
    fn each_key_opens_and_nothing_else_does() {
        let keys = keys(false);
        for good in ["Bearer one", "bearer two", "Bearer  two "] {
            assert!(keys.admit(Route::Chat, &with(good)).is_ok(), "{good}");
        }
        for bad in [
            "Bearer three",
            "Bearer on",
            "Bearer ",
            "Basic one",
            "one",
            "Bearerone",
        ] {
            assert!(keys.admit(Route::Chat, &with(bad)).is_err(), "{bad}");
        }
        assert!(keys.admit(Route::Chat, &HeaderMap::new()).is_err());
        assert!(keys.admit(Route::Other, &HeaderMap::new()).is_err());
    }

    #[test]
    fn probes_are_open_and_operators_routes_are_as_configured() {
        let nothing = HeaderMap::new();
        assert!(keys(true).admit(Route::Health, &nothing).is_ok());
        assert!(keys(true).admit(Route::Live, &nothing).is_ok());
        assert!(keys(false).admit(Route::Metrics, &nothing).is_ok());
        assert!(keys(true).admit(Route::Metrics, &nothing).is_err());
        assert!(
            keys(true)
                .admit(Route::Workers, &with("Bearer one"))
                .is_ok()
        );
    }

    #[test]
    fn without_keys_everybody_is_let_in() {
        let keys = Keys::new(&Config::default());
        assert!(keys.admit(Route::Chat, &HeaderMap::new()).is_ok());
    }
}
