//! Which variables stand for which flags: they are turned into flags, so that both are parsed, named and
//! refused alike.

/// A flag without its dashes, and the variables that may stand for it.
pub type Row = (&'static str, &'static [&'static str]);

/// The flags that every role has, with Stator's name first and Dynamo's (1.6) after it.
const OF_EVERY_ROLE: &[Row] = &[
    ("namespace", &["STATOR_NAMESPACE", "DYN_NAMESPACE"]),
    (
        "discovery-backend",
        &[
            "STATOR_DISCOVERY_BACKEND",
            "DYN_DISCOVERY_BACKEND",
            "DYN_STORE_KV",
        ],
    ),
    ("discovery-path", &["STATOR_FILE_KV", "DYN_FILE_KV"]),
    ("plane-token-file", &["STATOR_PLANE_TOKEN_FILE"]),
    ("system-host", &["STATOR_SYSTEM_HOST", "DYN_SYSTEM_HOST"]),
    ("system-port", &["STATOR_SYSTEM_PORT", "DYN_SYSTEM_PORT"]),
    ("drain-grace", &["STATOR_DRAIN_GRACE"]),
];

/// How etcd is reached, with Dynamo's names (1.6).
pub const ETCD: &[Row] = &[
    (
        "etcd-endpoints",
        &["STATOR_ETCD_ENDPOINTS", "ETCD_ENDPOINTS"],
    ),
    ("etcd-prefix", &["STATOR_ETCD_PREFIX"]),
    ("etcd-username", &["ETCD_AUTH_USERNAME"]),
    ("etcd-ca-path", &["ETCD_AUTH_CA"]),
    ("etcd-cert-path", &["ETCD_AUTH_CLIENT_CERT"]),
    ("etcd-key-path", &["ETCD_AUTH_CLIENT_KEY"]),
];

/// How the NATS server is reached, with Dynamo's names (1.6).
pub const NATS: &[Row] = &[
    ("nats-server", &["STATOR_NATS_SERVER", "NATS_SERVER"]),
    ("nats-username", &["NATS_AUTH_USERNAME"]),
    ("nats-credentials-file", &["NATS_AUTH_CREDENTIALS_FILE"]),
    ("nats-tls-ca-cert-path", &["NATS_TLS_CA_CERT_PATH"]),
    ("nats-tls-client-cert-path", &["NATS_TLS_CLIENT_CERT_PATH"]),
    ("nats-tls-client-key-path", &["NATS_TLS_CLIENT_KEY_PATH"]),
];

/// The certificates of the request plane, in every role that speaks it.
const REQUEST_PLANE_TLS: &[Row] = &[
    ("request-plane-tls-cert", &["STATOR_REQUEST_PLANE_TLS_CERT"]),
    ("request-plane-tls-key", &["STATOR_REQUEST_PLANE_TLS_KEY"]),
    ("request-plane-tls-ca", &["STATOR_REQUEST_PLANE_TLS_CA"]),
];

/// How Kubernetes is reached; the names without ours in front are those that Dynamo (1.6) has pods filled in with.
pub const KUBERNETES: &[Row] = &[
    (
        "kubernetes-namespace",
        &["STATOR_KUBERNETES_NAMESPACE", "POD_NAMESPACE"],
    ),
    ("kubernetes-config", &["STATOR_KUBERNETES_CONFIG"]),
    ("kubernetes-pod", &["STATOR_KUBERNETES_POD", "POD_NAME"]),
    (
        "kubernetes-pod-uid",
        &["STATOR_KUBERNETES_POD_UID", "POD_UID"],
    ),
    (
        "kubernetes-container",
        &["STATOR_KUBERNETES_CONTAINER", "CONTAINER_NAME"],
    ),
];

/// The variables of a role: those of every role, and its own.
#[derive(Clone, Copy, Debug)]
pub struct Variables(pub &'static [Row]);

/// Variables that say what kind of worker is meant: ours, and those of `dynamo.vllm` 1.6 (`backend_args.py`).
pub const DISAGGREGATION_MODE: &[&str] = &[
    "STATOR_DISAGGREGATION_MODE",
    "DYN_DISAGGREGATION_MODE",
    "DYN_VLLM_DISAGGREGATION_MODE",
];

/// As [`DISAGGREGATION_MODE`], with true or false for one mode each: those of `dynamo.vllm` before 1.0.
pub const IS_PREFILL_WORKER: &[&str] = &["DYN_VLLM_IS_PREFILL_WORKER"];
/// As [`IS_PREFILL_WORKER`].
pub const IS_DECODE_WORKER: &[&str] = &["DYN_VLLM_IS_DECODE_WORKER"];

/// Returns every variable that says what kind of worker is meant, for those who say it otherwise.
pub fn of_the_role() -> impl Iterator<Item = &'static str> {
    let older = IS_PREFILL_WORKER.iter().chain(IS_DECODE_WORKER);
    DISAGGREGATION_MODE.iter().chain(older).copied()
}

impl Variables {
    /// Returns every flag that the environment may give.
    pub fn rows(self) -> impl Iterator<Item = Row> {
        let of_every_role = OF_EVERY_ROLE
            .iter()
            .chain(ETCD)
            .chain(KUBERNETES)
            .chain(NATS);
        let of_every_role = of_every_role.chain(REQUEST_PLANE_TLS);
        of_every_role.chain(self.0).copied()
    }

    /// Returns what the environment says in place of a flag: the first variable that is set and not empty.
    pub fn value(self, flag: &str, environment: impl Fn(&str) -> Option<String>) -> Option<String> {
        let (_, names) = self.rows().find(|(name, _)| *name == flag)?;
        first(names, environment)
    }

    /// Returns what the environment says as a command line, the program's name included.
    pub fn command_line(
        self,
        environment: impl Fn(&str) -> Option<String>,
    ) -> impl Iterator<Item = String> {
        command_line(self.rows(), environment)
    }

    /// Writes the names into the help of a command that has all these flags.
    pub fn told_by(self, mut command: clap::Command) -> clap::Command {
        for (flag, names) in self.rows() {
            command = command.mut_arg(flag.replace('-', "_"), |arg| {
                let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
                arg.help(format!("{help} [env: {}]", names.join(", ")))
            });
        }
        command
    }
}

/// Returns what the environment says in place of some flags, as a command line, the program's name included.
pub fn command_line(
    rows: impl Iterator<Item = Row>,
    environment: impl Fn(&str) -> Option<String>,
) -> impl Iterator<Item = String> {
    let flags = rows
        .filter_map(move |(flag, names)| Some(format!("--{flag}={}", first(names, &environment)?)));
    ["environment".to_owned()].into_iter().chain(flags)
}

fn first(names: &[&str], environment: impl Fn(&str) -> Option<String>) -> Option<String> {
    let mut values = names.iter().filter_map(|name| environment(name));
    values.find(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_variable_that_says_something_wins() {
        let own = Variables(&[("port", &["OURS", "THEIRS", "LAST"])]);
        let environment = |name: &str| match name {
            "OURS" => Some(String::new()),
            "THEIRS" => Some("1".to_owned()),
            "LAST" => Some("2".to_owned()),
            "DYN_NAMESPACE" => Some("n".to_owned()),
            _ => None,
        };
        assert_eq!(own.value("port", environment).as_deref(), Some("1"));
        let line: Vec<String> = own.command_line(environment).collect();
        assert_eq!(line, ["environment", "--namespace=n", "--port=1"]);
    }
}
