//! Looks, before an engine is started, whether this worker could serve: half a minute earlier than the engine
//! would say it, and in words that name the remedy.
//!
//! Nothing is changed and nothing imported. What only the running engine can tell is not looked at.

mod adapters;
mod devices;
mod listeners;
mod model;
mod packages;
mod siblings;

use std::{fmt, net::IpAddr};

use stator_common::{card::Role, discovery::Discovery};

use crate::{config::Config, transfer::Side};

/// How bad something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// As it should be.
    Fine,
    /// The worker starts, but something will not go as meant.
    Warning,
    /// The worker cannot serve.
    Error,
}

/// What was found in one place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub severity: Severity,
    /// What was looked at: a word or two.
    pub about: &'static str,
    pub found: String,
    /// What to do about it; empty where nothing is to be done.
    pub remedy: String,
}

impl Finding {
    fn fine(about: &'static str, found: impl Into<String>) -> Self {
        Self {
            severity: Severity::Fine,
            about,
            found: found.into(),
            remedy: String::new(),
        }
    }

    fn warning(about: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            severity: Severity::Warning,
            about,
            found: found.into(),
            remedy: remedy.into(),
        }
    }

    fn error(about: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            about,
            found: found.into(),
            remedy: remedy.into(),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Fine => "ok",
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        write!(f, "{severity:<8}{:<14}{}", self.about, self.found)?;
        if self.remedy.is_empty() {
            Ok(())
        } else {
            write!(f, "\n{:<22}remedy: {}", "", self.remedy)
        }
    }
}

/// What is looked at.
pub(crate) struct Subject<'a> {
    pub(crate) config: &'a Config,
    pub(crate) role: Role,
    /// Where the engines' side channels will be.
    pub(crate) sides: &'a [Side],
    /// Ports that the engines' KV events will be on.
    pub(crate) event_ports: &'a [u16],
    /// Absent: the worker's listeners are bound already. Else the plane's address, which is tried.
    pub(crate) unbound: bool,
    /// This machine's address, as others reach it.
    pub(crate) host: IpAddr,
    pub(crate) discovery: &'a dyn Discovery,
}

/// Looks at everything.
pub(crate) async fn examine(subject: &Subject<'_>) -> Vec<Finding> {
    let mut findings = node(subject.config, subject.role).await;
    findings.extend(listeners::examine(subject));
    findings.extend(siblings::examine(subject).await);
    findings
}

/// Looks at what a further node of an engine needs, which listens nowhere and is known to nobody.
pub(crate) async fn node(config: &Config, role: Role) -> Vec<Finding> {
    let mut findings = packages::examine(config, role);
    findings.extend(model::examine(config));
    findings.extend(adapters::examine(config));
    findings.extend(devices::examine(config).await);
    findings
}

/// Says whether the worker could not serve.
pub(crate) fn is_fatal(findings: &[Finding]) -> bool {
    findings
        .iter()
        .any(|finding| finding.severity == Severity::Error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_read_in_a_list() {
        let fine = Finding::fine("packages", "nixl 1.5.1");
        assert_eq!(fine.to_string(), "ok      packages      nixl 1.5.1");
        let error = Finding::error("packages", "there is no nixl", "install it");
        assert_eq!(
            error.to_string(),
            "error   packages      there is no nixl\n                      remedy: install it"
        );
        assert!(is_fatal(&[fine.clone(), error]) && !is_fatal(&[fine]));
    }
}
