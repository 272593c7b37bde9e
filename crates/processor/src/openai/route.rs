//! What a request says about where it goes, in headers.
//!
//! | header | meaning |
//! | --- | --- |
//! | `x-stator-worker` | only this worker answers |
//! | `x-stator-prefill-worker` | only this one computes the prompt, where that is another |
//! | `x-stator-session` | requests of one session go to one worker while it has room |
//! | `x-stator-route` | a list of `explain`, `mode=MODE`, `temperature=NUMBER`, `decode-weight=NUMBER` |
//!
//! `explain` has the answer say why its workers were chosen (`x-stator-route-reason`).

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::Response;
use clap::ValueEnum;
use parking_lot::Mutex;
use stator_common::WorkerId;

use super::error::ApiError;
use crate::config::{Config, SessionAffinity};
use crate::pool::{Route, RouterMode};

const WORKER: &str = "x-stator-worker";
const PREFILL_WORKER: &str = "x-stator-prefill-worker";
/// Ours, and Dynamo's (1.6).
const SESSION: [&str; 2] = ["x-stator-session", "x-dynamo-session-id"];
const ROUTE: &str = "x-stator-route";
const REASON: HeaderName = HeaderName::from_static("x-stator-route-reason");

/// What a processor lets requests say.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    mode: RouterMode,
    affinity: SessionAffinity,
}

impl Rules {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            mode: config.router_mode,
            affinity: config.session_affinity,
        }
    }
}

/// Why workers were chosen.
pub(crate) type Told = Arc<Mutex<Vec<String>>>;

/// Says whether the answer is to tell why its workers were chosen.
pub(crate) fn told(headers: &HeaderMap) -> Option<Told> {
    let route = headers.get(ROUTE)?.to_str().ok()?;
    items(route)
        .any(|item| item == "explain")
        .then(Told::default)
}

/// Adds to an answer why its workers were chosen.
pub(crate) fn tell(told: &Told, response: &mut Response) {
    if let Ok(reasons) = HeaderValue::from_str(&told.lock().join("; ")) {
        response.headers_mut().insert(REASON, reasons);
    }
}

/// Reads what a request says; nothing if it says nothing.
///
/// - `user`: as the body names it.
///
/// # Errors
/// A header cannot be understood, or the one that names the worker is missing where it is needed.
pub(crate) fn read(
    headers: &HeaderMap,
    user: Option<&str>,
    told: Option<&Told>,
    rules: Rules,
) -> Result<Option<Arc<Route>>, ApiError> {
    let worker = |name| text(headers, name).map(|id| id.map(|id| WorkerId(id.to_owned())));
    let mut route = Route {
        worker: worker(WORKER)?,
        prefill_worker: worker(PREFILL_WORKER)?,
        session: session(headers, user, rules.affinity)?.map(number),
        told: told.cloned(),
        ..Route::default()
    };
    for item in items(text(headers, ROUTE)?.unwrap_or_default()) {
        override_by(item, &mut route, rules.mode)?;
    }
    if route.mode.unwrap_or(rules.mode) == RouterMode::Direct && route.worker.is_none() {
        let message =
            format!("{WORKER}: the worker must be named, since the router mode is direct");
        return Err(ApiError::invalid(WORKER, message));
    }
    let says_nothing = route.worker.is_none()
        && route.prefill_worker.is_none()
        && route.session.is_none()
        && route.mode.is_none()
        && route.temperature.is_none()
        && route.decode_weight.is_none()
        && route.told.is_none();
    Ok((!says_nothing).then(|| Arc::new(route)))
}

/// Returns a number that stands for a session, in this process.
fn number(session: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    session.hash(&mut hasher);
    hasher.finish()
}

fn items(list: &str) -> impl Iterator<Item = &str> {
    list.split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
}

fn override_by(item: &str, route: &mut Route, configured: RouterMode) -> Result<(), ApiError> {
    let invalid = |message: String| ApiError::invalid(ROUTE, format!("{ROUTE}: {message}"));
    let number = |value: &str| {
        let number = value.parse().ok();
        number
            .filter(|number: &f64| number.is_finite() && *number >= 0.0)
            .ok_or_else(|| invalid(format!("'{item}': expected a number that is not negative")))
    };
    match item.split_once('=') {
        None if item == "explain" => {}
        Some(("mode", mode)) => {
            let mode = RouterMode::from_str(mode, false)
                .map_err(|_| invalid(format!("'{mode}' is not a router mode")))?;
            if mode.looks_at_caches() && !configured.looks_at_caches() {
                let message = format!(
                    "mode={mode} is there only where the processor runs with --router-mode kv or approx"
                );
                return Err(invalid(message));
            }
            route.mode = Some(mode);
        }
        Some(("temperature", value)) => route.temperature = Some(number(value)?),
        Some(("decode-weight", value)) => route.decode_weight = Some(number(value)?),
        Some(_) | None => {
            let message =
                format!("'{item}': expected explain, mode=.., temperature=.. or decode-weight=..");
            return Err(invalid(message));
        }
    }
    Ok(())
}

