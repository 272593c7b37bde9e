//! Spellings that still work, and what they are called now.

use std::ffi::OsString;

/// Flags of older releases of Dynamo, and today's.
const FLAGS: [(&str, &str); 4] = [
    ("--store-kv", "--discovery-backend"),
    ("--file-kv", "--discovery-path"),
    ("--is-prefill-worker", "--disaggregation-mode prefill"),
    ("--is-decode-worker", "--disaggregation-mode decode"),
];

/// The same for variables.
const VARIABLES: [(&str, &str); 1] = [("DYN_STORE_KV", "DYN_DISCOVERY_BACKEND")];

/// A spelling that was used, and today's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Renamed {
    pub old: &'static str,
    pub new: &'static str,
}

/// Returns which old spellings are used, each once.
///
/// - `own`: the flags that are ours.
pub fn used(own: &[OsString], environment: impl Fn(&str) -> Option<String>) -> Vec<Renamed> {
    let is_given = |old: &str| {
        own.iter().any(|argument| {
            let argument = argument.to_string_lossy();
            argument.split('=').next() == Some(old)
        })
    };
    let is_set = |old: &str| environment(old).is_some_and(|value| !value.is_empty());
    let flags = FLAGS.into_iter().filter(|(old, _)| is_given(old));
    let variables = VARIABLES.into_iter().filter(|(old, _)| is_set(old));
    flags
        .chain(variables)
        .map(|(old, new)| Renamed { old, new })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_spellings_are_named_once_with_the_new_ones() {
        let line = ["--store-kv=file", "--store-kv", "mem", "--namespace", "n"].map(OsString::from);
        let environment = |name: &str| (name == "DYN_STORE_KV").then(|| "file".to_owned());
        let named: Vec<_> = used(&line, environment)
            .into_iter()
            .map(|renamed| (renamed.old, renamed.new))
            .collect();
        assert_eq!(
            named,
            [
                ("--store-kv", "--discovery-backend"),
                ("DYN_STORE_KV", "DYN_DISCOVERY_BACKEND")
            ]
        );
    }
}
