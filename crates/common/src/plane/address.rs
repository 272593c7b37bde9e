//! Where a worker takes requests: which plane, over what, and where.
//!
//! A card carries the text ([`crate::Card::address`]), so that an older processor can say which address it does not
//! understand.

use std::{fmt, str::FromStr};

/// Where a worker takes requests. As text: `host:port` or `tcp://host:port`, `tls://host:port`, `http://host:port`,
/// `https://host:port`, `nats://subject`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Frames over TCP, at `host:port`.
    Tcp(String),
    /// The same over TLS.
    Tls(String),
    /// gRPC over HTTP/2, at `host:port`.
    Http(String),
    /// The same over TLS.
    Https(String),
    /// Frames over messages of a NATS server, to this subject.
    Nats(String),
}

/// Why a text is not an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    #[error("'{0}' begins with none of tcp://, tls://, http://, https://, nats://")]
    Scheme(String),
    #[error("'{0}' has no host:port")]
    Port(String),
    #[error("'{0}' has no subject without spaces and wildcards")]
    Subject(String),
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (scheme, rest) = text.split_once("://").unwrap_or(("tcp", text));
        let address = match scheme {
            "tcp" => Self::Tcp(rest.to_owned()),
            "tls" => Self::Tls(rest.to_owned()),
            "http" => Self::Http(rest.to_owned()),
            "https" => Self::Https(rest.to_owned()),
            "nats" if is_subject(rest) => return Ok(Self::Nats(rest.to_owned())),
            "nats" => return Err(AddressError::Subject(text.to_owned())),
            _ => return Err(AddressError::Scheme(text.to_owned())),
        };
        if is_authority(rest) {
            Ok(address)
        } else {
            Err(AddressError::Port(text.to_owned()))
        }
    }
}

fn is_authority(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| {
        let bracketed = host.starts_with('[') && host.ends_with(']');
        !host.is_empty()
            && (bracketed || !host.contains(':'))
            && !host.contains(|c: char| c == '/' || c == '@' || c.is_whitespace())
            && port.parse::<u16>().is_ok()
    })
}

/// Says whether a text names one subject of NATS.
pub(crate) fn is_subject(text: &str) -> bool {
    text.split('.').all(|token| {
        !token.is_empty()
            && !token
                .contains(|c: char| c == '*' || c == '>' || c.is_whitespace() || c.is_control())
    })
}

impl Address {
    /// Returns what comes after the scheme: what is dialled.
    pub fn place(&self) -> &str {
        match self {
            Self::Tcp(place)
            | Self::Tls(place)
            | Self::Http(place)
            | Self::Https(place)
            | Self::Nats(place) => place,
        }
    }

    /// Returns the same address at another `host:port`, as others reach it. A subject stays.
    #[must_use]
    pub fn at(&self, place: impl Into<String>) -> Self {
        match self {
            Self::Tcp(_) => Self::Tcp(place.into()),
            Self::Tls(_) => Self::Tls(place.into()),
            Self::Http(_) => Self::Http(place.into()),
            Self::Https(_) => Self::Https(place.into()),
            Self::Nats(subject) => Self::Nats(subject.clone()),
        }
    }
}

impl fmt::Display for Address {
    /// Without `tcp://`, which processors of before did not know.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self {
            Self::Tcp(_) => "",
            Self::Tls(_) => "tls://",
            Self::Http(_) => "http://",
            Self::Https(_) => "https://",
            Self::Nats(_) => "nats://",
        };
        write!(f, "{scheme}{}", self.place())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back() {
        for text in [
            "10.0.0.1:80",
            "[::1]:80",
            "tls://worker-0:80",
            "http://worker-0.ns.svc:80",
            "https://10.0.0.1:80",
            "nats://stator.prod.worker.agg-1",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        let tcp: Address = "tcp://10.0.0.1:80".parse().unwrap();
        assert_eq!(tcp.to_string(), "10.0.0.1:80");
        assert_eq!(tcp.at("w:1").to_string(), "w:1");
    }

    #[test]
    fn what_cannot_be_dialled_is_refused() {
        for text in [
            "",
            "worker",
            "worker:99999",
            ":80",
            "::1:80",
            "quic://worker:80",
            "http://user@worker:80",
            "http://worker:80/path",
            "nats://",
            "nats://a b",
            "nats://a.*",
            "nats://a..b",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