fn session<'a>(
    headers: &'a HeaderMap,
    user: Option<&'a str>,
    affinity: SessionAffinity,
) -> Result<Option<&'a str>, ApiError> {
    if affinity == SessionAffinity::Off {
        return Ok(None);
    }
    for name in SESSION {
        if let Some(session) = text(headers, name)? {
            return Ok(Some(session));
        }
    }
    let user = user.filter(|user| affinity == SessionAffinity::User && !user.is_empty());
    Ok(user)
}

fn text<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<Option<&'a str>, ApiError> {
    let Some(value) = headers.get(name) else {
        return Ok(None);
    };
    let text = value.to_str().map(str::trim).unwrap_or_default();
    if text.is_empty() {
        let message = format!("{name} must be visible ASCII and not empty");
        return Err(ApiError::invalid(name, message));
    }
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(list: &[(&'static str, &'static str)]) -> HeaderMap {
        let list = list.iter();
        list.map(|(name, value)| {
            (
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            )
        })
        .collect()
    }

    fn rules(mode: RouterMode, affinity: SessionAffinity) -> Rules {
        Rules { mode, affinity }
    }

    const KV: RouterMode = RouterMode::Kv;

    #[test]
    fn a_request_that_says_nothing_has_no_route() {
        let route = read(
            &HeaderMap::new(),
            Some("somebody"),
            None,
            rules(KV, SessionAffinity::Header),
        );
        assert!(route.unwrap().is_none());
    }

    #[test]
    fn what_a_request_says_is_read() {
        let headers = headers(&[
            ("x-stator-worker", "w1"),
            ("x-stator-prefill-worker", "p1"),
            ("x-stator-session", "s"),
            (
                "x-stator-route",
                "explain, mode=random,temperature=0.5, decode-weight=2",
            ),
        ]);
        let told = told(&headers);
        assert!(told.is_some());
        let rules = rules(KV, SessionAffinity::User);
        let route = read(&headers, Some("u"), told.as_ref(), rules)
            .unwrap()
            .unwrap();
        assert_eq!(route.worker.as_ref().unwrap().0, "w1");
        assert_eq!(route.prefill_worker.as_ref().unwrap().0, "p1");
        assert_eq!(route.mode, Some(RouterMode::Random));
        assert_eq!(
            (route.temperature, route.decode_weight),
            (Some(0.5), Some(2.0))
        );
        let session =
            |headers: &HeaderMap, user| read(headers, user, None, rules).unwrap().unwrap().session;
        assert_eq!(route.session, session(&headers, None));
        assert_eq!(route.session, session(&HeaderMap::new(), Some("s")));
        assert_ne!(route.session, session(&HeaderMap::new(), Some("t")));
    }

    #[test]
    fn what_cannot_be_understood_is_refused_by_name() {
        for bad in [
            "mode=best",
            "temperature=-1",
            "temperature=x",
            "explain=1",
            "fast",
        ] {
            let headers = headers(&[("x-stator-route", bad)]);
            let error = read(&headers, None, None, rules(KV, SessionAffinity::Header)).unwrap_err();
            assert_eq!(error.param(), Some(ROUTE), "{bad}");
        }
        let kv = headers(&[("x-stator-route", "mode=kv")]);
        let rules = rules(RouterMode::Random, SessionAffinity::Off);
        assert!(read(&kv, None, None, rules).is_err());
    }

    #[test]
    fn direct_needs_the_worker_to_be_named() {
        let rules = rules(RouterMode::Direct, SessionAffinity::Header);
        let error = read(&HeaderMap::new(), None, None, rules).unwrap_err();
        assert_eq!(error.param(), Some(WORKER));
        let named = headers(&[("x-stator-worker", "w")]);
        assert!(read(&named, None, None, rules).unwrap().is_some());
    }
}
